"""The user's configuration, shrunk until a layout of local ranks trains it in a second."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from zaya_train.config.check import model_problems
from zaya_train.config.derive import Layout
from zaya_train.config.precision import PrecisionConfig
from zaya_train.model.init import initialise
from zaya_train.model.interfaces import Surroundings
from zaya_train.model.zaya import ZayaModel
from zaya_train.optim.exchange import Groups
from zaya_train.optim.optimizer import Optimizer
from zaya_train.parallel.apply import chunking_of, parallelize
from zaya_train.parallel.fsdp import Reduction
from zaya_train.parallel.mesh import Mesh
from zaya_train.parallel.sequence import Chunking
from zaya_train.tools.random_rows import RandomRow, random_row
from zaya_train.train.batch import Batch, make_batch
from zaya_train.train.built import groups_of, optimizer_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zaya_train.config.schema import ModelConfig, TrainConfig

CPU = torch.device("cpu")
ROWS = 8
"""Of a step: two micro-batches of one row on four data ranks."""
SHORTEST = 32
"""Tokens that stand for the plan's shortest context."""
LONGEST = 256
_DOCUMENTS = (
    # Of 32 tokens. With 2 to 8 chunks a document over a cut, one that ends on it, starts on it or
    # one token before it, one-token documents on both sides, padding from within a chunk on.
    (6, 2, 7, 14),
    (32,),
    (3, 1, 1, 2, 8, 1, 1, 5),
    (16, 15, 1),
)


@dataclass(frozen=True)
class Context:
    """One context of the plan, shrunk."""

    phases: tuple[str, ...]
    """That have it."""
    row_tokens: int
    rope_base: float
    degree: int
    """Context-parallel ranks the plan asks for."""


def contexts_of(config: TrainConfig) -> list[Context]:
    """The plan's contexts, shortest first, in their own ratios up to LONGEST."""
    shortest = min(phase.context_tokens for phase in config.plan.phases.values())
    groups: dict[tuple[int, float, int], list[str]] = {}
    for name, phase in config.plan.phases.items():
        length = min(LONGEST, SHORTEST * max(1, round(phase.context_tokens / shortest)))
        length -= length % SHORTEST
        key = (length, phase.rope_base, phase.context_parallel)
        groups.setdefault(key, []).append(name)
    return [Context(tuple(names), *key) for key, names in sorted(groups.items())]


def shrunk(config: TrainConfig) -> TrainConfig:
    """Few layers, small widths, fp32 throughout; everything else as the user has it."""
    optim = config.optim
    muon = replace(optim.muon, newton_schulz_dtype="fp32", momentum_dtype="fp32")
    return replace(
        config,
        model=_small(config.model),
        optim=replace(optim, muon=muon),
        precision=PrecisionConfig(compute_dtype="fp32", reduce_dtype="fp32"),
    )


def _small(model: ModelConfig) -> ModelConfig:
    heads = min(model.num_kv_heads, 2)
    small = replace(
        model,
        vocab_size=min(model.vocab_size, 61),
        num_layers=min(model.num_layers, 2),
        hidden_size=min(model.hidden_size, 16),
        num_kv_heads=heads,
        num_query_heads=heads * (model.num_query_heads // model.num_kv_heads),
        num_experts=min(model.num_experts, 16),
        expert_ffn_size=min(model.expert_ffn_size, 8),
        router_size=min(model.router_size, 8),
        # At 0.02 the router's last matrix is so small that rounding stands out in its updates.
        init_std=0.2,
    )
    sizes = (replace(small, head_dim=size) for size in range(8, model.head_dim, 2))
    return next((s for s in sizes if not any(model_problems(s))), small)


@dataclass(frozen=True)
class Trial:
    """One layout of ranks and how it computes; the default is a single process."""

    name: str
    replicate: int = 1
    shard: int = 1
    context: int = 1
    expert: int = 1
    micro_rows: int = ROWS
    recompute: str = "none"
    accumulation: str = "keep_unsharded"
    reshard: bool = False
    impossible: str = ""
    """Why the ranks at hand cannot form it; it is reported and not run."""

    @property
    def layout(self) -> Layout:
        return Layout(self.replicate, self.shard, self.context, self.expert)

    @property
    def serial(self) -> bool:
        return self.layout.world == 1

    def words(self) -> str:
        """Degrees and settings."""
        degrees = f"{self.replicate} x {self.shard} x {self.context}"
        experts = f", experts over {self.expert}" if self.expert > 1 else ""
        micro = ROWS // (self.layout.data * self.micro_rows)
        return f"{degrees}{experts}, {micro} micro-batches, {self.accumulation}, {self.recompute}"


@dataclass(frozen=True)
class Subject:
    """A rank's model, ready for a forward pass or a step."""

    trial: Trial
    config: TrainConfig
    context: Context
    model: ZayaModel
    chunking: Chunking
    ranks: tuple[int, int]
    """Data rank and context rank."""
    reduction: Reduction
    groups: Groups

    @staticmethod
    def of(config: TrainConfig, context: Context, trial: Trial) -> Subject:
        """Collective over the trial's ranks. `config` is shrunk already."""
        parallel = replace(
            config.parallel,
            expert_parallel=trial.expert,
            recompute=trial.recompute,  # type: ignore[arg-type]
            accumulation=trial.accumulation,  # type: ignore[arg-type]
            reshard_after_forward=trial.reshard,
        )
        config = replace(
            config,
            parallel=parallel,
            model=replace(config.model, rope_base=context.rope_base),
        )
        return _alone(trial, config, context) if trial.serial else _shared(trial, config, context)

    def optimizer(self, kind: type[Optimizer] = Optimizer) -> Optimizer:
        """A new one, fp32."""
        return optimizer_of(self.config, self.model, self.groups, kind)

    def batch(self, rows: Sequence[RandomRow]) -> Batch:
        """This rank's part of a micro-batch."""
        return make_batch(rows, self.chunking, self.ranks[1], CPU)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step."""
        size, data = self.trial.micro_rows, self.trial.layout.data
        rows = rows_of(step, self.context.row_tokens, self.config.model.vocab_size)
        starts = range(self.ranks[0] * size, ROWS, data * size)
        return [self.batch(rows[start : start + size]) for start in starts]

    def local_tokens(self) -> list[int]:
        """Place in the row of each local token."""
        ranges = self.chunking.ranges_of(self.ranks[1], self.context.row_tokens)
        return [token for start, end in ranges for token in range(start, end)]


def _alone(trial: Trial, config: TrainConfig, context: Context) -> Subject:
    """Plain modules: no mesh, no FSDP, no exchange."""
    world = dist.group.WORLD
    assert world is not None
    around = Surroundings(kernels=config.kernels, recompute=config.parallel.recompute)
    model = ZayaModel(config.model, around)
    initialise(model, config.run.seed)
    reduction = Reduction(1, config.parallel.accumulation, True)
    chunking = Chunking(1, False)
    return Subject(trial, config, context, model, chunking, (0, 0), reduction, Groups(world, world))


def _shared(trial: Trial, config: TrainConfig, context: Context) -> Subject:
    mesh = Mesh.build(trial.layout, "cpu")
    model = parallelize(config, config.model, mesh, CPU)
    return Subject(
        trial,
        config,
        context,
        model,
        chunking_of(mesh, config),
        (mesh.data_rank, mesh.context_rank),
        Reduction.of(mesh, config.parallel),
        groups_of(mesh),
    )


def rows_of(step: int, row_tokens: int, vocabulary: int) -> list[RandomRow]:
    """ROWS packed rows; a fifth of the labels unsupervised."""
    times = row_tokens // SHORTEST
    kinds = [_DOCUMENTS[i % len(_DOCUMENTS)] for i in range(ROWS)]
    # Every other row that could be one document is one.
    lengths = [(row_tokens,) if kind == (SHORTEST,) else kind * times for kind in kinds]
    return [
        random_row(100 * step + i, documents, row_tokens, vocabulary)
        for i, documents in enumerate(lengths)
    ]
