"""Texts that the troubleshooting page quotes are said by the program."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.helpers.paths import REPOSITORY
from tests.helpers.shell_words import WrongCommandError, mentioned
from zaya_train.config.kinds import patterns

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
TORCHS = {"torch.OutOfMemoryError"}


@cache
def literals() -> tuple[str, ...]:
    """Every text of the package, with `...` for what is filled in."""
    found = []
    for path in sorted((REPOSITORY / "zaya_train").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in (node for node in nodes if id(node) not in docs):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.0-9]*[sdfgr]", "...", node.value))
    return tuple(" ".join(text.split()) for text in found)


def quoted(text: str) -> list[str]:
    """Code spans of the first column of the tables headed `it says` that are no commands, keys or
    columns' names."""
    found = []
    for row in re.findall(r"^\| (?!it says|---)(.*?) \| .* \| .* \|$", text, re.MULTILINE):
        spans = re.findall(r"`([^`]+)`", row)
        found += [span for span in spans if " " in span and not span.startswith(("zaya ", "scan"))]
        found += [span for span in spans if span in TORCHS]
    return found


def unsaid(text: str) -> list[str]:
    """Quotes of a page that no text of the package holds."""
    wrong = []
    for quote in quoted(text):
        parts = [part.strip() for part in quote.split("...") if part.strip()]
        pattern = re.compile(".*".join(map(re.escape, parts)))
        if quote not in TORCHS and not any(map(pattern.search, literals())):
            wrong.append(quote)
    return wrong


def test_quoted_errors_are_in_the_sources() -> None:
    text = PAGE.read_text()
    assert len(quoted(text)) >= 30
    assert unsaid(text) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("choose eager", "choose lazy"),
        ("crash loop: ...", "crash circle: ..."),
        ("rank ... hangs", "rank ... hung"),
    ],
)
def test_a_planted_text_is_found(old: str, new: str) -> None:
    text = PAGE.read_text()
    assert f"{old}" in text and len(unsaid(text.replace(old, new, 1))) == 1


def test_a_planted_command_is_found() -> None:
    with pytest.raises(WrongCommandError):
        mentioned("zaya preflight --levels full")


def test_keys_that_are_to_be_changed_exist() -> None:
    """Dotted keys of configuration sections, with or without a value."""
    sections = {pattern.split(".")[0] for pattern in patterns()} - {"plan"}
    known = {pattern.replace(".*", "") for pattern in patterns()}
    spans = re.findall(r"`([a-z_]+\.[a-z_.]+?)(?:=[^`]*)?`", PAGE.read_text())
    named = [span for span in spans if span.split(".")[0] in sections]
    files = (".jsonl", ".json", ".py", ".md", ".html")
    wrong = [n for n in named if n.rstrip(".") not in known and not n.endswith(files)]
    assert len(named) > 20 and wrong == []
