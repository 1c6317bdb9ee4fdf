"""A training step of any number of ranks, rehearsed on one without numbers: memory and traffic.

The step is the real one: `parallelize`'s model, `make_batch`, `train_step`, the optimizers. Only
three things stand in for what one process cannot have: torch's fake process group for the other
ranks, fake tensors for floating-point numbers (`rehearsal_meter`), and a routing given beforehand,
written to each layer's tape: tokens fall on the experts evenly.

Not in the figures: what RCCL, hipBLASLt and the allocator's rounding take.
`planning.components.RESERVE` is left free for them.
"""

from __future__ import annotations

import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from zaya_train.config.derive import layout
from zaya_train.parallel.apply import chunking_of, sharded_on_meta
from zaya_train.parallel.fsdp import Reduction
from zaya_train.parallel.mesh import Mesh
from zaya_train.planning.case import Case, halving_documents
from zaya_train.planning.components import STATE, WEIGHTS
from zaya_train.planning.muon import stacks_held
from zaya_train.runtime.device import usable_cores
from zaya_train.tools.random_rows import RandomRow
from zaya_train.tools.rehearsal_meter import Flow, Meter, Peak
from zaya_train.train.batch import Batch, make_batch
from zaya_train.train.built import groups_of, optimizer_of
from zaya_train.train.step import Rates, train_step

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from zaya_train.config.derive import Layout
    from zaya_train.config.schema import PhaseConfig, TrainConfig
    from zaya_train.model.zaya import ZayaModel

CPU = torch.device("cpu")
MICRO_BATCHES = {"keep_unsharded": 2, "all_reduce_last": 3, "reduce_each": 3}
"""Rehearsed at most. The first may gather weights and the last reduce gradients. Where every one
reduces, those between are the fullest: gathered weights stay, beside earlier gradients."""

Flows = dict[tuple[str, str], Flow]


@dataclass(frozen=True)
class Rehearsal:
    """What one optimizer step of a phase takes on rank 0."""

    phase: str
    layout: Layout
    micro_batches: int
    local_tokens: int
    """Of a micro-batch."""
    peaks: dict[str, Peak]
    """Of each stage: forward, backward, optimizer."""
    flows: Flows
    """(kind, axis) -> a step's collectives."""
    seconds: float
    """The rehearsal itself took."""

    @property
    def peak_stage(self) -> str:
        return max(self.peaks, key=lambda stage: self.peaks[stage].bytes)

    @property
    def peak(self) -> Peak:
        return self.peaks[self.peak_stage]

    def layout_of(self, axis: str) -> str:
        """An axis with its degree."""
        first = axis.split(" = ")[0]
        return f"{axis} {getattr(self.layout, first):,}"


@dataclass(frozen=True)
class _Watched(Reduction):
    """A Reduction that notes what was sent before every micro-batch."""

    meter: Meter
    marks: list[Flows]

    def prepare(self, model: ZayaModel, last: bool) -> None:
        """See Reduction."""
        self.marks.append(deepcopy(dict(self.meter.flows)))
        super().prepare(model, last)


def rehearse_phases(
    config: TrainConfig, ranks: int, names: Sequence[str], busiest: float = 1.0
) -> dict[str, Rehearsal]:
    """`rehearse` for several phases, in a process each; phases of one shape are rehearsed once."""
    shapes = {name: _shape(config, name, ranks) for name in names}
    first = {shape: name for name, shape in reversed(shapes.items())}
    workers = min(len(first), usable_cores())
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        jobs = {
            shape: pool.submit(rehearse, config, name, ranks, busiest)
            for shape, name in first.items()
        }
        return {name: replace(jobs[shapes[name]].result(), phase=name) for name in names}


def _shape(config: TrainConfig, name: str, ranks: int) -> tuple[int, ...]:
    """Everything of a phase that a step's memory and traffic follow from."""
    phase = config.plan.phases[name]
    context = layout(phase, config.parallel, ranks).context
    return phase.context_tokens, phase.micro_batch_sequences, phase.global_batch_tokens, context


def rehearse(config: TrainConfig, name: str, ranks: int, busiest: float = 1.0) -> Rehearsal:
    """One step of phase `name` on `ranks` ranks, seen from rank 0, whose shards are the largest.

    Needs a process without a process group. The configuration must have passed `config.check`.
    `busiest` is the share of the tokens that the first expert of every layer takes, over an even
    share.
    """
    started = time.monotonic()
    phase = config.plan.phases[name]
    degrees = layout(phase, config.parallel, ranks)
    count = Case(config, name, ranks).micro_batches
    with _alone(ranks):
        mesh = Mesh.build(degrees, "cpu")
        peaks, flows = _step(config, phase, mesh, (count, busiest))
    return Rehearsal(
        phase=name,
        layout=degrees,
        micro_batches=count,
        local_tokens=phase.context_tokens // degrees.context * phase.micro_batch_sequences,
        peaks=peaks,
        flows=flows,
        seconds=time.monotonic() - started,
    )


@contextmanager
def _alone(ranks: int) -> Iterator[None]:
    """Rank 0 of a process group whose other ranks do not exist."""
    # torch deprecates names that FSDP itself calls.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _step(
    config: TrainConfig, phase: PhaseConfig, mesh: Mesh, work: tuple[int, float]
) -> tuple[dict[str, Peak], Flows]:
    count, busiest = work
    model_config = replace(config.model, rope_base=phase.rope_base)
    # Meshes and sharding read numbers from tensors, which fake ones do not have.
    model = sharded_on_meta(config, model_config, mesh, CPU)
    batch = _batch(config, phase, mesh)
    _give_routing(model, batch, busiest)
    meter = Meter(_axes(mesh), {mesh.fsdp_group.group_name: _held(model, mesh.layout)})
    shown = min(count, MICRO_BATCHES[config.parallel.accumulation])
    with FakeTensorMode(allow_non_fake_inputs=True), meter.counting():
        with meter.labelled(WEIGHTS):
            model.to_empty(device=CPU)
        with meter.labelled(STATE):
            optimizer = optimizer_of(config, model, groups_of(mesh))
        meter.flows.clear()
        reduction = Reduction.of(mesh, config.parallel)
        watched = _Watched(**vars(reduction), meter=meter, marks=[])
        rates = Rates(0.1, 0.1, config.optim.clip_norm, z_loss=config.optim.z_loss)
        train_step(model, optimizer, [batch] * shown, rates, watched)
    return dict(meter.peaks), _whole_step(dict(meter.flows), watched.marks, count - shown)


def _whole_step(flows: Flows, marks: list[Flows], left_out: int) -> Flows:
    """The flows with `left_out` more micro-batches between the first and the last. `marks`: what
    was sent before each that was rehearsed. Of two, what both send is what those between would."""
    if not left_out:
        return flows
    between = marks[1:] if len(marks) > 2 else [marks[1], flows]
    for key, after in between[1].items():
        before, start = marks[1].get(key, Flow()), marks[0].get(key, Flow())
        calls, size = after.calls - before.calls, after.bytes - before.bytes
        if len(marks) == 2:
            calls = min(calls, before.calls - start.calls)
            size = min(size, before.bytes - start.bytes)
        total = flows[key]
        total.calls, total.bytes = total.calls + left_out * calls, total.bytes + left_out * size
    return flows


def _batch(config: TrainConfig, phase: PhaseConfig, mesh: Mesh) -> Batch:
    """Rows of `halving_documents`."""
    tokens = np.arange(phase.context_tokens) % config.model.vocab_size
    row = RandomRow(
        tokens, tokens, np.array(halving_documents(phase.context_tokens), dtype=np.int32)
    )
    rows = [row] * phase.micro_batch_sequences
    return make_batch(rows, chunking_of(mesh, config), mesh.context_rank, CPU)


def _give_routing(model: ZayaModel, batch: Batch, busiest: float) -> None:
    """Write a choice of experts to every layer's tape before its router runs."""
    experts, tokens = model.config.num_experts, batch.tokens.numel()
    to_first = min(tokens, round(busiest * tokens / experts))
    others = torch.arange(tokens - to_first) % max(1, experts - 1) + min(1, experts - 1)
    choice = torch.cat([torch.zeros(to_first, dtype=torch.int64), others]).view(batch.tokens.shape)
    classes = experts + int(model.config.skip_class)
    load = torch.bincount(choice.flatten(), minlength=classes).float()

    def give(_: Any, arguments: tuple[Any, ...]) -> None:
        tape = arguments[3]
        tape.choice, tape.load = choice, load

    for layer in model.layers:
        layer.get_submodule("moe.router").register_forward_pre_hook(give)


def _axes(mesh: Mesh) -> dict[str, str]:
    """What each process group is called: its axis, or axes that are the same ranks."""
    assert dist.group.WORLD is not None
    names: dict[str, list[str]] = {dist.group.WORLD.group_name: ["world"]}
    for axis, group in mesh.named_groups():
        known = names.setdefault(group.group_name, [])
        known += [axis] if axis not in known else []
    return {group: " = ".join(axes) for group, axes in names.items()}


def _held(model: ZayaModel, degrees: Layout) -> Tensor:
    """[fsdp ranks, Muon's parameters]: matrices of each stack on every rank of an FSDP group, what
    ranks tell each other when the optimizer is made."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return torch.tensor(stacks_held(shapes, degrees.fsdp, degrees.expert))
