"""Conversations and plain text to token ids with a section table.

The shipped format is compact, one special token per role and none besides:

    <|user|>TEXT<|end|><|assistant|><think>REASONING</think>ANSWER<|end|>

Targets are the assistant's: think markers, reasoning, answer and the closing end token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from zaya_train.data.sections import (
    Kind,
    Rejected,
    RejectReason,
    Role,
    Sample,
    make_sections,
)
from zaya_train.data.segments import Segment
from zaya_train.data.tokenizer import (
    ASSISTANT,
    END,
    SYSTEM,
    THINK_CLOSE,
    THINK_OPEN,
    TOOL,
    USER,
    Tokenizer,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from zaya_train.data.chat_template import ChatTemplate

ROLES = {
    "system": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    # ShareGPT's names, common in published conversation sets.
    "human": Role.USER,
    "gpt": Role.ASSISTANT,
}
ROLE_MARKERS = {Role.SYSTEM: SYSTEM, Role.USER: USER, Role.ASSISTANT: ASSISTANT, Role.TOOL: TOOL}
_THINK_TAG = re.compile(f"({re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)})")

Message = Mapping[str, Any]


def parse_conversation(messages: Sequence[Message]) -> list[Segment] | Rejected:
    """Split a conversation into segments, or say by code why it cannot be used."""
    if not messages:
        return Rejected(RejectReason.NO_MESSAGES)
    segments: list[Segment] = []
    for turn, message in enumerate(messages):
        parsed = _parse_turn(turn, message)
        if isinstance(parsed, Rejected):
            return parsed
        segments += parsed
    if segments[-1].role != Role.ASSISTANT:
        return Rejected(RejectReason.LAST_NOT_ASSISTANT, f"turn {len(messages) - 1}")
    if segments[0].role == Role.ASSISTANT:
        return Rejected(RejectReason.NO_PROMPT, "turn 0 is the assistant's")
    return segments


def split_reasoning(content: str) -> list[tuple[Kind, str]] | RejectReason:
    """Parts of an assistant turn in order: markers, reasoning (maybe empty), answers.

    The turn must end in an answer that is more than white space.
    """
    parts: list[tuple[Kind, str]] = []
    inside = False
    for piece in _THINK_TAG.split(content):
        if piece == THINK_OPEN and inside:
            return RejectReason.THINK_NESTED
        if piece == THINK_CLOSE and not inside:
            return RejectReason.THINK_NOT_OPENED
        if piece in (THINK_OPEN, THINK_CLOSE):
            inside = piece == THINK_OPEN
            parts.append((Kind.MARKUP, piece))
        elif inside:
            parts.append((Kind.REASONING, piece))
        elif piece:
            parts.append((Kind.ANSWER, piece))
    if inside:
        return RejectReason.THINK_NOT_CLOSED
    if not parts or parts[-1][0] != Kind.ANSWER or not parts[-1][1].strip():
        return RejectReason.EMPTY_ANSWER
    return parts


def encode_conversations(
    tokenizer: Tokenizer,
    conversations: Sequence[Sequence[Message]],
    template: ChatTemplate | None = None,
) -> list[Sample | Rejected]:
    """Encode many conversations with one call into the tokenizer; order is kept.

    In the shipped format, or as `template` renders them.
    """
    parsed = [parse_conversation(turns) for turns in conversations]
    if template is not None:
        parsed = [
            turns if isinstance(turns, Rejected) else template.segments(turns) for turns in parsed
        ]
    return encode_segments(tokenizer, parsed)


def encode_segments(
    tokenizer: Tokenizer, parsed: Sequence[list[Segment] | Rejected]
) -> list[Sample | Rejected]:
    """Parsed conversations to ids, one section per segment; rejected ones stay as they are."""
    texts = [
        segment.text
        for segments in parsed
        if not isinstance(segments, Rejected)
        for segment in segments
        if segment.kind != Kind.MARKUP
    ]
    encoded = iter(tokenizer.encode_batch(texts))
    samples: list[Sample | Rejected] = []
    for segments in parsed:
        if isinstance(segments, Rejected):
            samples.append(segments)
            continue
        ids = [
            tokenizer.markup_ids(segment.text) if segment.kind == Kind.MARKUP else next(encoded)
            for segment in segments
        ]
        samples.append(_assemble(segments, ids, tokenizer.continues))
    return samples


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Sample | Rejected]:
    """Plain documents: one section, every token a target, the end token last."""
    samples: list[Sample | Rejected] = []
    sound = [text if is_unicode(text) else "" for text in texts]
    for text, ids in zip(texts, tokenizer.encode_batch(sound), strict=True):
        if text and not sound[len(samples)]:
            samples.append(Rejected(RejectReason.NOT_UNICODE))
            continue
        if not text.strip() or not len(ids):
            samples.append(Rejected(RejectReason.EMPTY_TEXT))
            continue
        tokens = np.append(ids, np.int32(tokenizer.end_id))
        row = (len(tokens), Role.TEXT, Kind.TEXT, 0, True)
        samples.append(Sample(tokens, make_sections([row])))
    return samples


def is_unicode(text: str) -> bool:
    """Whether text can be written; JSON may hold halves of surrogate pairs, which cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def json_line(row: Mapping[str, Any]) -> str:
    """JSON of a row, escaped where it could not be written otherwise."""
    line = json.dumps(row, ensure_ascii=False)
    return line if is_unicode(line) else json.dumps(row)


def final_answer(content: str) -> str:
    """What an assistant turn says after its last reasoning, stripped of white space."""
    return content.rpartition(THINK_CLOSE)[2].strip()


def _parse_turn(turn: int, message: Message) -> list[Segment] | Rejected:
    role = ROLES.get(message.get("role", ""))
    content = message.get("content")
    if role is None:
        return Rejected(RejectReason.UNKNOWN_ROLE, f"turn {turn}: {message.get('role')!r}")
    if not isinstance(content, str) or (role != Role.ASSISTANT and not content):
        return Rejected(RejectReason.EMPTY_MESSAGE, f"turn {turn}")
    if not is_unicode(content):
        return Rejected(RejectReason.NOT_UNICODE, f"turn {turn}")
    opening = Segment(ROLE_MARKERS[role], role, Kind.MARKUP, turn, False)
    if role != Role.ASSISTANT:
        return [
            opening,
            Segment(content, role, Kind.PROMPT, turn, False),
            Segment(END, role, Kind.MARKUP, turn, False),
        ]
    parts = split_reasoning(content)
    if isinstance(parts, RejectReason):
        return Rejected(parts, f"turn {turn}")
    middle = [Segment(text, role, kind, turn, True) for kind, text in parts]
    return [opening, *middle, Segment(END, role, Kind.MARKUP, turn, True)]


def _assemble(
    segments: Sequence[Segment],
    ids: Sequence[Sequence[int] | NDArray[np.int32]],
    continues: NDArray[np.bool_],
) -> Sample:
    rows = [
        (len(part), segment.role, segment.kind, segment.turn, segment.supervised)
        for segment, part in zip(segments, ids, strict=True)
    ]
    tokens = np.concatenate([np.asarray(part, dtype=np.int32) for part in ids])
    return Sample(tokens, make_sections(rows), continues)
