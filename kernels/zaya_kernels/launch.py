"""Launching Triton kernels: one configuration per architecture, and launches recorded for
compilation without a GPU.

Nothing here imports Triton, so that tables and records can be read where it is not installed.
"""

from __future__ import annotations

import contextlib
import os
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

ARCHITECTURES = ("gfx942", "gfx950", "sm_90")
"""MI300X, MI350X, H100 and H200: the rows of every configuration table."""

COMPUTE_UNITS = {"gfx942": 304, "gfx950": 256, "sm_90": 132}
"""Compute units (AMD) or multiprocessors (NVIDIA); kernels that walk over rows start a multiple."""

CHIPLETS = {"gfx942": 8, "gfx950": 8, "sm_90": 1}
"""Parts of a GPU with a cache of their own, to which programs are dealt in turn."""

INTERPRETED = "gfx942"
"""The configuration that the interpreter runs."""


@dataclass(frozen=True)
class Config:
    """How one kernel is launched on one architecture."""

    blocks: Mapping[str, int]
    """Values of the kernel's block-size constants."""
    num_warps: int = 4
    num_stages: int = 2
    matrix_instr_nonkdim: int = 16
    """AMD only: rows and columns of the matrix instruction."""
    kpack: int = 1
    """gfx942 only: 2 lays out operands in LDS for reads of 16 bytes to feed two instructions."""
    waves_per_eu: int = 0
    """AMD only: 0 lets the compiler choose."""
    programs_per_unit: int = 1
    """Programs per compute unit of a kernel whose programs walk over rows."""

    def programs(self, blocks: int, arch: str) -> int:
        """Programs to start for so many blocks of work; at least one."""
        return max(1, min(blocks, COMPUTE_UNITS[arch] * self.programs_per_unit))

    def options(self, arch: str) -> dict[str, int]:
        """Compiler options as Triton names them."""
        chosen = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if arch.startswith("gfx"):
            chosen["matrix_instr_nonkdim"] = self.matrix_instr_nonkdim
            chosen["waves_per_eu"] = self.waves_per_eu
        if arch == "gfx942":
            chosen["kpack"] = self.kpack
        return chosen


@dataclass(frozen=True)
class Launch:
    """One kernel launch that was recorded instead of run."""

    kernel: Any
    arch: str
    config: Config
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class _Recording:
    arch: str
    launches: list[Launch]


_recording: ContextVar[_Recording | None] = ContextVar("zaya_kernels_recording", default=None)


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Collect launches as made for `arch` instead of running them; for tensors on `meta`."""
    launches: list[Launch] = []
    token = _recording.set(_Recording(arch, launches))
    try:
        yield launches
    finally:
        _recording.reset(token)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def require_one_type(op: str, *tensors: Tensor | None) -> None:
    """ValueError naming the op where the tensors, whose products it makes, differ in type."""
    kinds = sorted({str(x.dtype).removeprefix("torch.") for x in tensors if x is not None})
    if len(kinds) > 1:
        raise ValueError(f"kernels.{op}: triton takes one type, not {' and '.join(kinds)}")


def require_triton(op: str, *tensors: Tensor | None) -> None:
    """ValueError naming the op where its Triton kernels cannot run on these tensors."""
    if _recording.get() is not None:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"kernels.{op}: triton takes fp32 and bf16, not {tensor.dtype}")
        if tensor.device.type != "cuda" and not interpreting():
            raise ValueError(
                f"kernels.{op}: triton needs a GPU, the tensors are on {tensor.device}; choose "
                "eager, or set TRITON_INTERPRET=1 to interpret the kernels (slow, for tests)"
            )


def architecture(device: torch.device) -> str:
    """Row of the configuration tables for a device; ValueError for a GPU that has none."""
    recorded = _recording.get()
    if recorded is not None:
        return recorded.arch
    if device.type != "cuda":
        return INTERPRETED
    return _architecture_of(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _architecture_of(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = str(properties.gcnArchName).split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    if name not in ARCHITECTURES:
        raise ValueError(
            f"no kernel configuration for {properties.name} ({name}); there are ones for "
            f"{', '.join(ARCHITECTURES)}"
        )
    return name


def launch(
    kernel: Any, grid: tuple[int, ...], config: Config, *arguments: Any, **constants: Any
) -> None:
    """Run `kernel` on `grid`, its block sizes and options taken from `config`, or record it."""
    keywords = {**constants, **config.blocks}
    recorded = _recording.get()
    if recorded is not None:
        recorded.launches.append(Launch(kernel, recorded.arch, config, grid, arguments, keywords))
        return
    device = next(a.device for a in arguments if isinstance(a, torch.Tensor))
    kernel[grid](*arguments, **keywords, **config.options(architecture(device)))


def tensors_of(bundle: Any) -> list[Tensor]:
    """The tensors among a dataclass's fields."""
    values = (getattr(bundle, item.name) for item in fields(bundle))
    return [value for value in values if isinstance(value, torch.Tensor)]
