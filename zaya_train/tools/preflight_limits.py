"""What a healthy device reaches, by name. Below these a node is not worth starting on; they are
deliberately loose, for a bad part is slower by far, and are ours unless the source says so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from zaya_train.config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Limits:
    """Least values; None is not judged."""

    memory_gib: float | None = None
    gemm_tflops: float | None = None
    """bf16, large square matrices."""
    memory_gb_per_second: float | None = None
    """Bytes read and written by a copy within the device's memory."""
    node_gb_per_second: float | None = None
    """Bus bandwidth of an all-reduce of 256 MiB and more inside a node."""
    link_gb_per_second: float | None = None
    """One rank to its partner on another node."""
    nic_gbit_per_second: float | None = None
    nics_per_node: float | None = None
    disk_mb_per_second: float | None = None
    """Writing and syncing a file on the shared file system, each rank, all at once."""


# Not measured by us. Sources of the figures behind the limits:
#   192 GB of memory: data sheet; the driver shows 191.98 GiB.
#   708 TFLOP/s bf16 achievable of 1,307: AMD, "measuring max-achievable FLOPs" (ROCm blogs); 70 %.
#   4.3 of 5.3 TB/s measured by Zyphra (arXiv 2511.17127); 80 %.
#   7 xGMI links of 48 of 64 GB/s usable: AMD, "RCCL bandwidth and xGMI performance on MI300X" (ROCm
#   blogs), so 336 GB/s; 75 %.
#   One Pollara NIC of 400 Gbit/s = 50 GB/s per GPU (arXiv 2511.17127); 70 %.
MI300X = Limits(
    memory_gib=190.0,
    gemm_tflops=495.0,
    memory_gb_per_second=3440.0,
    node_gb_per_second=252.0,
    link_gb_per_second=35.0,
    nic_gbit_per_second=400.0,
    nics_per_node=8.0,
)
_BY_NAME = {"MI300X": MI300X}


def limits_of(device: str, minimums: Sequence[str] = ()) -> Limits:
    """The limits of a device by the name its driver gives it, none for an unknown one, with
    `name=value` laid over.

    Raises:
        ConfigError: no such limit, or not a number.
    """
    found = next((limits for name, limits in _BY_NAME.items() if name in device), Limits())
    for word in minimums:
        name, _, text = word.partition("=")
        if name not in Limits.__dataclass_fields__:
            known = ", ".join(Limits.__dataclass_fields__)
            raise ConfigError(f"--minimum {word}: no limit of that name; there are {known}")
        try:
            value = float(text)
        except ValueError:
            raise ConfigError(f"--minimum {word}: {text!r} is not a number") from None
        found = replace(found, **{name: value})
    return found
