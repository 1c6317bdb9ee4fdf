"""Timings of back ends as rows of one tracked table."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import platform
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zaya_train.config.errors import DataError
from zaya_train.runtime.device import describe
from zaya_train.runtime.files import write_text
from zaya_train.tools.kernels import installed_triton
from zaya_train.tools.revision import revision

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@dataclass(frozen=True)
class Setting:
    """Where and with what was timed; the same for all rows of one command."""

    device: str
    arch: str
    torch: str
    triton: str
    driver: str
    """Of the GPU; of a CPU the operating system's release."""
    commit: str
    dirty: bool
    date: str


def setting_of(device: torch.device, date: str) -> Setting:
    """Of this process; date: as 2026-11-22."""
    here = revision()
    return Setting(
        device=describe(device).name,
        arch=_architecture(device),
        torch=torch.__version__,
        triton=installed_triton(),
        driver=_driver(device),
        commit=here.commit[:12],
        dirty=here.dirty,
        date=date,
    )


@dataclass(frozen=True)
class Result:
    """One pass of one back end; `share` is of what the device's measured rates allow."""

    op: str
    direction: str
    """forward, backward or both; a loss may make its gradients in the forward pass."""
    backend: str
    shape: str
    dtype: str
    rounds: int
    ms_median: float
    ms_low: float
    ms_high: float
    gb_per_second: float
    tflops: float
    share: float
    copy_gb_per_second: float
    gemm_tflops: float


COLUMNS = tuple(
    item.name.replace("direction", "pass") for kind in (Setting, Result) for item in fields(kind)
)


def append(path: Path, setting: Setting, results: Sequence[Result]) -> None:
    """Add rows behind those of the file, or make it.

    Raises:
        DataError: the file has another header.
        StorageError: it cannot be written; then it is as it was.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for result in results:
        writer.writerow([_cell(v) for v in (*asdict(setting).values(), *asdict(result).values())])
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        before = _text(path) or ",".join(COLUMNS) + "\n"
        write_text(path, before + text.getvalue())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two commands at once must not write over each other's rows."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def check_table(path: Path) -> None:
    """DataError where `append` would refuse the file."""
    _text(path)


def read(path: Path) -> list[dict[str, str]]:
    """Rows by column."""
    return list(csv.DictReader(io.StringIO(_text(path))))


def _text(path: Path) -> str:
    """Of a file with our header and whole lines; empty where there is none."""
    if not path.exists():
        return ""
    text = path.read_text(encoding="utf-8")
    header = next(csv.reader(io.StringIO(text)), [])
    if text and tuple(header) != COLUMNS:
        names = sorted(set(header) ^ set(COLUMNS))
        which = f"differs in {', '.join(names)}" if names else "has another order"
        raise DataError(f"{path}: not a table of kernel timings: its header {which}")
    for number, row in enumerate(csv.reader(io.StringIO(text)), start=1):
        if len(row) != len(COLUMNS):
            raise DataError(f"{path}:{number}: {len(row)} cells, the header has {len(COLUMNS)}")
    return text if not text or text.endswith("\n") else text + "\n"


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _architecture(device: torch.device) -> str:
    if device.type != "cuda":
        return platform.machine()
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _driver(device: torch.device) -> str:
    if device.type != "cuda":
        return platform.release()
    kind = "amdgpu" if torch.version.hip else "nvidia"
    version = Path("/sys/module", kind, "version")
    if version.is_file():
        return version.read_text(encoding="utf-8").strip()
    return f"{kind} of {platform.release()}"


def slug(name: str) -> str:
    """A device's name as part of a file's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
