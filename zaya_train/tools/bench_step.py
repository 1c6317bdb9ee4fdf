"""`zaya bench step`: what a training step takes, and where its time goes.

The steps are the trainer's own: `build_phase`'s model and optimizer on the launch's mesh, batches
through `Feed` and `prefetch`, `run_phase`. Only the rows are made up, so no corpus is needed;
nothing is evaluated and nothing saved. Timed steps run without the profiler; what it shows is a
step of fewer micro-batches behind them, because they repeat and a trace of all would be gigabytes.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile, record_function
from zaya_kernels.backends import RANGE, named_in_profiles

from zaya_train.config.derive import layout, sequences_per_step
from zaya_train.config.errors import ConfigError
from zaya_train.config.suggest import unknown_name
from zaya_train.data.stream import prefetch
from zaya_train.model.cca import CCA
from zaya_train.model.moe import MoE
from zaya_train.parallel.apply import chunking_of
from zaya_train.parallel.fsdp import Reduction
from zaya_train.parallel.mesh import Mesh
from zaya_train.planning.expected import check_memory
from zaya_train.runtime.device import check_kernels, peak_memory_bytes, rank_memory
from zaya_train.runtime.dist import fail_fast, shorten_timeouts, start, stop
from zaya_train.runtime.files import whole_file
from zaya_train.runtime.peaks import peaks_of
from zaya_train.runtime.seeds import seed_rank
from zaya_train.tools.bench_report import TRACE, StepFigures, report
from zaya_train.tools.random_rows import random_row
from zaya_train.tools.trace_groups import STEP
from zaya_train.train.built import build_phase
from zaya_train.train.feed import Feed, step_starts
from zaya_train.train.guard import Guard, Incidents
from zaya_train.train.loop import Hooks, PhaseRun, run_phase
from zaya_train.train.metrics import MetricsWriter, read_metrics
from zaya_train.train.state import TrainState
from zaya_train.train.throughput import Throughput
from zaya_train.train.trace import RoutingTrace

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console
    from torch import nn

    from zaya_train.config.schema import TrainConfig
    from zaya_train.runtime.dist import Ranks
    from zaya_train.runtime.peaks import Peaks
    from zaya_train.tools.random_rows import RandomRow
    from zaya_train.train.built import Built

_BLOCKS = ((CCA, "cca"), (MoE, "moe"))


@dataclass(frozen=True)
class StepRequest:
    """Which steps of which phase to run, and where figures and trace go."""

    config: TrainConfig
    output: Path
    phase: str | None = None
    """None: the plan's first."""
    warm_steps: int = 2
    timed_steps: int = 5
    profiled_micro_batches: int = 2
    """Of the profiled step; 0: no profile."""
    document_tokens: int | None = None
    """Length of the documents in every row; None: one document is the row."""

    @property
    def phase_name(self) -> str:
        return self.phase or next(iter(self.config.plan.phases))


@dataclass(frozen=True)
class RandomRows:
    """Rows by index, all of one make: a `train.feed.Rows` without a corpus."""

    documents: tuple[int, ...]
    row_tokens: int
    vocabulary: int
    seed: int

    def row(self, index: int) -> RandomRow:
        """Every token supervised."""
        return random_row(self.seed + index, self.documents, self.row_tokens, self.vocabulary, 0.0)

    def by_work(self, first: int, stop: int) -> Sequence[int]:
        """All alike."""
        return range(first, stop)

    def drawn(self, index: int) -> dict[str, int]:
        """All of one source."""
        return {"random": index}


class Marks:
    """Ranges of the profiler for every step and its parts, told where they begin by the loop."""

    def __init__(self) -> None:
        self._step: record_function | None = None
        self._part: record_function | None = None

    def part(self, name: str, step: int) -> None:
        """Part `name` begins; the first one of a step begins the step."""
        self._leave_part()
        if self._step is None:
            self._step = record_function(STEP)
            self._step.__enter__()
        self._part = record_function(RANGE + name)
        self._part.__enter__()

    def done(self, *seconds: float) -> None:
        """The step has ended."""
        self._leave_part()
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def _leave_part(self) -> None:
        if self._part is not None:
            self._part.__exit__(None, None, None)
            self._part = None


def bench_step(request: StepRequest, console: Console) -> int:
    """Run the steps, print figures and tables on rank 0 and leave them in `request.output`.

    `request.config` is checked for this launch. ConfigError for what cannot be run, before anything
    is built.
    """
    _check(request)
    with ExitStack() as stack:
        ranks = start(request.config.runtime)
        stack.callback(stop)
        stack.enter_context(fail_fast(ranks))
        check_kernels(request.config.kernels, request.config.precision, ranks.device)
        run = replace(request.config.run, only_phase=request.phase_name)
        own = replace(request.config, run=run)
        memory = rank_memory(ranks.device, ranks.local_world_size)
        tight = check_memory(own, ranks.world_size, ranks.local_world_size, *memory)
        if tight and ranks.rank == 0:
            console.print(tight, markup=False)
        seed_rank(request.config.run.seed, ranks.rank)
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        figures = _measured(request, ranks, scratch)
        if ranks.rank == 0:
            report(figures, request.output, console)
    return 0


def _check(request: StepRequest) -> None:
    phases, name = request.config.plan.phases, request.phase_name
    if name not in phases:
        raise ConfigError(f"--phase {name}: no such phase{unknown_name(name, phases)}")
    for option, value, least in (
        ("--warm", request.warm_steps, 0),
        ("--steps", request.timed_steps, 1),
        ("--profiled", request.profiled_micro_batches, 0),
    ):
        if value < least:
            raise ConfigError(f"{option} {value}: must be at least {least}")
    tokens, row = request.document_tokens, phases[name].context_tokens
    if tokens is not None and not 2 <= tokens <= row:
        raise ConfigError(f"--document-tokens {tokens}: must be 2 to a row's {row}")


def documents_of(row_tokens: int, document_tokens: int | None) -> tuple[int, ...]:
    """Lengths of a row's documents: equal ones, and what is left over."""
    size = document_tokens or row_tokens
    whole, rest = divmod(row_tokens, size)
    return (size,) * whole + ((rest,) if rest else ())


@dataclass(frozen=True)
class Launch:
    """Where all steps run."""

    ranks: Ranks
    peaks: Peaks
    scratch: Path
    """For records that nobody reads afterwards."""


def _measured(request: StepRequest, ranks: Ranks, scratch: Path) -> StepFigures:
    config, name = request.config, request.phase_name
    phase = replace(config.plan.phases[name], batch_ramp=None)
    degrees = layout(phase, config.parallel, ranks.world_size)
    built = build_phase(config, (name, phase), Mesh.build(degrees, ranks.device.type), ranks.device)
    count = sequences_per_step(phase) // (degrees.data * phase.micro_batch_sequences)
    steps = request.warm_steps + request.timed_steps
    # Once, and not within the profile.
    peaks = peaks_of(ranks.device, config.precision)
    launch = Launch(ranks, peaks, scratch)
    rows = _steps(request, built, launch, steps)[request.warm_steps :]
    memory = peak_memory_bytes(ranks.device)
    profiled = min(count, request.profiled_micro_batches)
    if profiled:
        few = replace(phase, global_batch_tokens=phase.global_batch_tokens // count * profiled)
        with _profile(built.model, ranks, request.output / TRACE):
            _steps(request, replace(built, phase=few), launch, 1)
    return StepFigures(
        config=config,
        ranks=ranks,
        phase=name,
        documents=documents_of(phase.context_tokens, request.document_tokens),
        rows=rows,
        micro_batches=count,
        profiled_micro_batches=profiled,
        memory_bytes=memory,
    )


def _steps(request: StepRequest, built: Built, launch: Launch, steps: int) -> list[dict[str, Any]]:
    """Rows of the metrics of so many steps of `built.phase`, from step 1; on rank 0 alone."""
    phase = replace(built.phase, tokens=steps * built.phase.global_batch_tokens)
    built = replace(built, phase=phase)
    folder = Path(tempfile.mkdtemp(dir=launch.scratch))
    main = launch.ranks.rank == 0
    with ExitStack() as stack:
        metrics = stack.enter_context(MetricsWriter(folder, enabled=main))
        incidents = Incidents(folder, metrics.attempt, enabled=main)
        stack.callback(incidents.close)
        feed = _feed(request, built, launch.ranks)
        starts = step_starts(phase, 0, feed.unit)
        ahead = request.config.data.prefetch_batches
        batches = stack.enter_context(prefetch(feed.batches, starts, ahead))
        run = _phase_run(request.config, built, feed, (metrics, incidents), launch)
        run_phase(run, batches, TrainState())
    return [row for row in read_metrics(folder) if row["kind"] == "step"] if main else []


def _feed(request: StepRequest, built: Built, ranks: Ranks) -> Feed:
    phase, config = built.phase, request.config
    documents = documents_of(phase.context_tokens, request.document_tokens)
    rows = RandomRows(
        documents, phase.context_tokens, config.model.vocab_size, 1_000_003 * config.run.seed
    )
    unit = built.mesh.layout.data * phase.micro_batch_sequences
    return Feed(rows, phase, built.mesh, chunking_of(built.mesh, config), ranks.device, unit)


def _phase_run(
    config: TrainConfig,
    built: Built,
    feed: Feed,
    records: tuple[MetricsWriter, Incidents],
    launch: Launch,
) -> PhaseRun:
    """What `run.train` hands to the loop, less evaluation, checkpoints and signals."""
    metrics, incidents = records
    degree = built.mesh.layout.context
    steps = -(-built.phase.tokens // built.phase.global_batch_tokens)
    return PhaseRun(
        name=built.name,
        phase=built.phase,
        model=built.model,
        optimizer=built.optimizer,
        optim=config.optim,
        reduction=Reduction.of(built.mesh, config.parallel),
        unit=feed.unit,
        num_experts=built.model_config.num_experts,
        metrics=metrics,
        log_every_steps=1,
        eval_every_steps=0,
        save_every_steps=steps + 1,
        guard=Guard(config.guard, incidents, built.name, feed.dealt, degree),
        drawn=feed.rows.drawn,
        trace=RoutingTrace(metrics.path.parent, config.logging, enabled=False),
        throughput=Throughput(built.model_config, launch.ranks.world_size, launch.peaks),
        hooks=_hooks(config, built, feed),
    )


def _hooks(config: TrainConfig, built: Built, feed: Feed) -> Hooks:
    marks, seconds = Marks(), config.runtime.step_timeout_seconds
    return Hooks(
        evaluate=lambda state: None,
        save=lambda state, required: None,
        first_step_done=lambda: shorten_timeouts(seconds, built.mesh.groups),
        progress=lambda state, result: None,
        stop_signal=lambda: 0,
        memory_bytes=lambda: peak_memory_bytes(feed.device),
        mark=marks.part,
        step_done=marks.done,
    )


@contextmanager
def _profile(model: nn.Module, ranks: Ranks, target: Path) -> Iterator[None]:
    """Record what runs within; rank 0 leaves its trace at `target`."""
    activities = [ProfilerActivity.CPU]
    if ranks.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with named_in_profiles(), blocks_named(model), profile(activities=activities) as recorded:
        yield
    if ranks.rank == 0:
        with whole_file(target) as partial:
            recorded.export_chrome_trace(str(partial))


@contextmanager
def blocks_named(model: nn.Module) -> Iterator[None]:
    """Within it every attention block is a range `zaya::cca` and every expert block `zaya::moe`:
    what is no operation of its own, such as projections and permutation, is told by them."""
    ranges: list[record_function] = []

    def enter(name: str) -> None:
        ranges.append(record_function(RANGE + name))
        ranges[-1].__enter__()

    handles = []
    for module in model.modules():
        name = next((name for kind, name in _BLOCKS if isinstance(module, kind)), None)
        if name:
            handles += [
                module.register_forward_pre_hook(lambda *_, name=name: enter(name)),
                module.register_forward_hook(
                    lambda *_: ranges.pop().__exit__(None, None, None), always_call=True
                ),
            ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
