"""Compile the registry for one architecture and print a JSON row per launch.

    python -m zaya_kernels.workshop.resources gfx942

A process of its own, because interpreting and compiling exclude each other in one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import triton

from zaya_kernels.workshop.assembly import hot_loop
from zaya_kernels.workshop.budgets import broken, share_lost
from zaya_kernels.workshop.compile import compile_launch
from zaya_kernels.workshop.mca import find_mca, score
from zaya_kernels.workshop.registry import launches

if TYPE_CHECKING:
    from zaya_kernels.launch import Launch


def row(case: str, launch: Launch, tool: str | None) -> dict[str, Any]:
    """What one launch compiles to, which of its budget it breaks, and its static score."""
    compiled = compile_launch(launch)
    found = compiled.resources
    result: dict[str, Any] = {
        "case": case,
        "kernel": compiled.kernel,
        "arch": compiled.arch,
        "blocks": dict(launch.config.blocks),
        "seconds": round(compiled.seconds, 1),
        "resources": asdict(found),
        "broken": broken(case, compiled.kernel, compiled.arch, found),
        "score": None,
    }
    if tool and found.loop is not None:
        cost = score(hot_loop(compiled.assembly), compiled.arch, tool)
        result["score"] = asdict(cost)
        result["broken"] += share_lost(compiled.kernel, cost.matrix_share)
    return result


def main(arch: str) -> int:
    """Rows to standard output."""
    tool = find_mca()
    # Some of Triton's switches are no part of its cache key, so nothing old is reused.
    with tempfile.TemporaryDirectory() as directory:
        triton.knobs.cache.dir = directory
        for case, launch in launches(arch):
            sys.stdout.write(json.dumps(row(case, launch, tool)) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
