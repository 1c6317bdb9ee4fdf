"""`zaya kernels verify`: what can be known of the Triton kernels without the GPU they are for.

Two rungs, each in processes of its own: the interpreter's numerics and memory checks; and the
resources of the code compiled for gfx942, gfx950 and sm_90, against their budgets and the golden
file of this Triton version. Static loop scores need llvm-mca of LLVM 22 (`llvm-mca-22` on the path,
or $LLVM_MCA).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from rich.table import Table
from zaya_kernels.launch import ARCHITECTURES
from zaya_kernels.workshop import table as pages
from zaya_kernels.workshop.mca import find_mca

from zaya_train.config.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

MAX_SCORE_LOSS = 0.05
"""A hot loop's static clocks may grow, and its share of the matrix unit fall, by so much before it
counts as a change for the worse."""


@dataclass(frozen=True)
class VerifyRequest:
    """What to verify; `write` replaces the golden file and the table of this page."""

    architectures: tuple[str, ...] = ARCHITECTURES
    numerics: bool = True
    write: Path | None = None


def installed_triton() -> str:
    """Version of the installed Triton, ROCm's included; empty without one."""
    for package in ("triton", "triton-rocm", "pytorch-triton-rocm"):
        try:
            return metadata.version(package).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    return ""


def triton_version() -> str:
    """The same; ConfigError without one."""
    if version := installed_triton():
        return version
    raise ConfigError("zaya kernels: triton is not installed; pip install 'zaya-train[triton]'")


def verify(request: VerifyRequest, console: Console) -> int:
    """Run both rungs and print their tables; 0 if nothing is wrong, else 1."""
    version = triton_version()
    if request.write and not find_mca():
        raise ConfigError("zaya kernels verify --write: needs llvm-mca-22 on PATH or $LLVM_MCA")
    problems: list[str] = []
    if request.numerics:
        rows = _rows("numerics", interpret=True)
        problems += _show_numerics(rows, console)
    compiled = [row for arch in request.architectures for row in _rows("resources", arch)]
    problems += [
        f"{row['case']} {row['kernel']} {row['arch']}: {text}"
        for row in compiled
        for text in row["broken"]
    ]
    _show_resources(compiled, console)
    golden = pages.golden_path(version)
    if request.write:
        pages.write_golden(golden, compiled)
        text = request.write.read_text(encoding="utf-8")
        page = pages.replace_table(text, pages.markdown(pages.golden_rows(compiled)))
        request.write.write_text(page, encoding="utf-8")
    elif golden.is_file():
        problems += changes(compiled, pages.read_golden(golden))
    else:
        console.print(f"no golden file for Triton {version}: resources are not compared")
    if not find_mca():
        console.print("llvm-mca 22 not found: no static scores")
    for problem in problems:
        console.print(f"[red]{problem}[/red]", highlight=False)
    console.print(f"Triton {version}: {len(problems)} problems")
    return 1 if problems else 0


def changes(found: list[dict[str, Any]], golden: list[dict[str, Any]]) -> list[str]:
    """Kernels that differ from the golden file, or whose static score is worse by 5 %."""
    known = {(row["case"], row["kernel"], row["arch"]): row for row in golden}
    problems = []
    for row in found:
        key = (row["case"], row["kernel"], row["arch"])
        name, expected = " ".join(key), known.get(key)
        if expected is None:
            problems.append(f"{name}: not in the golden file")
            continue
        if row["resources"] != expected["resources"] or row["blocks"] != expected["blocks"]:
            problems.append(f"{name}: resources differ from the golden file")
        if row["score"] and expected["score"]:
            now, then = row["score"]["clocks"], expected["score"]["clocks"]
            if now > then * (1 + MAX_SCORE_LOSS):
                problems.append(f"{name}: {now} static clocks, {then} in the golden file")
            now, then = row["score"]["matrix_share"], expected["score"]["matrix_share"]
            if now < then * (1 - MAX_SCORE_LOSS):
                problems.append(f"{name}: matrix share {now:.1%}, {then:.1%} in the golden file")
    return problems


def _rows(module: str, *arguments: str, interpret: bool = False) -> list[dict[str, Any]]:
    """JSON rows that a module of the workshop prints."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", f"zaya_kernels.workshop.{module}", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"zaya kernels: {module} {' '.join(arguments)} failed: {last}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _show_numerics(rows: list[dict[str, Any]], console: Console) -> list[str]:
    shown = Table("op", "dtype", "worst", "error", "eager's", title="interpreted, against float64")
    for row in rows:
        numbers = [f"{row[key]:.1e}" if key in row else "" for key in ("error", "eager_error")]
        shown.add_row(row["op"], row["dtype"], row["worst"] or "fault", *numbers)
    console.print(shown)
    return [f"{row['op']} {row['dtype']}: {fault}" for row in rows for fault in row["faults"]]


def _show_resources(rows: list[dict[str, Any]], console: Console) -> None:
    shown = Table(*pages.HEAD, title="compiled; counts of one wave's hot loop")
    for row in rows:
        shown.add_row(*pages.cells(row), style="red" if row["broken"] else None)
    console.print(shown)
