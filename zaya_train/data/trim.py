"""Answer-preserving trimming of one document to a token budget (report, III-A).

Four rules, in order: keep what fits; else cut the tail of the last assistant turn's reasoning,
immediately before its answer, to exactly the budget; else remove the earlier reasoning blocks with
their markers and cut the last one again as far as still needed; else reject. Prompts and answers
are never touched, nor are the markers of the last reasoning, even when nothing is left between
them. Work is on token ids: text is never tokenised again.

A turn with several think blocks counts all but the last of them as earlier reasoning.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import numpy as np

from zaya_train.data.sections import (
    Kind,
    Rejected,
    RejectReason,
    Role,
    Sample,
    Sections,
    Tokens,
    supervised_mask,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


class TrimRule(StrEnum):
    """Which of the report's rules made a document fit."""

    WHOLE = "whole"
    TAIL_CUT = "tail_cut"
    EARLIER_DROPPED = "earlier_dropped"


@dataclass(frozen=True)
class Trimmed:
    """What stays of a document: `keep` are (start, end) token ranges in order."""

    keep: tuple[tuple[int, int], ...]
    rule: TrimRule
    removed_tokens: int

    @property
    def length(self) -> int:
        """Tokens kept."""
        return sum(end - start for start, end in self.keep)

    def tokens(self, sample: Sample) -> Tokens:
        """Kept tokens of the document this was computed from, [length]."""
        return np.concatenate([sample.tokens[start:end] for start, end in self.keep])

    def supervised(self, sample: Sample) -> NDArray[np.bool_]:
        """Which kept tokens are targets, [length]."""
        mask = supervised_mask(sample.sections)
        return np.concatenate([mask[start:end] for start, end in self.keep])


@dataclass(frozen=True)
class ReasoningBlock:
    """One `<think>..</think>`: [start, end) is the reasoning, one marker stands on each side."""

    turn: int
    start: int
    end: int

    @property
    def length(self) -> int:
        """Reasoning tokens, without the markers."""
        return self.end - self.start


def trim(sample: Sample, budget: int) -> Trimmed | Rejected:
    """Fit a document into `budget` tokens, its closing end token included.

    A cut that would fall inside a character moves to the character's start, so up to three tokens
    of the budget may stay unused there; every other cut uses it up.
    """
    total = int(sample.sections["end"][-1])
    if total <= budget:
        return Trimmed(((0, total),), TrimRule.WHOLE, 0)
    last, earlier = _reasoning(sample.sections)
    excess = total - budget
    last_length = last.length if last else 0
    if last and excess <= last_length:
        cut = (_cut_start(sample, last, excess), last.end)
        return _without(total, [cut], TrimRule.TAIL_CUT)
    removed = [(block.start - 1, block.end + 1) for block in earlier]
    excess -= sum(end - start for start, end in removed)
    if not earlier or excess > last_length:
        return Rejected(
            RejectReason.ANSWERS_EXCEED_BUDGET,
            f"{budget + excess - last_length} tokens without reasoning, budget {budget}",
        )
    if last and excess > 0:
        removed.append((_cut_start(sample, last, excess), last.end))
    return _without(total, removed, TrimRule.EARLIER_DROPPED)


def _cut_start(sample: Sample, block: ReasoningBlock, excess: int) -> int:
    """First token to remove so that at least `excess` go and no character is broken."""
    start = block.end - excess
    while (
        sample.continues is not None
        and block.start < start < block.end
        and sample.continues[sample.tokens[start]]
    ):
        start -= 1
    return start


def _reasoning(sections: Sections) -> tuple[ReasoningBlock | None, list[ReasoningBlock]]:
    """The last assistant turn's last reasoning block, if any, and all earlier ones in order."""
    blocks = [
        ReasoningBlock(int(row["turn"]), int(row["start"]), int(row["end"]))
        for row in sections[sections["kind"] == Kind.REASONING]
    ]
    turns = sections["turn"][sections["role"] == Role.ASSISTANT]
    if blocks and blocks[-1].turn == int(turns[-1]):
        return blocks[-1], blocks[:-1]
    return None, blocks


def _without(total: int, removed: list[tuple[int, int]], rule: TrimRule) -> Trimmed:
    """Keep everything of [0, total) outside the removed ranges, which are in order."""
    keep, position = [], 0
    for start, end in removed:
        keep.append((position, start))
        position = end
    keep.append((position, total))
    return Trimmed(
        tuple((start, end) for start, end in keep if end > start),
        rule,
        sum(end - start for start, end in removed),
    )
