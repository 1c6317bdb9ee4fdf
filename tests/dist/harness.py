"""One model, its rows and three optimizer steps, on any layout of ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.helpers.models import NATIVE
from tests.helpers.tiny import tiny
from zaya_train.config.build import to_dict
from zaya_train.config.derive import Layout
from zaya_train.config.schema import KernelsConfig
from zaya_train.optim.exchange import Groups
from zaya_train.optim.optimizer import Optimizer
from zaya_train.parallel.apply import chunking_of, parallelize
from zaya_train.parallel.fsdp import Reduction, local_row_start, reshard
from zaya_train.parallel.mesh import Mesh
from zaya_train.tools.random_rows import RandomRow, random_row
from zaya_train.train.batch import Batch, make_batch
from zaya_train.train.evaluate import validation_losses
from zaya_train.train.step import Rates, StepResult, global_norm, train_step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from zaya_train.config.schema import TrainConfig
    from zaya_train.model.zaya import ZayaModel

CPU = torch.device("cpu")
MESHES: dict[Layout, Mesh] = {}
ROW_TOKENS = 32
ROWS = 4
STEPS = 3
VOCABULARY = 61  # divides by neither 2 nor 4
DOCUMENTS = (
    # With 2, 4 or 8 chunks cuts lie at multiples of 4: a document over the cut at 4, one that ends
    # on 8, one that starts on it, one that starts one token before 16 and spans three cuts.
    (6, 2, 7, 14),
    (32,),
    # One-token documents on both sides of a cut, and padding from the middle of a chunk on.
    (3, 1, 1, 2, 8, 1, 1, 5),
    (16, 15, 1),
)


@dataclass(frozen=True)
class Case:
    """One layout; replicate x shard x context ranks, experts divided over `expert` of them."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    expert: int = 1
    micro_rows: int = 1
    chunks: str = "head_tail"
    recompute: str = "none"
    accumulation: str = "keep_unsharded"
    reshard: bool = False
    experts: int = 4
    """Of the model, per layer."""
    layers: int = 2
    row_tokens: int = ROW_TOKENS
    """A multiple of ROW_TOKENS; rows repeat their documents."""
    compute: str = "fp32"
    """precision.compute_dtype."""
    kernels: Literal["eager", "native"] = "eager"

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def name(self) -> str:
        micro = ROWS // (self.replicate * self.shard * self.micro_rows)
        degrees = f"r{self.replicate}s{self.shard}c{self.context}e{self.expert}"
        degrees += f"of{self.experts}x{self.row_tokens}"
        how = f"{self.chunks}-{self.micro_rows}rows-{micro}micro-{self.accumulation}"
        how += "-bf16" if self.compute == "bf16" else ""
        how += "-native" if self.kernels == "native" else ""
        return f"{degrees}-{how}-{self.recompute}" + ("-reshard" if self.reshard else "")


def packed_row(seed: int, documents: tuple[int, ...], row_tokens: int = ROW_TOKENS) -> RandomRow:
    """Random tokens of this module's vocabulary."""
    return random_row(seed, documents, row_tokens, VOCABULARY)


def rows_of_step(step: int, row_tokens: int = ROW_TOKENS) -> list[RandomRow]:
    times = row_tokens // ROW_TOKENS
    return [
        # Padding stays behind the last document.
        packed_row(100 * step + i, documents * times, row_tokens)
        for i, documents in enumerate(DOCUMENTS)
    ]


def parity_config(case: Case, **changes: Any) -> TrainConfig:
    return tiny(
        {
            "model.vocab_size": VOCABULARY,
            # A halo of three rows in chunks of four tokens.
            "model.conv_depthwise_taps": 3,
            "optim.clip_norm": 2.0,
            # The router's last matrix starts with this deviation; at 0.02 it is so small that the
            # rounding of its first updates stands out in a relative comparison.
            "model.init_std": 0.2,
            "model.num_experts": case.experts,
            "model.num_layers": case.layers,
            "parallel.context_chunks": case.chunks,
            "parallel.expert_parallel": case.expert,
            "parallel.accumulation": case.accumulation,
            "parallel.recompute": case.recompute,
            "parallel.reshard_after_forward": case.reshard,
            "precision.compute_dtype": case.compute,
            "kernels": to_dict(NATIVE if case.kernels == "native" else KernelsConfig()),
            **changes,
        }
    )


@dataclass(frozen=True, repr=False)
class Part:
    """A rank's rows of a tensor."""

    shape: tuple[int, ...]
    start: int
    rows: NDArray[Any]

    @staticmethod
    def of(tensor: Tensor) -> Part:
        tensor = tensor.detach()
        start = local_row_start(tensor) if isinstance(tensor, DTensor) else 0
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return Part(tuple(tensor.shape), start, local.numpy().copy())


def together(parts: list[Part]) -> NDArray[Any]:
    """The whole tensor; parts that overlap must agree, and none may be missing."""
    if not parts[0].shape:
        return parts[0].rows
    full = np.zeros(parts[0].shape, dtype=parts[0].rows.dtype)
    seen = np.zeros(parts[0].shape[0], dtype=bool)
    for part in parts:
        place = slice(part.start, part.start + len(part.rows))
        assert np.array_equal(full[place][seen[place]], part.rows[seen[place]])
        full[place] = part.rows
        seen[place] = True
    assert seen.all()
    return full


@dataclass(frozen=True, repr=False)
class Logits:
    """Logits [rows, len(tokens), V] of rows first .. first + rows - 1 at these tokens."""

    first: int
    tokens: list[int]
    values: NDArray[np.float32]


def all_logits(ranks: list[list[Logits]]) -> NDArray[np.float32]:
    """[ROWS, row tokens, V] from every rank's."""
    parts = [part for rank in ranks for part in rank]
    length = 1 + max(max(part.tokens) for part in parts)
    full = np.full((ROWS, length, VOCABULARY), np.nan, dtype=np.float32)
    for part in parts:
        rows = np.arange(part.first, part.first + len(part.values))
        full[np.ix_(rows, np.array(part.tokens))] = part.values
    return full


@dataclass
class Setup:
    """One rank's model and optimizer."""

    case: Case
    config: TrainConfig
    mesh: Mesh
    model: ZayaModel
    optimizer: Optimizer
    clipped: dict[str, Part] = field(default_factory=dict)
    """This rank's part of the gradients as the optimizer saw them last."""

    @staticmethod
    def of(case: Case, **changes: Any) -> Setup:
        config = parity_config(case, **changes)
        degrees = Layout(case.replicate, case.shard, case.context, case.expert)
        # Many cases run in one process, and every mesh is a dozen groups of threads and sockets.
        if degrees not in MESHES:
            MESHES[degrees] = Mesh.build(degrees, "cpu")
        mesh = MESHES[degrees]
        model = parallelize(config, config.model, mesh, CPU)
        optimizer = Optimizer(
            dict(model.named_parameters()),
            [buffer for _, buffer in model.named_buffers()],
            config.model.num_experts,
            config.optim,
            Groups(mesh.fsdp_group, mesh.sharding.get_group("replicate")),
            "eager",
        )
        return Setup(case, config, mesh, model, optimizer)

    @property
    def reduction(self) -> Reduction:
        return Reduction.of(self.mesh, self.config.parallel)

    @property
    def first_rows(self) -> range:
        """First row of each of this rank's micro-batches, dealt as the composition root does."""
        size = self.case.micro_rows
        return range(self.mesh.data_rank * size, ROWS, self.mesh.layout.data * size)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches."""
        rows = rows_of_step(step, self.case.row_tokens)
        return [
            make_batch(
                rows[start : start + self.case.micro_rows],
                chunking_of(self.mesh, self.config),
                self.mesh.context_rank,
                CPU,
            )
            for start in self.first_rows
        ]

    def logits(self, step: int) -> list[Logits]:
        """Of every local token of a step's rows."""
        chunking = chunking_of(self.mesh, self.config)
        ranges = chunking.ranges_of(self.mesh.context_rank, self.case.row_tokens)
        tokens = [t for start, end in ranges for t in range(start, end)]
        with torch.no_grad():
            found = [
                Logits(first, tokens, self.model.logits(batch.tokens, batch.layout).numpy())
                for first, batch in zip(self.first_rows, self.batches(step), strict=True)
            ]
        reshard(self.model)
        return found

    def step(self, number: int) -> StepResult:
        optim = self.config.optim
        rates = Rates(muon=0.02, adamw=0.01, clip_norm=optim.clip_norm, z_loss=optim.z_loss)
        batches = self.batches(number)
        return train_step(self.model, self.optimizer, batches, rates, self.reduction)

    def validation(self) -> dict[str, float]:
        length = self.case.row_tokens
        rows = {"three": rows_of_step(90, length)[:3], "one": rows_of_step(91, length)[2:3]}
        chunking = chunking_of(self.mesh, self.config)
        return validation_losses(self.model, rows, self.mesh, chunking, CPU)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, biases and optimizer state."""
        tensors: dict[str, Tensor] = {f"model.{n}": p for n, p in self.model.named_parameters()}
        tensors |= {f"model.{n}": b for n, b in self.model.named_buffers()}
        return tensors | self.optimizer.tensors()

    def full(self) -> dict[str, Tensor]:
        """The same, gathered."""
        return {n: whole(t) for n, t in self.tensors().items()}

    def record_gradients(self) -> None:
        """Keep what the next optimizer steps see."""
        inner = self.optimizer.step

        def step(*arguments: Any) -> None:
            self.clipped = {
                n: Part.of(p.grad) for n, p in self.model.named_parameters() if p.grad is not None
            }
            inner(*arguments)

        self.optimizer.step = step  # type: ignore[method-assign, assignment]


def whole(tensor: Tensor) -> Tensor:
    """A copy of the full tensor. Collective for DTensors."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Of this rank's own bits."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        sha.update(name.encode() + local.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()


@dataclass(frozen=True, repr=False)
class Outcome:
    """What one rank saw of a case; pytest shows arguments, and these arrays are long."""

    losses: list[float]
    norms: list[float]
    supervised: list[int]
    loads: list[list[list[float]]]
    gradients: list[dict[str, Part]]
    """Of every step, clipped."""
    final: dict[str, Part]
    logits: list[Logits]
    """Of the last step's rows, after it."""
    validation: dict[str, float]
    local_digest: str
    fsdp_rank: int


def three_steps(case: Case) -> Outcome:
    """Train and collect; runs on every rank of the case's world."""
    setup = Setup.of(case)
    setup.record_gradients()
    results, gradients = [], []
    for number in range(STEPS):
        results.append(setup.step(number))
        gradients.append(setup.clipped)
    local = dict(setup.model.named_parameters()) | dict(setup.model.named_buffers())
    return Outcome(
        losses=[r.loss for r in results],
        norms=[r.grad_norm for r in results],
        supervised=[r.supervised for r in results],
        loads=[r.load.tolist() for r in results],
        gradients=gradients,
        final={n: Part.of(t) for n, t in setup.tensors().items()},
        logits=setup.logits(STEPS - 1),
        validation=setup.validation(),
        local_digest=digest({**local, **setup.optimizer.tensors()}),
        fsdp_rank=setup.mesh.fsdp_group.rank(),
    )


def first_step(case: Case) -> tuple[float, dict[str, Part]]:
    """Loss and clipped gradients of one step."""
    setup = Setup.of(case)
    setup.record_gradients()
    return setup.step(0).loss, setup.clipped


def run_cases(cases: list[Case]) -> dict[str, Outcome]:
    """Every case in turn on the ranks of this world."""
    outcomes = {}
    for case in cases:
        outcomes[case.name] = three_steps(case)
        dist.barrier()
    return outcomes


def relative(value: NDArray[Any], reference: NDArray[Any]) -> float:
    """Norm of the difference over the reference's norm, in float64."""
    difference = float(np.linalg.norm(value.astype(np.float64) - reference.astype(np.float64)))
    return difference / max(float(np.linalg.norm(reference.astype(np.float64))), 1e-30)


def norm_of_gathered(case: Case) -> tuple[float, float]:
    """global_norm of an unclipped gradient and the norm of the gathered one."""
    setup = Setup.of(case)
    seen: list[float] = []
    setup.optimizer.step = partial(_norms, setup, seen)  # type: ignore[method-assign]
    setup.step(0)
    return seen[0], seen[1]


def _norms(setup: Setup, seen: list[float], *_: Any) -> None:
    seen.append(global_norm(setup.optimizer.shards.values(), setup.reduction.replicas))
    gradients = [whole(p.grad) for p in setup.model.parameters() if p.grad is not None]
    seen.append(float(torch.cat([g.double().flatten() for g in gradients]).norm()))
