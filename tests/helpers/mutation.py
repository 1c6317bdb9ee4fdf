"""Kernels with a planted bug: the same source with one expression changed."""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
