"""What each part of a document is: the section table shared by building, trimming and reading.

Sections tile a document: the first starts at token 0, each starts where the one before ends, the
last ends at the document's length. A reasoning section may be empty (`<think></think>`), so that
the tokens around it are always known to be its markers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum

import numpy as np
from numpy.typing import NDArray


class Role(IntEnum):
    """Who speaks in a section; TEXT for documents that are no conversation."""

    TEXT = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4


class Kind(IntEnum):
    """What a section holds; MARKUP is what the format itself puts there, a think marker always by
    itself."""

    TEXT = 0
    PROMPT = 1
    REASONING = 2
    ANSWER = 3
    MARKUP = 4


class RejectReason(StrEnum):
    """Why a document cannot be used; the codes that manifests and reports count."""

    BAD_ROW = "bad_row"
    NO_MESSAGES = "no_messages"
    UNKNOWN_ROLE = "unknown_role"
    EMPTY_MESSAGE = "empty_message"
    LAST_NOT_ASSISTANT = "last_not_assistant"
    NO_PROMPT = "no_prompt"
    THINK_NOT_CLOSED = "think_not_closed"
    THINK_NOT_OPENED = "think_not_opened"
    THINK_NESTED = "think_nested"
    EMPTY_ANSWER = "empty_answer"
    EMPTY_TEXT = "empty_text"
    NOT_UNICODE = "not_unicode"
    ANSWERS_EXCEED_BUDGET = "answers_exceed_budget"
    NOT_SUPERVISED = "not_supervised"
    TEMPLATE_REFUSED = "template_refused"
    TEMPLATE_MISMATCH = "template_mismatch"
    TOO_FEW_ROLLOUTS = "too_few_rollouts"


SECTION_DTYPE = np.dtype(
    [
        ("start", "<u4"),
        ("end", "<u4"),
        ("turn", "<u2"),
        ("role", "u1"),
        ("kind", "u1"),
        ("supervised", "u1"),
        ("reserved", "u1", (3,)),
    ]
)
"""One row of the section table, 16 bytes; start and end count tokens from the document's start."""

Sections = NDArray[np.void]
Tokens = NDArray[np.integer]


@dataclass(frozen=True)
class Sample:
    """One document: `tokens` [n] and the `sections` (SECTION_DTYPE) that tile it."""

    tokens: Tokens
    sections: Sections
    continues: NDArray[np.bool_] | None = None
    """[vocabulary], True for ids that begin inside a character (Tokenizer.continues): reasoning is
    not cut before one. None: it may be cut anywhere."""

    def supervised(self) -> NDArray[np.bool_]:
        """[n], True where the token is a training target."""
        return supervised_mask(self.sections)


@dataclass(frozen=True)
class Rejected:
    """A document that is left out, with the code and the numbers or the place behind it."""

    reason: RejectReason
    detail: str = ""


def supervised_mask(sections: Sections) -> NDArray[np.bool_]:
    """One bool per token of the document the sections tile."""
    lengths = sections["end"].astype(np.int64) - sections["start"]
    return np.repeat(sections["supervised"].astype(bool), lengths)


def text_sections(lengths: NDArray[np.int64]) -> Sections:
    """Section tables of plain documents: one section each, all of it a target."""
    table = np.zeros(len(lengths), dtype=SECTION_DTYPE)
    table["end"], table["supervised"] = lengths, True
    return table


def make_sections(rows: list[tuple[int, Role, Kind, int, bool]]) -> Sections:
    """Section table from (length in tokens, role, kind, turn, supervised) in document order."""
    table = np.zeros(len(rows), dtype=SECTION_DTYPE)
    position = 0
    for target, (length, role, kind, turn, supervised) in zip(table, rows, strict=True):
        target["start"], target["end"] = position, position + length
        target["turn"], target["role"], target["kind"] = turn, role, kind
        target["supervised"] = supervised
        position += length
    return table
