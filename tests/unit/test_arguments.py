"""The command line as a newcomer meets it: help for every word, and options wherever they stand."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

import pytest

from zaya_train import main as program

from ..helpers.paths import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """All that take arguments, below the first one."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def test_every_argument_says_what_it_is() -> None:
    found = list(parsers(program._parser()))
    assert len(found) > 30
    silent = [
        f"{parser.prog} {'/'.join(action.option_strings) or action.dest}"
        for parser in found
        for action in parser._actions
        if not action.help and not isinstance(action, argparse._SubParsersAction)
    ]
    assert silent == []
    assert not [parser.prog for parser in found if "(default: [])" in parser.format_help()]


def test_help_names_pages_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        program.main(["--help"])
    pages = re.findall(r"[\w/]+\.md", capsys.readouterr().out)
    assert {"README.md", "docs/index.md", "docs/troubleshooting.md"} < set(pages)
    assert [page for page in pages if not (REPOSITORY / page).is_file()] == []


@pytest.mark.parametrize("words", [[], ["data"], ["data", "ledger"], ["checkpoint"]])
def test_a_bare_command_lists_what_it_has(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        program.main(words)
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert "positional arguments" in said and len(said.splitlines()) > 6


def test_options_may_stand_between_overrides() -> None:
    words = ["plan", "recipe=smoke_cpu", "--memory-gb", "24", "parallel.recompute=full"]
    options: Any = program._parsed([*words, "--ranks", "2", "run.seed=1"])
    assert options.overrides == ["recipe=smoke_cpu", "parallel.recompute=full", "run.seed=1"]
    assert (options.memory_gb, options.ranks) == (24.0, 2)
    options = program._parsed(["submit", "recipe=smoke_cpu", "--dry-run", "nodes=2"])
    assert options.words == ["recipe=smoke_cpu", "nodes=2"]


@pytest.mark.parametrize(
    "words",
    [
        ["plan", "recipe=smoke_cpu", "--rank", "2"],
        ["plan", "recipe=smoke_cpu", "--ranks", "2", "phases"],
        ["report", "runs/a", "--output", "b", "x=y"],
        ["supervise", "recipe=smoke_cpu", "--ranks", "2", "--x=y"],
    ],
)
def test_what_is_no_override_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program._parsed(words)
    assert "unrecognized arguments" in capsys.readouterr().err
