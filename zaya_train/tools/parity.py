"""`zaya parity`: does a run with experts in fp8 follow the curve of the same run without.

Three short runs from the same weights over the same rows, by the trainer's own step: experts in
the compute dtype, the same by another kernel that rounds otherwise and computes the same (what any
change of rounding does to the curve), and as configured. `parity_verdict` judges them.

Nothing is saved but the verdict. Weights are `checkpoint.branch_from`'s with its optimizer and its
place in the plan, `checkpoint.initial_weights`', or fresh ones at the plan's first step.
"""

from __future__ import annotations

import gc
import logging
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zaya_train.config.build import to_dict
from zaya_train.config.derive import layout
from zaya_train.config.errors import EXIT_OK, ConfigError
from zaya_train.config.kernel_rules import EMULATED
from zaya_train.data.check import check_corpora
from zaya_train.data.stream import PhaseStream, past_phases
from zaya_train.parallel.apply import chunking_of
from zaya_train.parallel.collectives import sum_over
from zaya_train.parallel.fsdp import Reduction
from zaya_train.parallel.mesh import Mesh
from zaya_train.phases.plan import batch_sequences
from zaya_train.planning.expected import check_memory
from zaya_train.run import load_initial_weights
from zaya_train.runtime.device import check_kernels, rank_memory
from zaya_train.runtime.dist import fail_fast, shorten_timeouts, start, stop
from zaya_train.runtime.seeds import seed_rank
from zaya_train.tools.parity_verdict import EXIT_APART, Curve, compare, write
from zaya_train.train.built import build_phase
from zaya_train.train.checkpoint import CheckpointStore
from zaya_train.train.entry import branch_point, check_entry, check_paths
from zaya_train.train.feed import Feed, step_starts
from zaya_train.train.guard import norm_limit, remember
from zaya_train.train.loop import rates
from zaya_train.train.peers import Peers
from zaya_train.train.state import TrainState
from zaya_train.train.step import train_step

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from zaya_train.config.schema import TrainConfig
    from zaya_train.runtime.dist import Ranks
    from zaya_train.train.built import Built
    from zaya_train.train.restore import Found

log = logging.getLogger(__name__)

Gradients = dict[str, "Tensor"]


@dataclass(frozen=True)
class ParityRequest:
    """What to compare, over how many steps, and the folder of the verdict."""

    config: TrainConfig
    output: Path
    steps: int = 20


@dataclass(frozen=True)
class Start:
    """Where all runs begin."""

    ranks: Ranks
    mesh: Mesh
    state: TrainState
    found: Found | None
    store: CheckpointStore | None
    """Reads `found`."""


def parity(request: ParityRequest, console: Console) -> int:
    """Run, print on rank 0 and leave PARITY in `request.output`; 0, or 1 where fp8 does not hold.

    `request.config` is checked for this launch. ConfigError and DataError for what cannot be
    compared, before anything is built.
    """
    config = request.config
    _check(request)
    check_paths(config)
    corpora = check_corpora(config)
    with ExitStack() as stack:
        ranks = start(config.runtime)
        stack.callback(stop)
        stack.enter_context(fail_fast(ranks))
        check_kernels(config.kernels, config.precision, ranks.device)
        memory = rank_memory(ranks.device, ranks.local_world_size)
        tight = check_memory(config, ranks.world_size, ranks.local_world_size, *memory)
        if tight and ranks.rank == 0:
            console.print(tight, markup=False)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        branch = config.checkpoint.branch_from
        found = branch_point(Path(branch), Peers.world()) if branch else None
        state = TrainState.from_dict(found.record.train_state) if found else TrainState()
        if found:
            check_entry(found, config, corpora, own=False)
        name = _phase_at(request, state)
        degrees = layout(config.plan.phases[name], config.parallel, ranks.world_size)
        _check_steps(request, name, state, degrees.data)
        mesh = Mesh.build(degrees, ranks.device.type)
        store = None
        if found:
            store = CheckpointStore(scratch / "none", 2, device=ranks.device)
            stack.callback(store.close)
        begin = Start(ranks, mesh, state, found, store)
        curves = _curves(request, begin, name)
        verdict = compare(config, name, state.step, curves)
        if ranks.rank == 0:
            write(verdict, request.output, console)
    return EXIT_OK if verdict.holds else EXIT_APART


def _check(request: ParityRequest) -> None:
    if request.config.precision.expert_dtype != "fp8":
        raise ConfigError(
            "precision.expert_dtype=compute_dtype: zaya parity compares experts in fp8 with those "
            "of the same run without; add precision=fp8_experts and a kernels.grouped_mlp for it"
        )
    if request.steps < 1:
        raise ConfigError(f"--steps {request.steps}: must be at least 1")


def _phase_at(request: ParityRequest, state: TrainState) -> str:
    """The phase that goes on from `state`."""
    config, names = request.config, list(request.config.plan.phases)
    if state.phase_index >= len(names):
        raise ConfigError(f"checkpoint.branch_from: {config.checkpoint.branch_from} ends the plan")
    name = names[state.phase_index]
    if config.run.only_phase not in (None, name):
        raise ConfigError(
            f"run.only_phase={config.run.only_phase}: what is there to start from is in {name}; "
            "name a checkpoint of that phase's beginning in checkpoint.branch_from"
        )
    return name


def _check_steps(request: ParityRequest, name: str, state: TrainState, data_ranks: int) -> None:
    """ConfigError where phase `name` has too few steps left."""
    phase = request.config.plan.phases[name]
    starts = step_starts(phase, state.phase_rows, data_ranks * phase.micro_batch_sequences)
    left = sum(1 for _ in islice(starts, request.steps))
    if left < request.steps:
        raise ConfigError(f"--steps {request.steps}: phase {name} has {left} steps left")


def arms_of(config: TrainConfig) -> dict[str, TrainConfig]:
    """Curve's name -> its configuration: apart from the experts' products they are alike."""
    plain = replace(config.precision, expert_dtype="compute_dtype")
    own = config.kernels.grouped_mlp

    def by(backend: str) -> TrainConfig:
        kernels = replace(config.kernels, grouped_mlp=backend)  # type: ignore[arg-type]
        return replace(config, kernels=kernels, precision=plain)

    return {
        "without": by("eager" if own in EMULATED else own),
        "rounding": by("reference"),
        "fp8": config,
    }


def _curves(request: ParityRequest, begin: Start, name: str) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    first: Gradients = {}
    for arm, config in arms_of(request.config).items():
        curves[arm], gradients = _curve(config, begin, name, request.steps)
        if not first:
            first = gradients
        errors = {
            key: _distance(value, first[key], begin.ranks.device)
            for key, value in gradients.items()
        }
        curves[arm] = replace(curves[arm], gradient_errors=errors)
        # FSDP modules hang in reference cycles: without this two runs' weights would be alive.
        del gradients
        gc.collect()
    return curves


def _curve(config: TrainConfig, begin: Start, name: str, steps: int) -> tuple[Curve, Gradients]:
    """So many steps from `begin`, and some experts' gradients of the first one."""
    ranks = begin.ranks
    seed_rank(config.run.seed, ranks.rank)
    built = _built(config, begin, name)
    past = past_phases(config.plan.phases, begin.state.past_rows)
    stream = PhaseStream(config.data, name, built.phase, config.run.seed, past)
    unit = built.mesh.layout.data * built.phase.micro_batch_sequences
    chunking = chunking_of(built.mesh, config)
    feed = Feed(stream, built.phase, built.mesh, chunking, ranks.device, unit)
    reduction = Reduction.of(built.mesh, config.parallel)
    gradients: Gradients = {}
    curve, state = Curve(), begin.state

    def mark(part: str) -> None:
        if part == "exchange" and not gradients:
            gradients.update(_expert_gradients(built))

    for _ in range(steps):
        rows = batch_sequences(built.phase, state.phase_rows, unit)
        consumed = (state.phase_rows + rows) * built.phase.context_tokens
        now = rates(built.phase, config.optim, consumed, norm_limit(state.norms, config.guard))
        result = train_step(
            built.model, built.optimizer, feed.batches(state.phase_rows), now, reduction, mark=mark
        )
        state = state.after_step(
            rows, built.phase.context_tokens, result.supervised, result.applied
        )
        if result.applied:
            state = remember(state, result.grad_norm, config.guard)
        if not curve.losses:
            shorten_timeouts(config.runtime.step_timeout_seconds, built.mesh.groups)
        curve = curve.after(result)
    return curve, gradients


def _built(config: TrainConfig, begin: Start, name: str) -> Built:
    """The phase with the weights that all runs start from."""
    phase = config.plan.phases[name]
    built = build_phase(config, (name, phase), begin.mesh, begin.ranks.device)
    if begin.found and begin.store:
        begin.store.load(begin.found, built.tensors(), to_dict(built.model_config))
    elif config.checkpoint.initial_weights:
        load_initial_weights(built, Path(config.checkpoint.initial_weights))
    return built


def _expert_gradients(built: Built) -> Gradients:
    """Copies, in host memory, of the first, the middle and the last layer's: this rank's parts."""
    last = built.model_config.num_layers - 1
    layers = {0, (last + 1) // 2, last}
    return {
        key: shard.grad.float().cpu()
        for key, shard in built.optimizer.shards.items()
        if ".experts." in key and any(f"layers.{layer}." in key for layer in layers)
    }


def _distance(found: Tensor, expected: Tensor, device: torch.device) -> float:
    """Norm of the difference over the norm of what is expected, over all ranks; collective."""
    squares = [x.double().square().sum() for x in (found - expected, expected)]
    difference, whole = sum_over(torch.stack(squares).to(device)).tolist()
    return float((difference / max(whole, 1e-300)) ** 0.5)
