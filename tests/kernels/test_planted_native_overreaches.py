"""A C function that reads or writes behind a tensor, though its values may be right, dies on the
guard pages of `test_native_memory`."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ..helpers.native_mutation import Bug, Builds, exported
from .test_native_memory import GUARDED_OPERATIONS

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.nightly

USE = """
import ctypes
from zaya_kernels.native import library
planted = ctypes.CDLL({path!r})
library._load = lambda: planted
"""

OVERREACHES = {
    "zaya_cca": ("i = -s->halo; i < count; i++", "i = -s->halo; i <= count; i++"),
    "zaya_experts": (
        "i + LANES <= width; i += LANES) {\n        vec g = load(hidden, type, i);\n        store",
        "i < width; i += LANES) {\n        vec g = load(hidden, type, i);\n        store",
    ),
    "zaya_loss": ("i + LANES <= classes; i += LANES)", "i < classes; i += LANES)"),
    "zaya_norm_residual": (
        "store_few(normed, k.normed, first + c, left",
        "store_few(normed, k.normed, first + c, LANES",
    ),
}  # fmt: skip


@pytest.mark.parametrize("function", OVERREACHES)
def test_an_overreach_is_caught(function: str, tmp_path: Path) -> None:
    old, new = OVERREACHES[function]
    name = exported()[function]
    found = Builds(tmp_path).planted(name, Bug(old, new, "guard pages"))
    used_there = USE.format(path=found._name) + GUARDED_OPERATIONS
    done = subprocess.run([sys.executable, "-c", used_there], capture_output=True, text=True)
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr
