"""The Markdown pages of the project, taken apart: code blocks, code spans and links by line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from markdown_it import MarkdownIt

from tests.helpers.paths import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

HISTORY = ("CHANGELOG.md", "docs/lab-log.md")
"""Records of what was: they name files and keys of their day."""
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """One code block: fenced ones by their language, indented ones as `indented`."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


def pages(history: bool = False) -> list[Path]:
    """README, CONTRIBUTING and all of docs/, those of HISTORY only if asked for."""
    found = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]
    found += sorted((REPOSITORY / "docs").rglob("*.md"))
    return [page for page in found if history or name_of(page) not in HISTORY]


def name_of(page: Path) -> str:
    """Path from the repository's root."""
    return page.relative_to(REPOSITORY).as_posix()


def blocks_of(text: str, page: str = "page") -> list[Block]:
    """Every code block in order, also those inside list items."""
    found = []
    for token in _parser().parse(text):
        if token.type in ("fence", "code_block"):
            language = (token.info.split() or [""])[0] if token.type == "fence" else "indented"
            line = (token.map or [0])[0] + 1
            found.append(Block(page, line, language, token.content))
    return found


def spans_of(text: str) -> Iterator[tuple[int, str]]:
    """(first line of its paragraph, text) of every code span."""
    for token in _parser().parse(text):
        for child in token.children or []:
            if child.type == "code_inline":
                yield (token.map or [0])[0] + 1, child.content


def links_of(text: str) -> Iterator[tuple[int, str]]:
    """(line of its paragraph, target) of every link and image."""
    for token in _parser().parse(text):
        if token.type == "inline":
            for target in _LINK.findall(token.content):
                yield (token.map or [0])[0] + 1, target


@cache
def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark").enable("table")
