"""Training throughput on a CPU: ZayaModel against transformers' ZayaForCausalLM.

Same weights (written by `hub.to_hf`, read back by transformers), same tokens and labels; forward
and backward of both are timed alternately in one process, so that a busy machine slows both alike.
The figure to read is the median of the pairwise ratios. Losses and embedding gradients of the two
are compared before anything is timed.

    python kernels/bench/cpu_model.py [--rounds 7] [--threads 2] [--dtype bf16] [--profile]
        [--kernels eager]

The kernels in C (`native`, docs/kernels.md) are timed unless `--kernels eager` is given.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from cpu_profile import by_part
from rich.console import Console
from rich.table import Table
from zaya_kernels.dtypes import DTYPES

from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.config.schema import KernelsConfig, ModelConfig
from zaya_train.hub.convert import from_hf, to_hf
from zaya_train.main import compose
from zaya_train.model import SequenceLayout, ZayaModel, initialise
from zaya_train.model.flops import train_flops_per_token
from zaya_train.model.interfaces import Surroundings

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

CONFIG = ModelConfig(
    vocab_size=8192,
    num_layers=8,
    hidden_size=512,
    num_query_heads=8,
    num_kv_heads=2,
    head_dim=64,
    num_experts=16,
    expert_ffn_size=512,
    router_size=256,
    max_context_tokens=1024,
    skip_output="zero",
)
BATCH, SEQUENCE = 2, 1024
AGREE = {"fp32": (1e-4, 1e-3), "bf16": (2e-2, 1e-1)}
"""Largest difference of the losses and relative one of the embedding gradients, by compute type;
bf16 has 8 bits, and the two round at different places."""


def models(
    folder: Path, dtype: torch.dtype, kernels: KernelsConfig
) -> tuple[ZayaModel, transformers.ZayaForCausalLM]:
    """Both models with one set of weights, both through the interchange format, all parameters in
    the compute type, as FSDP hands them to a step."""
    source = ZayaModel(CONFIG)
    initialise(source, seed=0)
    to_hf(source, folder)
    # Without a padding id transformers' embedding drops no token's gradient.
    theirs = transformers.ZayaForCausalLM.from_pretrained(folder, dtype=dtype, pad_token_id=None)
    ours = from_hf(folder, around=Surroundings(kernels=kernels))
    return ours.to(dtype), theirs.train()


def passes(
    ours: ZayaModel, theirs: transformers.ZayaForCausalLM
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """Forward and backward of either model on one batch, each returning its mean loss."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, SEQUENCE), generator=generator)
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE_LABEL)
    count = int((labels != IGNORE_LABEL).sum())
    layout = SequenceLayout.whole_rows(BATCH, SEQUENCE, torch.device("cpu"))

    def run_ours() -> Tensor:
        loss: Tensor = ours(tokens, labels, layout).loss / count
        torch.autograd.backward(loss)
        return loss.detach()

    def run_theirs() -> Tensor:
        # transformers shifts the labels itself; its routers' states need no cache here.
        loss: Tensor = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
        torch.autograd.backward(loss)
        return loss.detach()

    return run_ours, run_theirs


def agreement(
    losses: tuple[Tensor, Tensor], ours: ZayaModel, theirs: nn.Module, allowed: tuple[float, float]
) -> float:
    """Relative difference of the embedding gradients; ValueError where the passes differ."""
    a, b = ours.embedding.grad, theirs.get_parameter("model.embed_tokens.weight").grad
    if a is None or b is None:
        raise ValueError("a pass left the embedding without a gradient")
    difference = float((a.float() - b.float()).norm() / b.float().norm())
    if difference > allowed[1] or abs(float(losses[0]) - float(losses[1])) > allowed[0]:
        raise ValueError(
            f"the models disagree: losses {float(losses[0])} and {float(losses[1])}, "
            f"embedding gradients {difference:.1e} apart"
        )
    return difference


@dataclass(frozen=True)
class Cost:
    """Of one call."""

    wall_seconds: float
    cpu_seconds: float
    """Over all threads; other processes disturb it less, waiting threads may add to it."""


def cost(run: Callable[[], object], model: nn.Module | None = None) -> Cost:
    """What one call takes, on cleared gradients."""
    if model is not None:
        model.zero_grad(set_to_none=True)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def matmul_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a plain product of 2,048 x 2,048 matrices, best of five."""
    a, b = torch.randn(2048, 2048, dtype=dtype), torch.randn(2048, 2048, dtype=dtype)
    return 2 * 2048**3 / min(cost(lambda: a @ b).wall_seconds for _ in range(5))


def report(ours: list[Cost], theirs: list[Cost], dtype: str, console: Console) -> None:
    """Print medians, rates and the pairwise ratios."""
    flops = train_flops_per_token(CONFIG, SEQUENCE) * BATCH * SEQUENCE
    table = Table(title=f"forward + backward, {BATCH} x {SEQUENCE} tokens, {dtype}")
    for column in ("model", "median s", "CPU s", "GFLOP/s", "tokens/s"):
        table.add_column(column, justify="right")
    for name, costs in (("zaya-train", ours), ("transformers", theirs)):
        median = statistics.median(c.wall_seconds for c in costs)
        busy = statistics.median(c.cpu_seconds for c in costs)
        rate, speed = flops / median / 1e9, BATCH * SEQUENCE / median
        table.add_row(name, f"{median:.3f}", f"{busy:.3f}", f"{rate:.0f}", f"{speed:,.0f}")
    console.print(table)
    pairs = list(zip(ours, theirs, strict=True))
    for kind, ratios in (
        ("wall", [b.wall_seconds / a.wall_seconds for a, b in pairs]),
        ("CPU", [b.cpu_seconds / a.cpu_seconds for a, b in pairs]),
    ):
        console.print(
            f"{kind} time, transformers / zaya-train: median {statistics.median(ratios):.2f}, "
            f"{min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} pairs"
        )
    console.print(f"plain matrix product: {matmul_rate(DTYPES[dtype]) / 1e9:.0f} GFLOP/s")


def profiled(
    shares: tuple[dict[str, float], dict[str, float]], spent: tuple[float, float], console: Console
) -> None:
    """Print the parts of both models in CPU seconds: shares of a profiled pass times `spent`."""
    table = Table(title="CPU seconds by part")
    for column in ("part", "zaya-train", "transformers"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in sorted({*shares[0], *shares[1]}, key=lambda p: -shares[0].get(p, 0.0)):
        values = (share.get(part, 0.0) * total for share, total in zip(shares, spent, strict=True))
        table.add_row(part, *(f"{value:.3f}" for value in values))
    console.print(table)


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed pairs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=sorted(AGREE), default="fp32", help="compute type")
    parser.add_argument("--kernels", choices=("native", "eager"), default="native")
    parser.add_argument("--profile", action="store_true", help="also print time by part")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        kernels = compose(["recipe=smoke_cpu", f"kernels={arguments.kernels}"]).kernels
        ours, theirs = models(Path(folder) / "model", DTYPES[arguments.dtype], kernels)
    run_ours, run_theirs = passes(ours, theirs)
    losses = run_ours(), run_theirs()
    difference = agreement(losses, ours, theirs, AGREE[arguments.dtype])
    console.print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    console.print(f"loss {float(losses[0]):.6f}, embedding gradients {difference:.1e} apart")
    costs: tuple[list[Cost], list[Cost]] = ([], [])
    for _ in range(arguments.rounds):
        costs[0].append(cost(run_ours, ours))
        costs[1].append(cost(run_theirs, theirs))
    report(*costs, arguments.dtype, console)
    if arguments.profile:
        spent = [statistics.median(c.cpu_seconds for c in models) for models in costs]
        shares = by_part(run_ours, ours), by_part(run_theirs, theirs)
        profiled(shares, (spent[0], spent[1]), console)


if __name__ == "__main__":
    main()
