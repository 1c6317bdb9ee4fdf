"""The tokens on which an export is compared: of a text that the user names, or random ones."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from zaya_train.config.errors import ConfigError, DataError
from zaya_train.data.corpus import Corpus
from zaya_train.data.tokenizer import load_tokenizer, read_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

ROW_TOKENS = 512
"""Longest document of a check: its logits at 262,272 classes take 0.5 GiB."""
_SEED = 0
_RANDOM_ROW_TOKENS = 256


@dataclass(frozen=True)
class CheckTokens:
    """Documents of at least two tokens, each a row of its own."""

    source: str
    """What they are, for a person."""
    documents: tuple[tuple[int, ...], ...]

    @property
    def count(self) -> int:
        """Tokens of all documents."""
        return sum(map(len, self.documents))

    def to_dict(self) -> dict[str, Any]:
        """As a receipt keeps them, so that the check can be repeated anywhere."""
        return asdict(self)


def random_tokens(count: int, vocab_size: int, context_tokens: int) -> CheckTokens:
    """`count` tokens drawn evenly over the vocabulary with a fixed seed."""
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randint(vocab_size, (count,), generator=generator).tolist()
    row = min(context_tokens, _RANDOM_ROW_TOKENS)
    rows = (drawn[start : start + row] for start in range(0, count, row))
    return _limited(f"random tokens, seed {_SEED}", rows, count, row)


def named_tokens(
    path: Path, count: int, context_tokens: int, tokenizer: Path | None
) -> CheckTokens:
    """The first `count` tokens of a corpus directory or of a text file, documents cut at the
    context and at ROW_TOKENS.

    tokenizer: the folder of the one that is exported.

    Raises:
        ConfigError: there is none.
        DataError: nothing to read there, or a corpus of another tokenizer.
    """
    if tokenizer is None:
        raise ConfigError(f"--verify-data {path}: needs a tokenizer, and none is exported")
    ours = load_tokenizer(str(tokenizer))
    row = min(context_tokens, ROW_TOKENS)
    if path.is_dir():
        corpus = Corpus.open(path)
        if corpus.manifest.tokenizer_sha256 != ours.sha256:
            raise DataError(f"{path}: made with another tokenizer than the one that is exported")
        documents = (corpus.tokens(number, 0, row).tolist() for number in range(len(corpus)))
        return _limited(
            f"corpus {path.resolve().parent.name}/{path.name}, first documents",
            documents,
            count,
            row,
        )
    ids = ours.encode(read_text(path))
    rows = (ids[start : start + row] for start in range(0, len(ids), row))
    return _limited(f"text {path.name}, its beginning", rows, count, row)


def _limited(source: str, rows: Iterable[Sequence[int]], count: int, row: int) -> CheckTokens:
    documents = tuple(_first(rows, count, row))
    if not documents:
        raise DataError(f"{source}: no document of two tokens or more among the first {count}")
    return CheckTokens(source, documents)


def _first(rows: Iterable[Sequence[int]], count: int, row: int) -> Iterator[tuple[int, ...]]:
    left = count
    for ids in rows:
        cut = tuple(ids[: min(row, left)])
        left -= len(cut)
        if len(cut) > 1:
            yield cut
        if left < 2:
            return
