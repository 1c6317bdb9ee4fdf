"""The device of one rank and the facts about it that belong into a log and a manifest."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, fields
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

import torch

from zaya_train.config.errors import ConfigError
from zaya_train.config.kernel_rules import PACKAGES, fp8_device_problem

if TYPE_CHECKING:
    from zaya_train.config.precision import PrecisionConfig
    from zaya_train.config.schema import KernelsConfig

DeviceChoice = Literal["auto", "cpu", "cuda"]

FP8_VERSION = (2, 3)
"""Of Transformer Engine, from which its GroupedLinear has current scaling (docs/decisions/0019)."""


@dataclass(frozen=True)
class DeviceFacts:
    """What this process computes on; `memory_bytes` is the device's own memory, host RAM on CPU."""

    name: str
    memory_bytes: int
    cores: int
    torch_version: str
    hip_version: str | None
    cuda_version: str | None
    units: int | None = None
    """Compute units or streaming multiprocessors of a GPU."""

    def __str__(self) -> str:
        """In a line of a log."""
        memory = f"{self.memory_bytes / 2**30:.0f} GiB"
        return f"{self.name}, {memory}, {self.cores} cores, torch {self.torch_version}"


def usable_cores() -> int:
    """Cores this process may run on; a Slurm or container limit counts, the machine's total not."""
    return len(os.sched_getaffinity(0))


def pick_device(choice: DeviceChoice, local_rank: int = 0) -> torch.device:
    """The device of the `local_rank`-th process of this node.

    `auto` takes the accelerator if torch sees one. ROCm devices are `cuda` to torch.

    Raises:
        ConfigError: `cuda` was asked for and torch sees none, or fewer than there are ranks here.
    """
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if choice == "cpu" or (choice == "auto" and available == 0):
        return torch.device("cpu")
    if available == 0:
        raise ConfigError(
            f"runtime.device=cuda, but torch {torch.__version__} sees no accelerator "
            f"(built for {_build()}); use runtime.device=cpu or install a GPU build"
        )
    if local_rank >= available:
        raise ConfigError(
            f"runtime.device={choice}: local rank {local_rank} needs a device of its own, "
            f"but this node shows {available}; start at most {available} ranks per node"
        )
    return torch.device("cuda", local_rank)


def check_kernels(kernels: KernelsConfig, precision: PrecisionConfig, device: torch.device) -> None:
    """ConfigError naming the first operation whose back end cannot run on `device`, or not in this
    precision."""
    for item in fields(kernels):
        name = getattr(kernels, item.name)
        if name == "native" and device.type != "cpu":
            key = f"kernels.{item.name}=native"
            raise ConfigError(f"{key}: computes on a CPU, this run is on {device}; choose eager")
        if name not in PACKAGES:
            continue
        key, (package, how) = f"kernels.{item.name}={name}", PACKAGES[name]
        if find_spec(package) is None:
            raise ConfigError(f"{key}: {package} is not installed; {how}")
        interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not interpreted:
            raise ConfigError(f"{key}: needs a GPU, this run is on {device}; choose eager")
    nvidia = device.type == "cuda" and torch.version.hip is None
    if nvidia and kernels.cca == "triton" and precision.compute_dtype == "fp32":
        raise ConfigError(
            "kernels.cca=triton: takes bf16 on NVIDIA GPUs, whose matrix units multiply no fp32 "
            "numbers, and precision.compute_dtype is fp32; choose eager"
        )
    if precision.expert_dtype == "fp8" and kernels.grouped_mlp == "transformer_engine":
        _check_fp8(device)


def _check_fp8(device: torch.device) -> None:
    """ConfigError where the installed Transformer Engine or the device cannot do it."""
    found = version("transformer_engine")
    if tuple(int(part) for part in found.split(".")[:2]) < FP8_VERSION:
        raise ConfigError(
            f"precision.expert_dtype=fp8: transformer_engine {found} cannot scale experts by what "
            f"they multiply; it needs {'.'.join(map(str, FP8_VERSION))}, "
            f"{PACKAGES['transformer_engine'][1]}"
        )
    facts = torch.cuda.get_device_properties(device)
    arch = facts.gcnArchName if torch.version.hip else None
    for problem in fp8_device_problem(facts.name, arch, (facts.major, facts.minor)):
        raise ConfigError(problem)


def peak_memory_bytes(device: torch.device) -> int:
    """Peak bytes so far: of the device's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux gives kibibytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe(device: torch.device) -> DeviceFacts:
    """Facts about `device`, read from the driver (GPU) or the operating system (CPU)."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, memory_bytes = properties.name, properties.total_memory
        units = properties.multi_processor_count
    else:
        name, units = _cpu_name(), None
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceFacts(
        name=name,
        memory_bytes=memory_bytes,
        cores=usable_cores(),
        torch_version=torch.__version__,
        hip_version=torch.version.hip,
        cuda_version=torch.version.cuda,
        units=units,
    )


def rank_memory(device: torch.device, local_ranks: int) -> tuple[float, str]:
    """10^9 bytes that a rank may fill, and what has them: its GPU, or its share of the machine."""
    facts = describe(device)
    if device.type != "cpu":
        return facts.memory_bytes / 1e9, facts.name
    return facts.memory_bytes / 1e9 / local_ranks, f"{facts.name} for each of {local_ranks} ranks"


def _build() -> str:
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return f"{os.uname().machine} CPU"
