"""Ids of `tokenizers` by gigatoken, tens of times as fast, for preparation; never by default.

Its ids are the tokenizer's own or the preparation fails: some documents of every shard are encoded
by both, and the first that differs is an error with its place. Compared are every N-th document,
and every line with a character that is new in its shard, for rare characters are where two encoders
part. `compare_every=1` compares everything.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from zaya_train.config.errors import DataError, first_line
from zaya_train.data.sections import Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from zaya_train.data.sections import Rejected, Tokens
    from zaya_train.data.tokenizer import Tokenizer

PLAIN, GIGATOKEN = "tokenizers", "gigatoken"
ENCODERS = (PLAIN, GIGATOKEN)
COMPARE_EVERY = 16
"""Costs a sixteenth of the plain encoding, which is one to five times all of the fast one."""


@dataclass(frozen=True, eq=False)
class FastEncoder:
    """Encodes plain text; made by `fast_tokenizer`."""

    encode_one: Callable[[str], NDArray[np.uint32]] = field(repr=False)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Ids of every text; markers in it are ordinary characters."""
        return [self.encode_one(text).astype(np.int32) for text in texts]


@cache
def fast_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer with gigatoken for its batches.

    Raises:
        DataError: gigatoken is not installed or has no way to encode what this tokenizer encodes.
    """
    try:
        import gigatoken
    except ImportError as error:
        raise DataError(
            "encoder gigatoken: not installed (pip install 'zaya-train[fast]'); "
            f"encoder {PLAIN} needs nothing"
        ) from error
    content = json.loads(tokenizer.backend.to_str())
    # Special tokens in a document are ordinary text here, and none are added around it.
    content["added_tokens"] = [added for added in content["added_tokens"] if not added["special"]]
    content["post_processor"] = None
    try:
        made = gigatoken.Tokenizer.from_json(json.dumps(content))
    except (ValueError, RuntimeError) as error:
        raise DataError(
            f"encoder gigatoken: cannot stand in for tokenizer {tokenizer.spec}: "
            f"{first_line(error)}; encoder {PLAIN} can"
        ) from error
    return replace(tokenizer, fast=FastEncoder(made.encode))


def encoder_version(encoder: str) -> str:
    """Name and version of one of ENCODERS, which is installed."""
    return f"{encoder} {version(encoder)}"


@dataclass
class Comparison:
    """Says what of one shard is to be encoded twice, and compares the two."""

    fast: Tokenizer
    plain: Tokenizer
    every: int
    compared: int = 0
    """Whole documents so far."""
    _seen: set[str] = field(default_factory=set)
    _documents: int = 0

    def wants(self, place: str, texts: Sequence[str]) -> bool:
        """Whether the next document, which consists of `texts`, is to be compared whole.

        Of any document, lines with characters that are new are compared here.

        Raises:
            DataError: they differ.
        """
        due = self._documents % self.every == 0
        self._documents += 1
        self.compared += due
        fresh = [text for text in texts if not self._seen.issuperset(text)]
        if fresh:
            self._compare_lines(place, fresh)
        return due

    def _compare_lines(self, place: str, texts: Sequence[str]) -> None:
        lines = []
        for line in "".join(texts).splitlines(keepends=True):
            if not self._seen.issuperset(line):
                lines.append(line)
                self._seen.update(line)
        encoded = zip(self.fast.encode_batch(lines), self.plain.encode_batch(lines), strict=True)
        for fast, plain in encoded:
            _require_equal(place, fast, plain)

    def require_equal(self, place: str, fast: Sample | Rejected, plain: Sample | Rejected) -> None:
        """DataError where a document's ids differ."""
        if isinstance(fast, Sample) and isinstance(plain, Sample):
            _require_equal(place, fast.tokens, plain.tokens)
        elif fast != plain:
            raise DataError(f"{place}: {GIGATOKEN}: {fast}; {PLAIN}: {plain}")


def _require_equal(place: str, fast: Tokens, plain: Tokens) -> None:
    if np.array_equal(fast, plain):
        return
    shared = min(len(fast), len(plain))
    different = np.flatnonzero(fast[:shared] != plain[:shared])
    first = int(different[0]) if len(different) else shared
    ours, theirs = (ids[first : first + 3].tolist() for ids in (fast, plain))
    raise DataError(
        f"{place}: {GIGATOKEN} differs from {PLAIN} at token {first}: {ours} for {theirs} "
        f"({len(fast)} and {len(plain)} tokens); use encoder {PLAIN}"
    )
