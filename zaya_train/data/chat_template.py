"""A tokenizer's own chat template, with every part of every turn found in what it renders.

The template is rendered twice: with the conversation, and with a placeholder for every part of it.
The second says where each part stands, the first that nothing but white space at a part's ends was
changed; a conversation of which that does not hold is rejected, never guessed at. Parts are
tokenised one by one and as plain text, so sections end exactly where they should and a document
cannot forge structure; only the template's own text is searched for special tokens.

Inside think tags everything is reasoning. A turn is closed by the first special token after its
last part that is no think tag: what follows belongs to the next turn, as does a think tag before an
assistant's first part. An assistant's turn must be closed, others need not. Targets are
what the assistant writes: from its first part or think tag to the closing token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from zaya_train.config.errors import DataError, first_line
from zaya_train.data.sections import Kind, Rejected, RejectReason, Role
from zaya_train.data.segments import Segment
from zaya_train.data.tokenizer import THINK_CLOSE, THINK_OPEN

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from jinja2 import Template
    from jinja2.parser import Parser

    from zaya_train.data.tokenizer import Tokenizer

_PLACEHOLDER = re.compile("\ue000([0-9]+)\ue001")
_THINK_TAG = re.compile(f"({re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)})")
_ROLE_NAMES = {
    role: role.name.lower() for role in (Role.SYSTEM, Role.USER, Role.ASSISTANT, Role.TOOL)
}
"""What templates call them."""


_FAILURES = (
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a template's own expressions raise when they meet a conversation they were not made for."""


class TemplateRefusal(TemplateError):
    """The template's own `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}`, by which templates mark what an assistant says; its text passes through.

    Names set inside are unknown outside, as with transformers.
    """

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Of a block the call that gives its text."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_passed"), [], [], body).set_lineno(line)

    @staticmethod
    def _passed(caller: Callable[[], str]) -> str:
        return caller()


class _OpenTurn(Exception):
    """Nothing would tell the model, nor anyone who samples from it, that a turn is over."""


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """A template made ready; `compile_template` makes it."""

    template: Template
    special: re.Pattern[str]
    """Any special token of the tokenizer but think tags."""

    def segments(self, parsed: Sequence[Segment]) -> list[Segment] | Rejected:
        """Segments of the shipped format as the template renders them."""
        parts = [part for part in parsed if part.kind != Kind.MARKUP and part.text]
        try:
            real = self._render(_messages(parsed, {}))
            marked = self._render(
                _messages(parsed, {id(part): f"\ue000{n}\ue001" for n, part in enumerate(parts)})
            )
        except _FAILURES as error:
            kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
            return Rejected(RejectReason.TEMPLATE_REFUSED, kind + first_line(error))
        pieces = _PLACEHOLDER.split(marked)
        found = [int(number) for number in pieces[1::2]]
        missing = set(range(len(parts))) - set(found)
        if found != sorted(set(found)) or any(_needed(parts, number) for number in missing):
            return _mismatch("a part is missing, repeated or out of order")
        placed = _placed(real, pieces[::2], [parts[number] for number in found])
        if placed is None:
            return _mismatch("the text of a part is changed")
        try:
            return list(self._tiled(pieces[::2], placed))
        except _OpenTurn as error:
            return _mismatch(str(error))

    def _render(self, messages: list[dict[str, str]]) -> str:
        # None, as transformers gives them: templates ask whether they are none, not whether given.
        return self.template.render(
            messages=messages, tools=None, documents=None, add_generation_prompt=False
        )

    def _tiled(self, gaps: Sequence[str], parts: Sequence[Segment]) -> Iterator[Segment]:
        """Segments of the rendered text: gap, part, gap, ..., part, gap."""
        writer = _Turn(parts[0])
        yield from writer.open(gaps[0])
        for part, gap, following in zip(parts, gaps[1:], [*parts[1:], None], strict=True):
            writer.write(part.text)
            if following is not None and following.turn == part.turn:
                writer.write_tagged(gap)
                continue
            end = self._end(part, gap, following)
            yield from writer.close(gap[:end])
            if following is None:
                if gap[end:]:
                    yield replace(part, text=gap[end:], kind=Kind.MARKUP, supervised=False)
                return
            writer = _Turn(following)
            yield from writer.open(gap[end:])

    def _end(self, last: Segment, gap: str, following: Segment | None) -> int:
        """Where in the gap behind its last part a turn ends."""
        limit = len(gap)
        if following is not None and following.role == Role.ASSISTANT and THINK_OPEN in gap:
            limit = gap.index(THINK_OPEN)
        closing = self.special.search(gap, 0, limit)
        if closing is None and last.role == Role.ASSISTANT:
            raise _OpenTurn(
                "an assistant's turn must end with a special token of the tokenizer, this one ends "
                f"with {gap!r}"
            )
        return closing.end() if closing else limit


class _Turn:
    """Builds the segments of one turn."""

    def __init__(self, part: Segment) -> None:
        self.inside = False
        self._part = part
        self._spoken = part.role == Role.ASSISTANT
        self._done: list[Segment] = []
        self._text = ""

    def open(self, gap: str) -> list[Segment]:
        """The template's text before the first part; an assistant's begins at a think tag."""
        tag = _THINK_TAG.search(gap) if self._spoken else None
        start = tag.start() if tag else len(gap)
        self.write_tagged(gap[start:])
        markup = replace(self._part, text=gap[:start], kind=Kind.MARKUP, supervised=False)
        return [markup] if gap[:start] else []

    def write(self, text: str) -> None:
        """Text of a part."""
        self._text += text

    def write_tagged(self, gap: str) -> None:
        """Text of the template inside the turn, which may hold think tags."""
        for piece in _THINK_TAG.split(gap):
            if piece not in (THINK_OPEN, THINK_CLOSE):
                self._text += piece
                continue
            self._flush(keep_empty=piece == THINK_CLOSE)
            self._done.append(replace(self._part, text=piece, kind=Kind.MARKUP, supervised=True))
            self.inside = piece == THINK_OPEN

    def close(self, gap: str) -> list[Segment]:
        """All of the turn after its opening; `gap` ends in its closing token."""
        self._flush(keep_empty=False)
        if gap:
            closing = replace(self._part, text=gap, kind=Kind.MARKUP, supervised=self._spoken)
            self._done.append(closing)
        return self._done

    def _flush(self, keep_empty: bool) -> None:
        if self._text or (keep_empty and self.inside):
            kind = Kind.PROMPT
            if self._spoken:
                kind = Kind.REASONING if self.inside else Kind.ANSWER
            self._done.append(
                replace(self._part, text=self._text, kind=kind, supervised=self._spoken)
            )
        self._text = ""


@cache
def compile_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template that came with a tokenizer.

    Raises:
        DataError: there is none, it is not valid, or it breaks a rule; with the file.
    """
    source = tokenizer.own_template
    if source is None:
        raise DataError(
            f"tokenizer {tokenizer.spec}: no chat_template in tokenizer_config.json and no "
            "chat_template.jinja beside tokenizer.json; the shipped format needs none"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    # No strftime_now, which others give: a corpus must not depend on the day it was made.
    environment.globals |= {"raise_exception": _refuse, **dict(source.variables)}
    try:
        template = environment.from_string(source.text)
    except TemplateError as error:
        line = f", line {error.lineno}" if hasattr(error, "lineno") else ""
        raise DataError(f"{source.file}: chat template{line}: {first_line(error)}") from error
    tags = {THINK_OPEN, THINK_CLOSE}
    tokens = sorted(set(tokenizer.special_tokens) - tags, key=lambda token: (-len(token), token))
    made = ChatTemplate(template, re.compile("|".join(map(re.escape, tokens))))
    _check(made, source.file)
    return made


def _check(made: ChatTemplate, file: str) -> None:
    """Render an example, so that what can never work is refused before any row is read."""
    example = [
        Segment("ask", Role.USER, Kind.PROMPT, 0, False),
        Segment(THINK_OPEN, Role.ASSISTANT, Kind.MARKUP, 1, True),
        Segment("think", Role.ASSISTANT, Kind.REASONING, 1, True),
        Segment(THINK_CLOSE, Role.ASSISTANT, Kind.MARKUP, 1, True),
        Segment("say", Role.ASSISTANT, Kind.ANSWER, 1, True),
    ]
    found = made.segments(example)
    if isinstance(found, Rejected):
        raise DataError(f"{file}: chat template: {found.reason} ({found.detail}) of an example")
    spoken = [(part.kind, part.text.strip()) for part in found if part.supervised][:-1]
    if spoken != [(part.kind, part.text) for part in example[1:]]:
        what = ", ".join(f"{kind.name.lower()} {text!r}" for kind, text in spoken)
        raise DataError(
            f"{file}: chat template: reasoning must stand between think tags and the answer behind "
            f"them; of an example's it makes {what}"
        )


def _messages(parsed: Sequence[Segment], stand_in: dict[int, str]) -> list[dict[str, str]]:
    """The conversation as templates take it; parts by identity are replaced."""
    messages: list[dict[str, str]] = []
    last = -1
    for segment in parsed:
        if segment.turn != last:
            messages.append({"role": _ROLE_NAMES[segment.role], "content": ""})
            last = segment.turn
        if segment.kind != Kind.MARKUP or segment.text in (THINK_OPEN, THINK_CLOSE):
            messages[-1]["content"] += stand_in.get(id(segment), segment.text)
    return messages


def _needed(parts: Sequence[Segment], number: int) -> bool:
    """Whether a template may not leave a part out: all but reasoning of earlier turns."""
    part = parts[number]
    return part.kind != Kind.REASONING or part.turn == parts[-1].turn


def _placed(real: str, gaps: Sequence[str], parts: Sequence[Segment]) -> list[Segment] | None:
    """Parts with their text as rendered, or None where it is not what it was."""
    if not parts or not real.startswith(gaps[0]):
        return None
    position, placed = len(gaps[0]), []
    for number, (part, gap) in enumerate(zip(parts, gaps[1:], strict=True)):
        for text in _with_trimmed_ends(part.text):
            end = position + len(text)
            whole = number + 1 < len(parts) or len(real) == end + len(gap)
            if real.startswith(text, position) and real.startswith(gap, end) and whole:
                placed.append(replace(part, text=text))
                position = end + len(gap)
                break
        else:
            return None
    return placed


def _with_trimmed_ends(text: str) -> list[str]:
    """The text, and what templates make of it: white space or line ends off one end or both."""
    forms = [text]
    for white in (None, "\n"):
        forms += [text.lstrip(white), text.rstrip(white), text.strip(white)]
    return sorted(set(forms), key=len, reverse=True)


def _mismatch(detail: str) -> Rejected:
    return Rejected(RejectReason.TEMPLATE_MISMATCH, detail)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """What transformers gives templates in place of jinja's filter, which escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateRefusal(message)
