"""Kernels with a planted bug: the same source with one expression changed."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from types import ModuleType


def mutated(module: ModuleType, old: str, new: str, directory: Path) -> Any:
    """`module` loaded again from its source with `old`, which must be there, made `new`."""
    assert module.__file__ is not None
    with open(module.__file__, encoding="utf-8") as file:
        source = file.read()
    assert old in source, f"{module.__name__} no longer holds {old!r}"
    path = directory / "mutated.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutated", path)
    assert spec is not None and spec.loader is not None
    loaded = sys.modules["mutated"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def plant(
    change: tuple[str, str],
    kernels: ModuleType,
    places: tuple[ModuleType, Iterable[str]],
    directory: Path,
    patch: pytest.MonkeyPatch,
) -> None:
    """Let the host side use kernels of `kernels` with one expression changed: `places` are the
    module that launches them and their names there. All others are right, so that what is caught is
    a bug of those named."""
    planted = mutated(kernels, *change, directory)
    host, names = places
    for name in names:
        patch.setattr(host, name, getattr(planted, name))


def assert_caught(check: Callable[[], None]) -> None:
    """The comparison fails, or the interpreter refuses an access."""
    # Not at the top: the helpers are imported where Triton is not installed, too.
    from triton.runtime.errors import InterpreterError

    with pytest.raises((InterpreterError, AssertionError)):
        check()


def of_kernels(bugs: Mapping[str, Iterable[str]], *, nightly: bool = False) -> pytest.MarkDecorator:
    """Parameters `kernel` and `bug`: all with every change, or the first of each kernel, the others
    at night."""
    return pytest.mark.parametrize(
        ("kernel", "bug"),
        [
            pytest.param(kernel, bug, marks=[pytest.mark.nightly] if nightly and i else [])
            for kernel, planted in bugs.items()
            for i, bug in enumerate(planted)
        ],
    )


def planted_often(test: Any) -> set[str]:
    """Kernels that a test of `of_kernels` plants a bug in with every change."""
    marks = [mark for mark in test.pytestmark if mark.args[:1] == (("kernel", "bug"),)]
    return {str(p.values[0]) for mark in marks for p in mark.args[1] if not p.marks}


def shrink(
    tables: dict[str, dict[str, Any]],
    arch: str,
    sizes: Mapping[str, int],
    patch: pytest.MonkeyPatch,
) -> None:
    """Let every kernel of a configuration table take blocks of these sizes on `arch`."""
    for name, table in tables.items():
        kept = {key: sizes[key] for key in table[arch].blocks}
        patch.setitem(tables, name, {**table, arch: replace(table[arch], blocks=kept)})
