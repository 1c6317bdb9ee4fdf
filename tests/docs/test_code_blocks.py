"""Every command in the pages is one that the program takes: words by the real parser, overrides by
Hydra, targets, scripts and imports by name. The tutorial's are run as well (test_tutorial.py)."""

from __future__ import annotations

import ast
import importlib
import re

import pytest
import yaml

from tests.helpers.pages import Block, blocks_of, name_of, pages, spans_of
from tests.helpers.shell_words import WrongCommandError, commands_of, hold, mentioned
from zaya_train.config.errors import ConfigError

BLOCKS = [block for page in pages() for block in blocks_of(page.read_text(), name_of(page))]
_LEFT_OUT = re.compile(r"# (takes|needs): ")
SHELL = [
    block
    for block in BLOCKS
    if block.language == "bash"
    # What test_tutorial.py runs stands on its own, and on files the reader has written by then.
    and (not block.page.startswith("docs/tutorial/") or _LEFT_OUT.match(block.text))
]
LANGUAGES = {"bash", "python", "yaml", "indented", "", "text", "json", "{toctree}", "math"}


def faults_of(block: Block) -> list[str]:
    """What the program says to the commands of a shell block."""
    found = []
    for words in commands_of(block.text):
        try:
            hold(words)
        except (WrongCommandError, ConfigError) as error:
            found.append(f"{block.place}: {' '.join(words)}: {error}")
    return found


@pytest.mark.parametrize("page", sorted({block.page for block in SHELL}))
def test_commands_of_shell_blocks(page: str) -> None:
    faults = [fault for block in SHELL if block.page == page for fault in faults_of(block)]
    assert faults == []


def test_no_command_hides_in_a_block_of_another_kind() -> None:
    """Indented blocks and blocks without a language hold output, trees and synopses only."""
    assert {block.language for block in BLOCKS} <= LANGUAGES
    hidden = []
    for block in (b for b in BLOCKS if b.language in ("indented", "", "text")):
        for line in block.text.splitlines():
            if re.match(r"(\$ )?(torchrun|launch/|python|\.venv/|make |source )", line):
                hidden.append(f"{block.place}: {line}")
    assert hidden == []


def mentions() -> list[tuple[str, str]]:
    """(place, text) of `zaya ...` in running text, synopses and shown output."""
    found = []
    for page in pages():
        text = page.read_text()
        found += [(f"{name_of(page)}:{line}", span) for line, span in spans_of(text)]
    for block in (b for b in BLOCKS if b.language in ("indented", "", "text")):
        found += [(block.place, line.removeprefix("$ ")) for line in block.text.splitlines()]
    return [(place, text) for place, text in found if re.match(r"zaya [a-z]", text)]


def test_commands_mentioned_in_the_text() -> None:
    faults = []
    for place, text in mentions():
        try:
            mentioned(text)
        except WrongCommandError as error:
            faults.append(f"{place}: {text}: {error}")
    assert faults == []


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: b.place
)
def test_yaml_blocks_parse(block: Block) -> None:
    assert isinstance(yaml.safe_load(block.text), dict)


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: b.place
)
def test_python_blocks_import_what_is_there(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


PLANTED = {
    "a flag that is not there": "zaya plan recipe=zaya1_8b --rank 8",
    "a key that is not there": "zaya train recipe=smoke_cpu optim.muon.rate=1",
    "a value of the wrong type": "zaya train recipe=smoke_cpu run.seed=many",
    "a choice that is not there": "zaya doctor recipe=smoke_cpu kernels.cca=fast",
    "a recipe that is not there": "zaya submit recipe=zaya1_9b nodes=2",
    "a key of the submission that is not there": "zaya submit recipe=zaya1_8b nodes=2 node=1",
    "ranks that break a rule": "zaya plan recipe=zaya1_8b --ranks 12",
    "a node's ranks that break a rule": "launch/torchrun.sh recipe=zaya1_300m",
    "torchrun's ranks that break a rule": "torchrun --nproc-per-node 12 -m zaya_train "
    "train recipe=zaya1_8b",
    "a submission whose ranks break a rule": "zaya submit recipe=zaya1_8b nodes=3",
    "a command that is not there": "zaya data tokenise --input x",
    "an argument left out": "zaya export-hf runs/mine",
    "a wrong word behind torchrun": "torchrun --nproc-per-node 8 -m zaya_train trian recipe=x",
    "a wrong word behind the launcher": "launch/torchrun.sh recipe=zaya1_300m run.dirr=x",
    "a target that is not there": "make tests",
    "a script that is not there": ".venv/bin/python kernels/bench/no.py",
    "a flag that a script does not have": "python -m tests.bench.packing --turns 3",
    "an unknown program": "zayaa plan",
    "the second command of a line": "source x && zaya plann",
    "a command behind a here-document": "cat > x <<'END'\nzaya nothing\nEND\nzaya nothing",
    "a continued line": "zaya train recipe=smoke_cpu \\\n    run.nothing=1",
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_found(fault: str) -> None:
    assert len(faults_of(Block("page", 1, "bash", PLANTED[fault]))) == 1


@pytest.mark.parametrize(
    "text",
    ["zaya plans recipe=x", "zaya data prepar", "zaya report RUN --out x", "zaya train --cfgs"],
)
def test_a_planted_mention_is_found(text: str) -> None:
    with pytest.raises(WrongCommandError):
        mentioned(text)
