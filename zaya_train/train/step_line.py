"""One training step in a line of the log, from its metrics row."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def step_line(row: Mapping[str, Any], ranks: int, seconds_left: float) -> str:
    """What is looked at while a run goes on.

    Args:
        row: the step's fields of metrics.jsonl.
        ranks: devices that share tokens_per_second.
        seconds_left: of the phase, were all its steps as fast as this one.
    """
    speed = row["tokens_per_second"]
    each = f" ({speed / ranks:,.0f} a device)" if ranks > 1 else ""
    added = f" + z {row['z_loss']:.1e}" if "z_loss" in row else ""
    mfu = f" | MFU {row['mfu']:.1%}" if "mfu" in row else ""
    return (
        f"{row['phase']} step {row['step']} | loss {row['loss']:.4f}{added}"
        f" | grad {row['grad_norm']:.3f} | lr {row['muon_lr']:.2e}"
        f" | {speed:,.0f} tokens/s{each}{mfu}"
        f" | {row['memory_bytes'] / 1e9:.1f} GB | load entropy {row['load_entropy']:.3f}"
        f" | skip {row['skip_rate']:.1e} | {timedelta(seconds=round(seconds_left))} left"
    )
