"""Peak memory of linear_cross_entropy at the full vocabulary, forward and backward.

One process measures one width: the peak resident memory, and of that what the caller owns anyway
(imports, hidden states and weight and their gradients, all written). The difference is the loss's.

    python kernels/bench/loss_memory.py [--hidden 64 512 2048] [--dtype fp32]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 2**30


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(hidden_size: int, dtype: torch.dtype, tokens: int, vocab: int) -> tuple[int, int]:
    """(peak bytes, bytes the caller owns) of one forward and backward in this process."""
    hidden = torch.randn(tokens, hidden_size).to(dtype).requires_grad_(True)
    # Written in place: a randn in fp32 would raise the peak of a bf16 weight.
    weight = torch.empty(vocab, hidden_size, dtype=dtype).normal_(std=0.02).requires_grad_(True)
    labels = torch.randint(vocab, (tokens,))
    own = resident_bytes("VmRSS")
    own += sum(t.numel() * t.element_size() for t in (hidden, weight))
    torch.autograd.backward(linear_cross_entropy(hidden, weight, labels, "eager") / tokens)
    return resident_bytes("VmHWM"), own


def in_subprocess(hidden_size: int, arguments: argparse.Namespace) -> tuple[int, int]:
    """`measure` in a fresh process, whose peak nothing else has raised."""
    command = [sys.executable, __file__, "--bare", "--hidden", str(hidden_size)]
    for name in ("dtype", "tokens", "vocab", "threads"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, own = done.stdout.split()
    return int(peak), int(own)


def main() -> None:
    """Print a table, or with --bare the two numbers of one width."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=262_272)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bare", action="store_true", help="peak and owned bytes, one width")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.bare:
        peak, own = measure(
            arguments.hidden[0], DTYPES[arguments.dtype], arguments.tokens, arguments.vocab
        )
        sys.stdout.write(f"{peak} {own}\n")
        return
    table = Table(
        title=f"{arguments.tokens:,} tokens, vocabulary {arguments.vocab:,}, {arguments.dtype}"
    )
    for column in ("hidden", "peak GiB", "caller's GiB", "the loss's GiB", "whole logits GiB"):
        table.add_column(column, justify="right")
    whole = arguments.tokens * arguments.vocab * 4
    for hidden_size in arguments.hidden:
        peak, own = in_subprocess(hidden_size, arguments)
        figures = (peak, own, peak - own, whole)
        table.add_row(str(hidden_size), *(f"{figure / GIB:.2f}" for figure in figures))
    Console().print(table)


if __name__ == "__main__":
    main()
