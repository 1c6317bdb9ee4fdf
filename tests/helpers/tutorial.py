"""The tutorial, walked through: every block in order in a new checkout, outputs compared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.pages import Block, blocks_of, name_of
from tests.helpers.paths import REPOSITORY

PAGES = sorted((REPOSITORY / "docs" / "tutorial").glob("0*.md"))
_LONGEST_SECONDS = 1800
_STAMP = ".ready"
_LINKED = ("zaya_train", "kernels", "launch", "tests", "docs", ".ci", "docker", "README.md")
_COPIED = ("configs", "Makefile", "pyproject.toml")


@dataclass(frozen=True)
class Step:
    """A shell block, and the output shown below it, if any."""

    block: Block
    shown: str | None

    @property
    def mark(self) -> str:
        """`takes`, `needs` or nothing."""
        found = re.match(r"# (takes|needs): \S", self.block.text)
        return found[1] if found else ""


def steps_of(text: str, page: str) -> list[Step]:
    """The shell blocks of a page; output is a block of `text` right behind one."""
    blocks = blocks_of(text, page)
    return [
        Step(block, follower.text if follower and follower.language == "text" else None)
        for block, follower in zip(blocks, [*blocks[1:], None], strict=True)
        if block.language == "bash"
    ]


def missing(shown: str, output: str) -> str | None:
    """The first words of `shown` that the output lacks, None where it has them all in order:
    anything where `...` stands, any white space between words. Pieces are looked for
    one behind the other, so the time is linear."""
    pieces, position = shown.split("..."), 0
    for i, piece in enumerate(pieces):
        words = piece.split()
        if not words:
            continue
        # A number that is not cut off by `...` is whole: 75 is no 7, and 11,901 no 1,901.
        starts = r"(?<![\w,.])" if i == 0 or piece[0].isspace() else ""
        ends = r"(?![\w,]|\.\d)" if i + 1 == len(pieces) or piece[-1].isspace() else ""
        pattern = starts + r"\s+".join(map(re.escape, words)) + ends
        found = re.compile(pattern).search(output, position)
        if found is None:
            return " ".join(words)
        position = found.end()
    return None


def checkout(root: Path) -> Path:
    """A working folder as `git clone` and `make setup` leave it: code by links, what a reader adds
    files to as copies.

    Its environment has a stamp of its own, newer than all that make looks at: `make setup` would
    install this short-lived folder into the environment that runs the tests.
    """
    root.mkdir(parents=True)
    for name in _LINKED:
        (root / name).symlink_to(REPOSITORY / name)
    for name in _COPIED:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, root / name)
    environment = root / ".venv"
    environment.mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name != _STAMP:
            (environment / path.name).symlink_to(path)
    (environment / _STAMP).touch()
    return root


@dataclass
class Walk:
    """A folder in which pages have been walked through, up to some page."""

    root: Path
    is_long: bool
    done: dict[str, list[str]] = field(default_factory=dict)
    """Page -> what went wrong."""

    def up_to(self, page: Path) -> list[str]:
        """Walk all pages not walked yet, up to this one; what went wrong on it."""
        for other in PAGES[: PAGES.index(page) + 1]:
            if name_of(other) not in self.done:
                self.done[name_of(other)] = self._page(other)
        return self.done[name_of(page)]

    def _page(self, page: Path) -> list[str]:
        faults = []
        for step in steps_of(page.read_text(), name_of(page)):
            if step.mark == "needs" or (step.mark == "takes" and not self.is_long):
                continue
            if fault := self.take(step):
                faults.append(f"{step.block.place}: {fault}")
        return faults

    def take(self, step: Step) -> str | None:
        """Run one block; what was wrong with it."""
        done = subprocess.run(
            ["bash", "-eo", "pipefail", "-c", step.block.text],
            cwd=self.root, env=self._environment(), timeout=_LONGEST_SECONDS, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if done.returncode != 0:
            return f"exit code {done.returncode}:\n{done.stdout[-2000:]}"
        if step.shown is not None and (lacks := missing(step.shown, done.stdout)):
            return f"the output lacks {lacks!r}:\n{done.stdout[-4000:]}"
        return None

    def _environment(self) -> dict[str, str]:
        paths = [str(self.root / ".venv" / "bin"), os.environ["PATH"]]
        code = f"{self.root}{os.pathsep}{self.root / 'kernels'}"
        own = {"PATH": os.pathsep.join(paths), "PYTHONPATH": code, "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own, "COLUMNS": "80", "WANDB_MODE": "offline"}
