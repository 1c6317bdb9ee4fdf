"""What a preparation made and what it left out, for the person who asked for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_train.config.errors import DataError
from zaya_train.data.corpus import read_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from rich.console import Console

    from zaya_train.data.sections import Rejected

SHOWN_REJECTS = 3
"""Rejected documents that are described one by one."""
_DETAIL_CHARACTERS = 120


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Counts of the corpora of one preparation."""

    documents: int
    """In the training corpus, as are the tokens."""
    tokens: int
    supervised_tokens: int
    heldout: int
    """Documents held out."""
    rejects: Mapping[str, int]
    """Documents left out of either corpus, by reason code."""
    examples: tuple[str, ...] = ()
    """The first rejected documents; unknown of an output made earlier."""
    encoder: str | None = None
    """Name and version of a fast encoder; None: `tokenizers`."""
    compared: int = 0
    """Documents of both corpora that both encoders encoded."""

    @property
    def rejected(self) -> int:
        """Documents left out, over all reasons."""
        return sum(self.rejects.values())

    def require_majority(self, spec: str) -> None:
        """DataError where more than half of the documents of input `spec` were rejected."""
        total = self.documents + self.heldout + self.rejected
        if 2 * self.rejected > total:
            raise DataError(
                f"{spec}: {self.rejected:,} of {total:,} documents rejected "
                f"({_by_reason(self.rejects)}), more than half; allow_rejects (--allow-rejects) "
                f"accepts that{first_rejects(self.examples)}"
            )

    def show(self, console: Console, corpus: Path, kept: bool) -> None:
        """Print the first rejects, then everything in one line; `kept`: made earlier."""
        lines = [f"rejected {example}" for example in self.examples]
        if self.rejected > len(self.examples) > 0:
            lines.append(f"rejected {self.rejected - len(self.examples):,} more")
        reasons = f" ({_by_reason(self.rejects)})" if self.rejects else ""
        encoded = ""
        if self.encoder:
            encoded = f"; ids by {self.encoder}, {self.compared:,} documents compared"
        lines.append(
            f"{corpus}: {self.documents:,} documents, {self.tokens:,} tokens, "
            f"{self.supervised_tokens:,} supervised; {self.heldout:,} documents held out, "
            f"{self.rejected:,} rejected{reasons}{encoded}"
            + ("; kept as it was, made earlier from the same input and settings" if kept else "")
        )
        for line in lines:
            # Places such as `name[train]: row 3` must not be read as markup.
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def read_outcome(train: Path, heldout: Path, examples: Sequence[str] = ()) -> Outcome:
    """The outcome that the manifests of two corpora tell; `heldout` may not exist."""
    manifest = read_manifest(train)
    other = read_manifest(heldout) if heldout.is_dir() else None
    encoder = manifest.source.get("encoder", {})
    rejects = Counter(manifest.rejects) + Counter(other.rejects if other else {})
    return Outcome(
        documents=manifest.documents,
        tokens=manifest.tokens,
        supervised_tokens=manifest.supervised_tokens,
        heldout=other.documents if other else 0,
        rejects=dict(sorted(rejects.items())),
        examples=tuple(examples),
        encoder=encoder.get("name"),
        compared=encoder.get("compared_documents", 0),
    )


def describe_reject(place: str, rejected: Rejected) -> str:
    """One line: place, reason code and detail, which may quote the document and is cut short."""
    detail = rejected.detail[:_DETAIL_CHARACTERS]
    return f"{place}: {rejected.reason}" + (f" ({detail})" if detail else "")


def first_rejects(examples: Sequence[str]) -> str:
    """The end of an error message, empty where nothing was rejected."""
    return f"; first: {'; '.join(examples)}" if examples else ""


def _by_reason(rejects: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in rejects.items())
