"""One model, its rows and three optimizer steps, on any layout of ranks."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.helpers.tiny import tiny
from zaya_train.config.derive import Layout
from zaya_train.optim.optimizer import Optimizer
from zaya_train.parallel.apply import chunking_of, parallelize
from zaya_train.parallel.mesh import Mesh
from zaya_train.train.batch import Batch, make_batch
from zaya_train.train.evaluate import validation_losses
from zaya_train.train.step import Rates, StepResult, global_norm, train_step

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from zaya_train.config.schema import TrainConfig
    from zaya_train.model.zaya import ZayaModel

CPU = torch.device("cpu")
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
    """One layout; replicate x shard x context ranks."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    micro_rows: int = 1
    chunks: str = "head_tail"

    @property
    def world(self) -> int:
        return self.replicate * self.shard * self.context

    @property
    def name(self) -> str:
        accumulation = ROWS // (self.replicate * self.shard * self.micro_rows)
        degrees = f"r{self.replicate}s{self.shard}c{self.context}"
        return f"{degrees}-{self.chunks}-{self.micro_rows}rows-{accumulation}micro"


@dataclass(frozen=True, eq=False)
class PackedRow:
    """A packed row, as the loader gives it."""

    tokens: NDArray[np.int64]
    labels: NDArray[np.int64]
    document_lengths: NDArray[np.int32]
    fingerprint: int = 0


def packed_row(seed: int, documents: tuple[int, ...]) -> PackedRow:
    """Random tokens; labels within documents, a few of them unsupervised."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, VOCABULARY, ROW_TOKENS)
    labels = np.full(ROW_TOKENS, -100, dtype=np.int64)
    start = 0
    for length in documents:
        labels[start : start + length - 1] = tokens[start + 1 : start + length]
        start += length
    labels[generator.random(ROW_TOKENS) < 0.2] = -100
    return PackedRow(tokens, labels, np.array(documents, dtype=np.int32))


def rows_of_step(step: int) -> list[PackedRow]:
    return [packed_row(100 * step + i, documents) for i, documents in enumerate(DOCUMENTS)]


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
            "parallel.context_chunks": case.chunks,
            **changes,
        }
    )


@dataclass
class Setup:
    """One rank's model and optimizer."""

    case: Case
    config: TrainConfig
    mesh: Mesh
    model: ZayaModel
    optimizer: Optimizer
    clipped: dict[str, Tensor] = field(default_factory=dict)
    """Gradients as the optimizer saw them last."""

    @staticmethod
    def of(case: Case, **changes: Any) -> Setup:
        config = parity_config(case, **changes)
        mesh = Mesh.build(Layout(case.replicate, case.shard, case.context), "cpu")
        model = parallelize(config, config.model, mesh, CPU)
        optimizer = Optimizer(
            dict(model.named_parameters()),
            [buffer for _, buffer in model.named_buffers()],
            config.model.num_experts,
            config.optim,
            mesh.fsdp_group,
            "eager",
        )
        return Setup(case, config, mesh, model, optimizer)

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches, dealt as the composition root deals them."""
        rows, size = rows_of_step(step), self.case.micro_rows
        unit = self.mesh.layout.data * size
        return [
            make_batch(
                rows[start : start + size],
                chunking_of(self.mesh, self.config),
                self.mesh.context_rank,
                CPU,
            )
            for start in range(self.mesh.data_rank * size, len(rows), unit)
        ]

    def step(self, number: int) -> StepResult:
        rates = Rates(muon=0.02, adamw=0.01, clip_norm=self.config.optim.clip_norm)
        group = self.mesh.fsdp_group
        return train_step(self.model, self.optimizer, self.batches(number), rates, group)

    def validation(self) -> dict[str, float]:
        rows = {"three": rows_of_step(90)[:3], "one": rows_of_step(91)[2:3]}
        chunking = chunking_of(self.mesh, self.config)
        return validation_losses(self.model, rows, self.mesh, chunking, CPU)

    def full(self) -> dict[str, Tensor]:
        """Weights, biases and optimizer state, gathered."""
        tensors: dict[str, Tensor] = {f"model.{n}": p for n, p in self.model.named_parameters()}
        tensors |= {f"model.{n}": b for n, b in self.model.named_buffers()}
        return {n: whole(t) for n, t in (tensors | self.optimizer.tensors()).items()}

    def record_gradients(self) -> None:
        """Keep what the next optimizer steps see."""
        inner = self.optimizer.step

        def step(*arguments: Any) -> None:
            self.clipped = {
                n: whole(p.grad) for n, p in self.model.named_parameters() if p.grad is not None
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
    gradients: list[dict[str, NDArray[np.float32]]]
    """Of every step, clipped."""
    final: dict[str, NDArray[np.generic]]
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
        gradients.append({n: g.numpy() for n, g in setup.clipped.items()})
    local = dict(setup.model.named_parameters()) | dict(setup.model.named_buffers())
    return Outcome(
        losses=[r.loss for r in results],
        norms=[r.grad_norm for r in results],
        supervised=[r.supervised for r in results],
        loads=[r.load.tolist() for r in results],
        gradients=gradients,
        final={n: t.numpy() for n, t in setup.full().items()},
        validation=setup.validation(),
        local_digest=digest({**local, **setup.optimizer.tensors()}),
        fsdp_rank=setup.mesh.fsdp_group.rank(),
    )


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
    seen.append(float(global_norm(setup.optimizer.shards.values(), setup.mesh.fsdp_group)))
    gradients = [whole(p.grad) for p in setup.model.parameters() if p.grad is not None]
    seen.append(float(torch.cat([g.double().flatten() for g in gradients]).norm()))
