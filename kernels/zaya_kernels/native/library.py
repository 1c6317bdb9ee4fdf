"""The operations in C of the back end `native`: compiled at first use, for the machine at hand.

One shared library of all `.c` files of this folder, kept under a name that follows from their text,
the compiler, the processor and the C library, so that a home directory shared by unlike machines
holds one each.
Its threads are OpenMP's, those of torch where torch's libgomp is the compiler's.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from zaya_train.config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCES = Path(__file__).parent
FLAGS = (
    "-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC", "-fopenmp",
    # Nobody reads errno or traps. No fast-math: it takes NaN and infinities for impossible, and
    # linked with it a library makes the whole process flush denormals (GCC before 13).
    "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
)  # fmt: skip
TYPES = {torch.float32: 0, torch.bfloat16: 1}
"""As FP32 and BF16 in vectors.h."""


def compiler() -> tuple[str, ...]:
    """$CC with its options, or the first C compiler found; ConfigError without one."""
    named = shlex.split(os.environ.get("CC", ""))
    for name, *options in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if found := shutil.which(name):
            return found, *options
    raise ConfigError(
        f"kernels: native needs a C compiler, and {named[0] if named else 'cc, gcc or clang'} is "
        "not in PATH; install one, name it in CC, or choose eager"
    )


def folder() -> Path:
    """Where compiled libraries are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "zaya-train"
    except RuntimeError:
        raise ConfigError("kernels: native has no home directory; set XDG_CACHE_HOME") from None


def _processor() -> str:
    """What -march=native depends on."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    wanted = ("vendor_id", "cpu family", "model\t", "flags", "CPU part", "Features")
    return "\n".join(sorted({line for line in text.splitlines() if line.startswith(wanted)}))


def _complaint(text: str) -> str:
    """The line of a compiler's messages that says what is wrong."""
    lines = text.strip().splitlines() or ["no message"]
    telling = re.compile(r"error|undefined|cannot find|not found", re.IGNORECASE)
    return next(filter(telling.search, lines), lines[-1])


def build(
    target: Path, cc: Sequence[str], sources: Path = SOURCES, flags: Sequence[str] = FLAGS
) -> None:
    """Compile into `target`; ConfigError with the compiler's complaint where that fails."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Ranks of a run may all compile: each into a name of its own, renamed when whole.
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            made = Path(scratch) / target.name
            files = [str(path) for path in sorted(sources.glob("*.c"))]
            done = subprocess.run(
                [*cc, *flags, *files, "-o", str(made), "-lm"], capture_output=True, text=True
            )
            if done.returncode or not made.exists():
                raise ConfigError(
                    f"kernels: native did not compile with {cc[0]}: {_complaint(done.stderr)}"
                )
            made.rename(target)
    except OSError as error:
        raise ConfigError(
            f"kernels: native cannot make {target}: {error.strerror}; is XDG_CACHE_HOME writable?"
        ) from error


def path(cc: Sequence[str]) -> Path:
    """Of the library for these sources, this compiler and this machine."""
    told = subprocess.run([*cc, "--version"], capture_output=True, text=True)
    text = "\n".join([*cc, *FLAGS, told.stdout, _processor(), *platform.libc_ver()])
    for source in sorted([*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]):
        text += f"\n{source.name}\n{source.read_text()}"
    return folder() / f"native-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"


def load(target: Path, cc: Sequence[str], sources: Path = SOURCES) -> ctypes.CDLL:
    """The library at `target`, compiled where there is none or a damaged one."""
    try:
        return ctypes.CDLL(str(target))
    except OSError:
        build(target, cc, sources)
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise ConfigError(f"kernels: native cannot load {target}: {error}") from error


@cache
def _load() -> ctypes.CDLL:
    cc = compiler()
    return load(path(cc), cc)


def ready() -> None:
    """Compile and load the library if that has not happened; ConfigError if it cannot be had."""
    _load()


def check(op: str, *tensors: Tensor) -> None:
    """ValueError unless all are on the CPU and of one type that the library has."""
    first = tensors[0]
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype not in TYPES or tensor.dtype != first.dtype:
            kinds = ", ".join(sorted({str(x.dtype).removeprefix("torch.") for x in tensors}))
            raise ValueError(
                f"kernels.{op}: native takes one type, fp32 or bf16, on a CPU, not {kinds} on "
                f"{tensor.device.type}; set kernels.{op}=eager"
            )


def check_shape(name: str, tensor: Tensor, expected: Sequence[int | None]) -> None:
    """ValueError unless the shape is the expected one, None any: the library trusts it."""
    same = len(expected) == tensor.ndim and all(
        size in (None, found) for size, found in zip(expected, tensor.shape, strict=True)
    )
    if not same:
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name}: shape {list(tensor.shape)}, expected [{wanted}]")


@cache
def _structure(kinds: tuple[Any, ...]) -> Any:
    names = [(f"field_{i}", kind) for i, kind in enumerate(kinds)]
    return type("Structure", (ctypes.Structure,), {"_fields_": names})


Value = Tensor | int | float | None


def call(name: str, *arguments: Value | tuple[Value, ...]) -> None:
    """Call the library's `name`. Tensors go by address: they must be contiguous, or have their
    strides among the arguments. Integers are `long`, a tuple is the address of a structure."""
    flat = [x for part in arguments for x in (part if isinstance(part, tuple) else (part,))]
    if any(isinstance(x, FakeTensor) for x in flat):
        return  # A rehearsal: memory was counted where outputs were made.
    getattr(_load(), name)(*(_converted(x) for x in arguments))


def _converted(x: Value | tuple[Value, ...]) -> object:
    if isinstance(x, tuple):
        fields = [_converted(part) for part in x]
        return ctypes.byref(_structure(tuple(type(field) for field in fields))(*fields))
    if isinstance(x, Tensor):
        return ctypes.c_void_p(x.data_ptr())
    if isinstance(x, float):
        return ctypes.c_float(x)
    return ctypes.c_long(x) if x is not None else ctypes.c_void_p()
