"""The library in C with a planted bug: the same sources with one text changed."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import contextmanager
from ctypes import CDLL
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
from zaya_kernels.native import library

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_DEFINED = re.compile(r"^void (zaya_\w+)\(", re.MULTILINE)


def exported() -> dict[str, str]:
    """The file of every function that Python may call."""
    return {
        name: path.name
        for path in sorted(library.SOURCES.glob("*.c"))
        for name in _DEFINED.findall(path.read_text())
    }


@dataclass(frozen=True)
class Bug:
    """`old`, found `times` times in the file of the function it is planted in, made `new`."""

    old: str
    new: str
    check: str
    needs: str = ""
    """A macro of the compiler without which the code is not compiled."""
    times: int = 1


@dataclass
class Builds:
    """Libraries in a folder of their own, right or with a bug; quick to compile, slow to run."""

    directory: Path
    cc: tuple[str, ...] = field(default_factory=library.compiler)
    flags: tuple[str, ...] = tuple("-O0" if x == "-O3" else x for x in library.FLAGS)
    numbers: Iterator[int] = field(default_factory=count)

    @cached_property
    def macros(self) -> set[str]:
        """Names that the compiler defines for this processor."""
        told = subprocess.run(
            [*self.cc, *self.flags, "-dM", "-E", "-x", "c", "/dev/null"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        return {line.split()[1] for line in told.stdout.splitlines()}

    @cached_property
    def objects(self) -> dict[str, Path]:
        """Every source compiled as it is."""
        made = {
            path.name: self.directory / f"{path.stem}.o" for path in library.SOURCES.glob("*.c")
        }
        for name, target in made.items():
            self._compile(name, (library.SOURCES / name).read_text(), target, ("-c",))
        return made

    @cached_property
    def right(self) -> CDLL:
        """The library without a bug."""
        target = self.directory / "right.so"
        name = next(iter(self.objects))
        self._link(name, (library.SOURCES / name).read_text(), target)
        return CDLL(str(target))

    def planted(self, name: str, bug: Bug) -> CDLL:
        """The library with a bug in one file."""
        source = (library.SOURCES / name).read_text()
        assert source.count(bug.old) == bug.times, f"{name} does not hold {bug.old!r} so often"
        # A library of a name that was loaded before would not be loaded again.
        target = self.directory / f"planted_{next(self.numbers)}.so"
        self._link(name, source.replace(bug.old, bug.new), target)
        return CDLL(str(target))

    def _link(self, name: str, source: str, target: Path) -> None:
        others = [str(path) for other, path in self.objects.items() if other != name]
        self._compile(name, source, target, others)

    def _compile(self, name: str, source: str, target: Path, more: Sequence[str]) -> None:
        sources = self.directory / "sources"
        shutil.rmtree(sources, ignore_errors=True)
        sources.mkdir()
        for header in library.SOURCES.glob("*.h"):
            shutil.copy(header, sources)
        (sources / name).write_text(source)
        flags = [x for x in self.flags if x != "-shared" or "-c" not in more]
        library.build(target, self.cc, sources, [*flags, *more])


class _Mixed:
    """One function of one library, all others of another."""

    def __init__(self, function: str, planted: CDLL, right: CDLL) -> None:
        self.function, self.planted, self.right = function, planted, right

    def __getattr__(self, name: str) -> Any:
        return getattr(self.planted if name == self.function else self.right, name)


@contextmanager
def used(found: Any) -> Iterator[None]:
    """The back ends call this library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_load", lambda: found)
        yield


@contextmanager
def planted(function: str, bug: Bug, builds: Builds) -> Iterator[None]:
    """The bug is in this function and in no other, whatever code they share."""
    found = builds.planted(exported()[function], bug)
    with used(_Mixed(function, found, builds.right)):
        yield
