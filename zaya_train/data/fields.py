"""From the rows people have to documents: which fields hold what, GSM8K-style answer markers."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from zaya_train.config.errors import DataError
from zaya_train.data.chat import final_answer
from zaya_train.data.tokenizer import THINK_CLOSE, THINK_OPEN

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from zaya_train.data.corpus import CorpusKind

Layout = Literal["messages", "pair", "text"]
MESSAGES_FIELDS = ("messages", "conversations")
PAIR_FIELDS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("problem", "solution"),
    ("instruction", "output"),
)
TEXT_FIELD = "text"
GSM8K_MARKER = "####"
"""Starts the line that holds the final answer in GSM8K."""


@dataclass(frozen=True, kw_only=True)
class FieldOverrides:
    """Fields named by the user; None leaves them to detection."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    text: str | None = None


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where a document stands in a row: `names` are (messages,), (prompt, response) or (text,)."""

    layout: Layout
    names: tuple[str, ...]
    answer_marker: str = ""
    """Pairs only: starts the line that holds the answer; what stands before it is reasoning."""

    @property
    def kind(self) -> CorpusKind:
        """Kind of corpus these rows make."""
        return "text" if self.layout == "text" else "chat"


@dataclass(frozen=True)
class Document:
    """A row as text: `messages` for a conversation, else `text`."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    text: str
    answer: str
    """What a grader expects; empty for plain text."""
    family: str

    def group_hash(self) -> int:
        """64-bit hash of what is asked (of the text itself if nothing is): documents that differ
        only in case, punctuation or white space of it share the hash."""
        asked = self.text or " ".join(
            message["content"]
            for message in self.messages
            if message["role"] not in ("assistant", "gpt") and isinstance(message["content"], str)
        )
        normal = re.sub(r"\W+", " ", asked.casefold()).strip() or asked
        return int.from_bytes(
            hashlib.sha256(normal.encode(errors="surrogatepass")).digest()[:8], "little"
        )


def detect_fields(row: Mapping[str, Any], overrides: FieldOverrides, place: str) -> Fields:
    """Decide from the first row where documents stand.

    Raises:
        DataError: no known combination of fields, or one named by the user is missing.
    """
    named = _named(overrides)
    if named:
        _require(row, named, place)
        return named
    for field in MESSAGES_FIELDS:
        if field in row:
            return Fields(layout="messages", names=(field,))
    for prompt, response in PAIR_FIELDS:
        if prompt in row and response in row:
            return Fields(layout="pair", names=(prompt, response))
    if TEXT_FIELD in row:
        return Fields(layout="text", names=(TEXT_FIELD,))
    raise DataError(
        f"{place}: no known fields among {_listed(row)}: expected messages or conversations, a "
        "pair such as prompt and response, or text; or name them"
    )


def marked_answer(response: str, marker: str) -> tuple[str, str] | None:
    """(what stands before, answer) at the last line that starts with the marker, or None."""
    lines = response.split("\n")
    for number in range(len(lines) - 1, -1, -1):
        if lines[number].startswith(marker):
            answer = "\n".join([lines[number][len(marker) :], *lines[number + 1 :]]).strip()
            return "\n".join(lines[:number]).strip(), answer
    return None


def to_document(row: Mapping[str, Any], fields: Fields, place: str) -> Document:
    """A row as a document.

    Raises:
        DataError: a missing field, one of the wrong type, or a response without the marker.
    """
    _require(row, fields, place)
    messages: list[dict[str, Any]] = []
    text = ""
    if fields.layout == "messages":
        messages = _messages(row[fields.names[0]], fields.names[0], place)
    elif fields.layout == "pair":
        messages = _pair(row, fields, place)
    else:
        text = _text(row, fields.names[0], place)
    return Document(
        id=str(row.get("id", place.rpartition("/")[2])),
        messages=tuple(messages),
        text=text,
        answer=_expected(row, fields, messages),
        family=row["family"] if isinstance(row.get("family"), str) else "",
    )


def _named(overrides: FieldOverrides) -> Fields | None:
    if (overrides.prompt is None) != (overrides.response is None):
        raise DataError("fields: prompt and response must be named together")
    choices = [
        Fields(layout="messages", names=(overrides.messages,)) if overrides.messages else None,
        Fields(layout="pair", names=(overrides.prompt, overrides.response))
        if overrides.prompt and overrides.response
        else None,
        Fields(layout="text", names=(overrides.text,)) if overrides.text else None,
    ]
    named = [choice for choice in choices if choice]
    if len(named) > 1:
        raise DataError(
            f"fields: name messages, or prompt and response, or text; not {len(named)} of them"
        )
    return named[0] if named else None


def _require(row: Mapping[str, Any], fields: Fields, place: str) -> None:
    for name in fields.names:
        if name not in row:
            raise DataError(f"{place}: missing field {name!r}; the row has {_listed(row)}")


def _messages(value: Any, field: str, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{place}: field {field!r} is not a list of objects")
    messages = []
    for turn, message in enumerate(value):
        # ShareGPT writes {from, value} where others write {role, content}.
        role = message.get("role", message.get("from"))
        if not isinstance(role, str):
            raise DataError(f"{place}: field {field!r}, turn {turn}: no role")
        messages.append({"role": role, "content": message.get("content", message.get("value"))})
    return messages


def _pair(row: Mapping[str, Any], fields: Fields, place: str) -> list[dict[str, Any]]:
    prompt, response = (_text(row, name, place) for name in fields.names)
    if fields.names[0] == "instruction" and isinstance(row.get("input"), str) and row["input"]:
        prompt = f"{prompt}\n\n{row['input']}"
    if fields.answer_marker:
        parts = marked_answer(response, fields.answer_marker)
        if parts is None:
            raise DataError(
                f"{place}: field {fields.names[1]!r} has no line starting with "
                f"{fields.answer_marker!r}"
            )
        response = f"{THINK_OPEN}{parts[0]}{THINK_CLOSE}{parts[1]}"
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def _text(row: Mapping[str, Any], field: str, place: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise DataError(f"{place}: field {field!r} is {type(value).__name__}, text expected")
    return value


def _expected(row: Mapping[str, Any], fields: Fields, messages: Sequence[Mapping[str, Any]]) -> str:
    """A column of its own if the row has one, else what the last turn says after its reasoning."""
    for name in ("answer", "reference_answer"):
        if name not in fields.names and isinstance(row.get(name), str):
            return str(row[name])
    content = messages[-1]["content"] if messages else ""
    return final_answer(content) if isinstance(content, str) else ""


def _listed(row: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, row)) or "no field"
