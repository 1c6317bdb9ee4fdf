from __future__ import annotations

import io
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from zaya_train.config.errors import DataError
from zaya_train.data.inspect import inspect_corpus

from .builders import CorpusFactory, problem, problems

if TYPE_CHECKING:
    from pathlib import Path


def shown(path: Path, index: int, budget: int | None = None) -> str:
    buffer = io.StringIO()
    console = Console(file=buffer, width=200, force_terminal=True, color_system="standard")
    inspect_corpus(path, index, budget, console)
    return buffer.getvalue()


def test_summary_histogram_and_sections(corpora: CorpusFactory) -> None:
    output = shown(corpora.chat("c", [*problems(9), [], problem("because [bold]x[/bold]")]), 9)
    for part in ("documents", "10", "no_messages 1", "document lengths", "reasoning"):
        assert part in output
    assert "because [bold]x[/bold]" in output
    # Yellow reasoning, green answer, magenta markup.
    assert "\x1b[33mbecause" in output and "\x1b[32m4" in output and "\x1b[35m<|end|>" in output


def test_budget_shows_what_is_cut(corpora: CorpusFactory) -> None:
    path = corpora.chat("c", [problem("abcdefghij")])
    output = shown(path, 0, budget=17)
    assert "budget 17: tail_cut, 17 of 21 tokens kept, 4 removed" in output
    assert "\x1b[33mabcdef\x1b[0m" in output
    assert "\x1b[9;31mghij\x1b[0m" in output


def test_hopeless_budget_says_rejected(corpora: CorpusFactory) -> None:
    output = shown(corpora.chat("c", [problem("abc")]), 0, budget=5)
    assert "rejected, answers_exceed_budget (11 tokens without reasoning, budget 5)" in output


@pytest.mark.parametrize("budget", [0, -5])
def test_a_budget_below_one_token_is_refused(corpora: CorpusFactory, budget: int) -> None:
    with pytest.raises(DataError, match=f"budget: {budget} tokens, at least 1 expected"):
        shown(corpora.chat("c", [problem("abc")]), 0, budget)


@pytest.mark.parametrize("index", [-1, 1])
def test_missing_document_is_named(corpora: CorpusFactory, index: int) -> None:
    with pytest.raises(DataError, match=f"document {index} of 1"):
        shown(corpora.text("t", ["abc"]), index)


def test_no_corpus_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"not a corpus directory: manifest.json .* `zaya data prepare` makes"
    ):
        shown(tmp_path, 0)


def test_the_corpora_inside_are_named(corpora: CorpusFactory) -> None:
    path = corpora.text("t", ["abc"])
    with pytest.raises(
        DataError, match=f"{path.parent}: not a corpus directory.* it holds .*{path}"
    ):
        shown(path.parent, 0)


def test_a_long_line_is_not_broken(corpora: CorpusFactory) -> None:
    assert "y" * 300 in shown(corpora.text("t", ["y" * 300]), 0)
