"""Every command of the tutorial works, word for word and in order, in a new checkout, and its
output is what the page shows."""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from tests.helpers.pages import Block, blocks_of, name_of
from tests.helpers.tutorial import PAGES, Step, Walk, checkout, missing, steps_of

if TYPE_CHECKING:
    from pathlib import Path

IDS = [page.stem for page in PAGES]


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(checkout(tmp_path_factory.mktemp("tutorial") / "zaya-train"), is_long=False)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_page(page: Path, walk: Walk) -> None:
    assert not (faults := walk.up_to(page)), "\n".join(faults)


@pytest.fixture(scope="module")
def long_walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    return Walk(checkout(tmp_path_factory.mktemp("tutorial") / "zaya-train"), is_long=True)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_page_with_its_long_blocks(page: Path, long_walk: Walk) -> None:
    assert not (faults := long_walk.up_to(page)), "\n".join(faults)


def test_pages_are_numbered_linked_and_use_the_marks_they_explain() -> None:
    assert [int(page.stem[:2]) for page in PAGES] == list(range(1, len(PAGES) + 1))
    for page, following in pairwise(PAGES):
        assert f"({following.name})" in page.read_text().rsplit("Next:", 1)[-1]
    marks = {step.mark for page in PAGES for step in steps_of(page.read_text(), page.name)}
    assert marks == {"", "takes", "needs"}
    for page in PAGES:
        odd = [b for b in blocks_of(page.read_text()) if b.language not in ("bash", "text")]
        assert [block for block in odd if block.language != "{toctree}"] == [], name_of(page)
        for block in blocks_of(page.read_text()):
            assert not re.match(r"#\s*(takes|needs)(?!: \S)", block.text)


def test_shown_output_is_compared() -> None:
    output = "a   1.5 s\n| loss | 3.2 |\nend\n"
    assert missing("a ... s\n| loss | ... |", output) is None
    assert missing("| loss | 3.2 |\nend", output) is None
    assert missing("| loss | 3.3 |", output) == "| loss | 3.3 |"
    assert missing("end ... loss", output) == "loss"
    assert missing("loss | 3", output) == "loss | 3" and missing("loss | 3...", output) is None
    assert missing(".5 s", output) == ".5 s" and missing("a ....5 s", output) is None
    assert missing("a ... s ... start", output) == "start"


@pytest.mark.parametrize(
    ("text", "shown", "fault"),
    [
        ("zaya --version\n", "0.0.0\n", "lacks '0.0.0'"),
        ("zaya nothing\n", None, "exit code 2"),
        ("false\ntrue\n", None, "exit code 1"),
        ("echo x | grep y | cat\n", None, "exit code 1"),
    ],
)
def test_a_planted_fault_is_found(text: str, shown: str | None, fault: str, tmp_path: Path) -> None:
    walk = Walk(checkout(tmp_path / "checkout"), is_long=False)
    found = walk.take(Step(Block("page", 1, "bash", text), shown))
    assert found is not None and fault in found


def test_a_checkout_is_set_up_and_never_installs_into_the_running_environment(
    tmp_path: Path,
) -> None:
    root = checkout(tmp_path / "checkout")
    asked = subprocess.run(
        ["make", "--dry-run", "setup"], cwd=root, check=True, capture_output=True, text=True
    )
    assert ".ci/setup" not in asked.stdout
    (root / ".venv" / ".ready").unlink()
    asked = subprocess.run(
        ["make", "--dry-run", "setup"], cwd=root, check=True, capture_output=True, text=True
    )
    assert ".ci/setup" in asked.stdout
    own = subprocess.run(
        [str(root / ".venv/bin/python"), "-c", "import sys, torch; print(sys.prefix)"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert own.stdout.strip() == str(root / ".venv")
