"""Procedural reasoning corpus: seeded problems with `<think>` traces and verifiable answers.

Rows are chat messages, so the same preparation serves them and real data. Which split a problem
belongs to is decided by a hash of its text and by nothing else: two corpora of any seeds never
share a problem across the splits.
"""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zaya_train.config.errors import DataError
from zaya_train.data.synth_families import FAMILIES, Family
from zaya_train.runtime.files import whole_file

if TYPE_CHECKING:
    from collections.abc import Iterator

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
HELDOUT_SHARE = 1 / 8
"""Share of all possible problems that training never sees."""


@dataclass(frozen=True)
class SynthRequest:
    """What to generate.

    count: rows; seed: any integer; split: "train" or "heldout"; families: names, None for all.
    """

    count: int
    seed: int = 0
    split: Split = "train"
    families: tuple[str, ...] | None = None


def families() -> dict[str, Family]:
    """Every family by name."""
    return dict(FAMILIES)


def split_of(prompt: str) -> Split:
    """The split a problem belongs to, a function of its text alone."""
    digest = hashlib.sha256(prompt.encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "heldout" if share < HELDOUT_SHARE else "train"


def generate(request: SynthRequest) -> Iterator[dict[str, Any]]:
    """Rows `{"id", "family", "messages", "answer"}`; row i depends on (seed, split, families, i).

    Raises DataError for a count below 1, an unknown split or an unknown family, before the first
    row.
    """
    chosen = _chosen_families(request)
    return (_row(request, chosen, index) for index in range(request.count))


def write_jsonl(request: SynthRequest, path: Path | str) -> int:
    """Write the rows to `path`, one JSON object per line; returns the size in bytes.

    The file appears under its name only when it is whole. Raises StorageError when it cannot be
    written, DataError as `generate` does.
    """
    rows = generate(request)
    target = Path(path)
    with (
        whole_file(target) as partial,
        partial.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return target.stat().st_size


def _chosen_families(request: SynthRequest) -> list[Family]:
    if request.count < 1:
        raise DataError(f"synth: count must be 1 or more, got {request.count}")
    if request.split not in SPLITS:
        raise DataError(f"synth: split must be one of {', '.join(SPLITS)}, got {request.split!r}")
    names = tuple(FAMILIES) if request.families is None else request.families
    if not names:
        raise DataError(f"synth: no families named; there are {', '.join(FAMILIES)}")
    unknown = [name for name in names if name not in FAMILIES]
    if unknown:
        raise DataError(f"synth: unknown families {unknown}; there are {', '.join(FAMILIES)}")
    return [FAMILIES[name] for name in names]


def _row(request: SynthRequest, chosen: list[Family], index: int) -> dict[str, Any]:
    # A string seed is hashed with SHA-512 by `random`, the same on every platform and version.
    rng = random.Random(f"zaya-synth/{request.seed}/{request.split}/{index}")
    family = rng.choices(chosen, weights=[family.weight for family in chosen])[0]
    prompt = family.draw(rng)
    while split_of(prompt) != request.split:
        prompt = family.draw(rng)
    explained = family.explain(prompt)
    reply = f"<think>{explained.reasoning}</think>{explained.answer}"
    return {
        "id": f"{request.split}-{request.seed}-{index}",
        "family": family.name,
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": reply},
        ],
        "answer": explained.answer,
    }
