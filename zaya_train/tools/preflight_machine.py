"""Facts of a node that need no measuring: versions, kernel settings, network adapters."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import zaya_train
from zaya_train.tools.preflight_findings import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from zaya_train.tools.preflight_limits import Limits

OPEN_FILES = 4096
SHARED_MEMORY_GIB = 8.0
"""RCCL maps host buffers for every pair of local ranks; a container's default of 64 MB is too
small. Ours."""
_MATTER = (
    *("NCCL_", "RCCL_", "NET_", "HSA_", "HIP_", "TORCH_NCCL_", "TORCH_FR_", "TORCH_BLAS_"),
    *("GPU_MAX_HW_QUEUES", "OMP_NUM_THREADS"),
)
# Differ between ranks by design.
_MAY_DIFFER = ("HIP_VISIBLE_DEVICES", "NCCL_HOSTID")


def versions(root: Path = Path("/")) -> dict[str, str]:
    """What must be the same on all nodes, or ranks disagree in ways that show weeks later."""
    found = {
        "zaya-train": zaya_train.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release(),
    }
    if torch.version.hip:
        found["HIP"] = torch.version.hip
    if torch.cuda.is_available():
        found["collectives"] = ".".join(map(str, torch.cuda.nccl.version()))
    for name, path in (
        ("driver", "sys/module/amdgpu/version"),
        ("ROCm", "opt/rocm/.info/version"),
    ):
        if text := _text(root / path):
            found[name] = text
    return found


def environment_that_matters(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables of the communication and runtime libraries; ranks must agree on them."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_MATTER) and name not in _MAY_DIFFER
    }


def kernel_findings(node: str, gpus: bool, root: Path = Path("/")) -> Iterator[Finding]:
    """Settings of the operating system that slow or break GPU training."""
    balancing = _text(root / "proc/sys/kernel/numa_balancing")
    rule = "0: automatic balancing moves pages under the GPU's feet (AMD, MI300X optimization)"
    if not gpus or not balancing:
        why = "no GPU here" if not gpus else "this kernel has no such setting"
        yield Finding("NUMA balancing", node, "SKIP", balancing or "", why)
    else:
        yield Finding.judged("NUMA balancing", node, balancing == "0", balancing, rule)
    yield _limit(node, "open files", resource.RLIMIT_NOFILE, OPEN_FILES, judged=True)
    # RDMA registers memory, which counts as locked.
    yield _limit(node, "locked memory", resource.RLIMIT_MEMLOCK, resource.RLIM_INFINITY, gpus)
    shared = root / "dev/shm"
    if not shared.is_dir():
        yield Finding("shared memory", node, "SKIP", "", f"no {shared}")
        return
    size = shutil.disk_usage(shared).total / 2**30
    if not gpus:
        yield Finding("shared memory", node, "SKIP", f"{size:.1f} GiB", "no GPU here")
        return
    rule = f"at least {SHARED_MEMORY_GIB:g} GiB in /dev/shm (docker: --ipc host)"
    enough = size >= SHARED_MEMORY_GIB
    yield Finding.judged("shared memory", node, enough, f"{size:.1f} GiB", rule)


def _limit(node: str, check: str, which: int, least: int, judged: bool) -> Finding:
    soft = resource.getrlimit(which)[0]
    value = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    rule = "unlimited" if least == resource.RLIM_INFINITY else f"at least {least:,}"
    if not judged:
        return Finding(check, node, "SKIP", value, "no GPU here")
    holds = soft == resource.RLIM_INFINITY or (least != resource.RLIM_INFINITY and soft >= least)
    return Finding.judged(check, node, holds, value, rule)


def nic_findings(node: str, limits: Limits, root: Path = Path("/")) -> Iterator[Finding]:
    """RDMA ports as the kernel lists them: up, at full rate, as many as the device's nodes have.

    Format: the kernel's documentation of /sys/class/infiniband (state "4: ACTIVE", rate "400 Gb/sec
    (4X NDR)").
    """
    ports = sorted((root / "sys/class/infiniband").glob("*/ports/*"))
    wanted = limits.nics_per_node
    if not ports and wanted is None:
        yield Finding(
            "network adapters", node, "SKIP", "no RDMA port", "none is known to be needed"
        )
        return
    fast = []
    for port in ports:
        state, rate = _text(port / "state") or "", _text(port / "rate") or ""
        name = f"{port.parents[1].name}/{port.name}"
        gigabits = float(rate.split()[0]) if rate[:1].isdigit() else 0.0
        least = limits.nic_gbit_per_second
        # A slower port is the storage network's; a fast one that is down is trouble.
        if least is None or gigabits >= least:
            value = f"{name}: {state or 'no state'}, {rate or 'no rate'}"
            yield Finding.judged("network adapter", node, "ACTIVE" in state, value, "ACTIVE")
            fast.append(name)
    if wanted is not None:
        least = limits.nic_gbit_per_second
        rule = f"{wanted:g} ports" + (f" of {least:g} Gbit/s" if least else "")
        value = f"{len(fast)} of {len(ports)} RDMA ports"
        yield Finding.judged("network adapters", node, len(fast) >= wanted, value, rule)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None


def node_name() -> str:
    """As the scheduler calls this node, else as it calls itself."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()
