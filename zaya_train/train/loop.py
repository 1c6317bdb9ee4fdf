"""The loop over one phase: fetch, step, report, evaluate, save, until the phase is done or a stop
signal arrives.

Legend: L layers, C router classes, E experts.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from zaya_train.config.derive import phase_sequences
from zaya_train.config.errors import NumericsError
from zaya_train.phases.plan import batch_sequences, schedule_factor
from zaya_train.train.guard import RollBack, Skipped, norm_limit, remember
from zaya_train.train.observe import observations, watched
from zaya_train.train.step import Rates, StepResult, pass_over, train_step
from zaya_train.train.step_line import step_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from zaya_train.config.faults import GuardConfig
    from zaya_train.config.schema import OptimConfig, PhaseConfig
    from zaya_train.model.zaya import ZayaModel
    from zaya_train.optim.optimizer import Optimizer
    from zaya_train.parallel.fsdp import Reduction
    from zaya_train.train.batch import Batch
    from zaya_train.train.guard import Guard
    from zaya_train.train.metrics import MetricsWriter
    from zaya_train.train.observe import StreamWatch
    from zaya_train.train.state import TrainState
    from zaya_train.train.throughput import Throughput
    from zaya_train.train.trace import RoutingTrace

log = logging.getLogger(__name__)


class BatchSource(Protocol):
    """Iterator over steps' micro-batches with the time its consumer has waited."""

    wait_seconds: float

    def __iter__(self) -> Iterator[list[Batch]]: ...

    def __next__(self) -> list[Batch]: ...


@dataclass(frozen=True)
class Hooks:
    """What the loop calls beside the step; all collective."""

    evaluate: Callable[[TrainState], None]
    save: Callable[[TrainState, bool], None]
    """Called with the state and whether the save is required, so that its failure ends the run."""
    first_step_done: Callable[[], None]
    progress: Callable[[TrainState, StepResult], None]
    stop_signal: Callable[[], int]
    """Signal this rank has received, 0 for none."""
    memory_bytes: Callable[[], int]
    mark: Callable[[str, int], None]
    """Told what part of which step begins (runtime.heartbeat)."""
    step_done: Callable[[float, float], None]
    """Told the seconds of the step and of its wait for data."""


@dataclass(frozen=True)
class PhaseRun:
    """Everything one phase's loop works with."""

    name: str
    phase: PhaseConfig
    model: ZayaModel
    optimizer: Optimizer
    optim: OptimConfig
    reduction: Reduction
    unit: int
    """Rows of one micro-batch over all data ranks."""
    num_experts: int
    metrics: MetricsWriter
    log_every_steps: int
    eval_every_steps: int
    save_every_steps: int
    guard: Guard
    drawn: Callable[[int], dict[str, int]]
    """Rows of every source among the phase's first n."""
    trace: RoutingTrace
    hooks: Hooks
    throughput: Throughput


def rates(
    phase: PhaseConfig, optim: OptimConfig, phase_tokens: int, norm_limit: float = math.inf
) -> Rates:
    """Settings of the step that brings the phase to `phase_tokens` consumed tokens."""
    total = phase_sequences(phase) * phase.context_tokens
    factor = schedule_factor(phase.schedule, phase_tokens, total) * phase.learning_rate_scale
    return Rates(
        muon=optim.muon.learning_rate * factor,
        adamw=optim.adamw.learning_rate * factor,
        clip_norm=optim.clip_norm,
        norm_limit=norm_limit,
        z_loss=optim.z_loss,
    )


def run_phase(run: PhaseRun, batches: BatchSource, state: TrainState) -> tuple[TrainState, bool]:
    """Train to the end of the phase.

    Returns the state and whether a stop signal ended it early; then a checkpoint has been saved.
    While steps are being skipped only a stop signal saves: another save would rotate an older
    checkpoint away for the weights before them again. A phase that was shortened to end where it
    stands makes no step, and is evaluated for its gate.

    NumericsError naming the step, or RollBack, after `guard.most_skipped` skipped steps in a row;
    NumericsError where replicas differ.
    """
    first, owed = True, False
    if state.phase_rows >= phase_sequences(run.phase) and run.eval_every_steps:
        run.hooks.evaluate(state)
    while state.phase_rows < phase_sequences(run.phase):
        rows = batch_sequences(run.phase, state.phase_rows, run.unit)
        state, result = _one_step(run, batches, state, rows)
        if first:
            run.hooks.first_step_done()
            first = False
        run.hooks.progress(state, result)
        last = state.phase_rows >= phase_sequences(run.phase)
        if run.eval_every_steps and (last or state.step % run.eval_every_steps == 0):
            run.hooks.evaluate(state)
        if result.stop_signal and not last:
            log.warning("stop signal %d: saving at step %d", result.stop_signal, state.step)
            run.hooks.save(state, True)
            return state, True
        owed = owed or state.step % run.save_every_steps == 0
        if owed and not state.skipped_in_a_row and not last:
            run.hooks.save(state, False)
            owed = False
    return state, False


def _one_step(
    run: PhaseRun, batches: BatchSource, state: TrainState, rows: int
) -> tuple[TrainState, StepResult]:
    start, waited = time.perf_counter(), batches.wait_seconds
    number = state.step + 1
    run.hooks.mark("data", number)
    micro_batches = next(batches)
    data_seconds = batches.wait_seconds - waited
    consumed = (state.phase_rows + rows) * run.phase.context_tokens
    now = rates(run.phase, run.optim, consumed, norm_limit(state.norms, run.guard.config))
    logged = number % run.log_every_steps == 0
    try:
        with (
            watched(run.model, logged) as watch,
            run.trace.recording(run.model, run.optimizer.balancing, number) as recorder,
        ):
            result = _take(run, micro_batches, now, state)
    except NumericsError as error:
        raise NumericsError(f"step {number}: {error}") from error
    state = state.after_step(rows, run.phase.context_tokens, result.supervised, result.applied)
    if result.applied:
        state = remember(state, result.grad_norm, run.guard.config)
    seconds = time.perf_counter() - start
    run.hooks.step_done(seconds, data_seconds)
    if recorder:
        run.trace.write(number, recorder, result)
    if watch:
        timing = (seconds, data_seconds, rows * run.phase.context_tokens / seconds)
        _report(run, state, result, now, timing, _observed(run, state, watch))
    if result.finding is not None:
        _skipped(run, state, result, rows, now.norm_limit)
    return state, result


def _take(run: PhaseRun, micro_batches: list[Batch], now: Rates, state: TrainState) -> StepResult:
    """The step after `state`; over rows that a roll back avoids, only their count."""
    if state.avoids:
        return pass_over(run.optimizer, micro_batches, run.hooks.stop_signal())
    return train_step(
        run.model,
        run.optimizer,
        micro_batches,
        now,
        run.reduction,
        run.hooks.stop_signal(),
        lambda part: run.hooks.mark(part, state.step + 1),
    )


def _skipped(run: PhaseRun, state: TrainState, result: StepResult, rows: int, limit: float) -> None:
    """Record a skipped step; raise where it is one too many in a row."""
    assert result.finding is not None
    action = _action(run.guard.config, state)
    run.guard.record(
        Skipped(
            state=state,
            rows=rows,
            reason=result.reason,
            loss=result.loss,
            norm=result.grad_norm,
            limit=limit,
            finding=result.finding,
            action=action,
        )
    )
    if action == "skipped":
        return
    in_a_row = state.skipped_in_a_row
    if action == "rolled back":
        new = (state.streak_first_row, state.phase_rows)
        raise RollBack(state.phase_index, (*state.avoided, new))
    raise NumericsError(
        f"step {state.step}: {in_a_row} steps in a row skipped, the last one for: {result.reason} "
        f"(guard.most_skipped {run.guard.config.most_skipped}, roll backs in this phase: "
        f"{len(state.avoided)}); stopped before good checkpoints rotate away; see "
        f"{run.guard.incidents.path.name}"
    )


def _action(config: GuardConfig, state: TrainState) -> str:
    if state.skipped_in_a_row < config.most_skipped:
        return "skipped"
    may = config.at_limit == "roll_back" and len(state.avoided) < config.most_roll_backs
    return "rolled back" if may else "stopped"


def _observed(run: PhaseRun, state: TrainState, watch: StreamWatch) -> dict[str, Any]:
    """The fields of the metrics row that the step itself does not need; collective."""
    memory = run.hooks.memory_bytes()
    return {
        "memory_bytes": memory,
        **observations(watch, run.optimizer, run.reduction.replicas, memory),
        "drawn_rows": run.drawn(state.phase_rows),
    }


def _report(
    run: PhaseRun,
    state: TrainState,
    result: StepResult,
    now: Rates,
    timing: tuple[float, float, float],
    observed: dict[str, Any],
) -> None:
    """The console line and the metrics row of one step."""
    seconds, data_seconds, speed = timing
    row = {
        "step": state.step,
        "phase": run.name,
        "phase_step": state.phase_step,
        "tokens": state.tokens,
        "loss": result.loss,
        **({"z_loss": result.z_loss} if now.z_loss else {}),
        "grad_norm": result.grad_norm,
        "muon_lr": now.muon,
        "adamw_lr": now.adamw,
        "supervised_tokens": result.supervised,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "tokens_per_second": speed,
        "applied": result.applied,
        **({"reason": result.reason} if result.reason else {}),
        **run.throughput.of(result, seconds),
        **load_summary(result.load, run.num_experts),
        **observed,
    }
    run.metrics.write("step", **row)
    rows_left = max(0, phase_sequences(run.phase) - state.phase_rows)
    left = rows_left * run.phase.context_tokens / speed
    log.info("%s", step_line(row, run.throughput.ranks, left))


def load_summary(load: Tensor, num_experts: int) -> dict[str, Any]:
    """Shares, normalised entropy, skip rate and largest violation of a load [L, C].

    load_entropy: H(p) / ln E averaged over layers, p over experts (2605.05365, II-A2).
    max_violation: max_e p_e E - 1 over the experts of the worst layer (arXiv 2408.15664, MaxVio).
    All but the shares, which are 0, are NaN of a step without tokens: its rows were passed over.
    """
    if not bool(load.any()):
        nothing = ("load_entropy", "skip_rate", "max_violation")
        return {"load": load.tolist(), **dict.fromkeys(nothing, math.nan)}
    share = load / load.sum(dim=1, keepdim=True).clamp_min(1)
    experts = load[:, :num_experts]
    p = experts / experts.sum(dim=1, keepdim=True).clamp_min(1)
    entropy = -(p * p.clamp_min(1e-30).log()).sum(dim=1)
    normaliser = math.log(num_experts) if num_experts > 1 else 1.0
    return {
        "load": share.tolist(),
        "load_entropy": float(entropy.mean() / normaliser),
        "skip_rate": float(share[:, num_experts:].sum(dim=1).mean()),
        "max_violation": float((p.max(dim=1).values * num_experts - 1).max()),
    }
