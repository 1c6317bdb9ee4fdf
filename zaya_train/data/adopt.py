"""`zaya data adopt`: an existing Megatron corpus as plain text, without a copy of its tokens.

The directory that is made looks like any corpus; its `tokens.bin` and `tokens.idx` are links to the
files as they are. Every token id is compared with the tokenizer's vocabulary once, and both files
are hashed, so that a change of theirs is noticed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zaya_train.config.errors import DataError
from zaya_train.data.corpus import BIN, IDX, Corpus
from zaya_train.data.corpus_writer import Contents, write_manifest
from zaya_train.data.token_index import open_index
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.runtime.files import whole_directory

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class AdoptRequest:
    """One Megatron corpus."""

    prefix: Path
    """Path of the `.bin` and `.idx` files without these endings."""
    tokenizer: str
    """The tokenizer it was made with."""
    output: Path


def adopt(request: AdoptRequest) -> Corpus:
    """Make the corpus directory and open it.

    Raises:
        DataError: no index, a damaged one, token ids that the tokenizer does not have, an output
            that exists.
        StorageError: the file system refused.
    """
    if request.output.exists():
        raise DataError(f"{request.output}: exists; not replaced")
    sources = {name: _with_ending(request.prefix, end) for name, end in _ENDINGS.items()}
    index = open_index(sources[IDX])
    tokenizer = replace(load_tokenizer(request.tokenizer), own_template=None)
    if not len(index):
        raise DataError(f"{sources[IDX]}: holds no document")
    with whole_directory(request.output) as folder:
        for name, source in sources.items():
            (folder / name).symlink_to(source.resolve())
        contents = Contents(
            kind="text",
            documents=len(index),
            tokens=index.tokens,
            supervised_tokens=index.tokens,
            source={"adopted": str(request.prefix)},
            rejects={},
        )
        write_manifest(folder, tokenizer, contents)
        Corpus.open(folder, verify="tokens")
    return Corpus.open(request.output)


_ENDINGS = {BIN: ".bin", IDX: ".idx"}


def _with_ending(prefix: Path, ending: str) -> Path:
    path = prefix.with_name(prefix.name + ending)
    if not path.is_file():
        raise DataError(f"{path}: missing")
    return path
