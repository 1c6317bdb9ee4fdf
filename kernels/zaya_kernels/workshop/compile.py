"""Compiling recorded launches for AMD and NVIDIA GPUs that are not there.

Types, constants and attributes (divisibility, 32-bit pointer ranges) come from Triton's own binder,
so the code is what a launch with these arguments would run.
"""

from __future__ import annotations

import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from zaya_kernels.workshop.assembly import Resources, amd_resources, nvidia_resources

if TYPE_CHECKING:
    from zaya_kernels.launch import Launch

TARGETS = {
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
    "sm_90": GPUTarget("cuda", 90, 32),
}


@dataclass(frozen=True)
class Compiled:
    """One launch compiled for its architecture."""

    kernel: str
    arch: str
    seconds: float
    resources: Resources
    assembly: str
    """AMD assembly or PTX."""


def compile_launch(launch: Launch) -> Compiled:
    """Compile one recorded launch; RuntimeError where Triton interprets instead."""
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError("compiling needs a process without TRITON_INTERPRET=1")
    target = TARGETS[launch.arch]
    started = time.monotonic()
    compiled = triton.compile(*_source(launch, target))
    seconds = time.monotonic() - started
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        resources = amd_resources(text, shared, warps, launch.arch)
    else:
        text = compiled.asm["ptx"]
        resources = nvidia_resources(_usage(compiled.asm["cubin"]), shared, warps)
    return Compiled(launch.name, launch.arch, seconds, resources, text)


def _source(launch: Launch, target: GPUTarget) -> tuple[Any, GPUTarget, dict[str, Any]]:
    kernel, backend = launch.kernel, make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**launch.keywords, **launch.config.options(launch.arch)}
    bound, specialization, extra = binder(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(
        backend, keywords, bound, specialization, extra
    )
    return ASTSource(kernel, signature, constants, attributes), target, options.__dict__


def _usage(cubin: bytes) -> str:
    """Registers, stack and local memory as cuobjdump (part of the Triton wheel) lists them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
    return done.stdout
