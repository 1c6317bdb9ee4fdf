"""Composition root of a training run: runtime, then phase by phase mesh, model, optimizer, data,
loop.

Every phase starts from the newest checkpoint that verifies, whether the process lived on from the
phase before or was started again: one code path for the first start, a resume and a phase change.
"""

from __future__ import annotations

import gc
import logging
import math
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from zaya_train.config.build import to_dict
from zaya_train.config.derive import Layout, config_hash, layout, layout_notes, phase_sequences
from zaya_train.config.errors import EXIT_OK, EXIT_REQUEUE, NumericsError
from zaya_train.context import Context
from zaya_train.data.check import check_corpora, keep_tokenizer
from zaya_train.data.ledger import LedgerWriter, PhaseEntry
from zaya_train.data.lengths import document_tokens
from zaya_train.data.stream import PhaseStream, past_phases, prefetch, validation_rows
from zaya_train.data.survey import say_passes, survey
from zaya_train.hub.config import config_from_hf, require_same_model
from zaya_train.hub.convert import read_hf
from zaya_train.parallel.apply import chunking_of
from zaya_train.parallel.fsdp import Reduction
from zaya_train.parallel.mesh import Mesh
from zaya_train.phases.chain import only_phase_is_done
from zaya_train.phases.gates import WITHOUT_STEP
from zaya_train.phases.lineage import lineage
from zaya_train.planning.case import Case
from zaya_train.planning.expected import check_memory, expectation, slow_steps
from zaya_train.runtime.device import check_kernels, describe, peak_memory_bytes, rank_memory
from zaya_train.runtime.dist import fail_fast, shorten_timeouts, start, stop
from zaya_train.runtime.heartbeat import start_heartbeat
from zaya_train.runtime.log import logging_to
from zaya_train.runtime.lost import naming_lost_ranks
from zaya_train.runtime.peaks import peaks_of
from zaya_train.runtime.replays import Replays
from zaya_train.runtime.seeds import seed_rank
from zaya_train.runtime.signals import StopFlag
from zaya_train.runtime.versions import versions
from zaya_train.train.attempts import Attempt
from zaya_train.train.built import build_phase
from zaya_train.train.checkpoint import CheckpointStore
from zaya_train.train.entry import check_entry, check_paths, starting_point
from zaya_train.train.evaluate import validation_losses
from zaya_train.train.feed import Feed, step_starts
from zaya_train.train.guard import Guard, Incidents, RollBack
from zaya_train.train.identity import identity_of
from zaya_train.train.loop import Hooks, PhaseRun, load_summary, run_phase
from zaya_train.train.manifest import CheckpointRecord
from zaya_train.train.metrics import MetricsWriter
from zaya_train.train.peers import Peers
from zaya_train.train.progress import PhaseProgress
from zaya_train.train.saving import Saver
from zaya_train.train.state import TrainState
from zaya_train.train.throughput import Throughput
from zaya_train.train.trace import RoutingTrace

if TYPE_CHECKING:
    from zaya_train.config.schema import PhaseConfig, TrainConfig
    from zaya_train.train.built import Built
    from zaya_train.train.restore import Found
    from zaya_train.train.step import StepResult

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


def train(config: TrainConfig) -> int:
    """Run the plan to its end or to a stop signal; returns the exit code (0 or 75).

    `config` is checked for this launch (config.check), which needs no torch. ConfigError and
    friends are raised before anything is allocated.
    """
    check_paths(config)
    with ExitStack() as stack:
        flag = stack.enter_context(StopFlag())
        heartbeat = start_heartbeat()
        stack.callback(heartbeat.close)
        corpora = check_corpora(config)
        passes = survey(config)
        ranks = start(config.runtime)
        flag.arm()
        stack.callback(stop)
        check_kernels(config.kernels, config.precision, ranks.device)
        memory = rank_memory(ranks.device, ranks.local_world_size)
        tight = check_memory(config, ranks.world_size, ranks.local_world_size, *memory)
        console = Console(stderr=True)
        run_dir = Path(config.run.dir)
        stack.enter_context(logging_to(run_dir, ranks.rank, console))
        # Inside the log, so that the failure is in it; a failing rank never reaches `stop`, which
        # would wait for its peers.
        stack.enter_context(fail_fast(ranks))
        seed_rank(config.run.seed, ranks.rank)
        store = CheckpointStore(
            run_dir / CHECKPOINTS,
            config.checkpoint.keep_last,
            keep_every_steps=config.checkpoint.keep_every_steps,
            device=ranks.device,
        )
        stack.callback(store.close)
        replays = stack.enter_context(Replays(config.logging, run_dir, enabled=ranks.rank == 0))
        metrics = stack.enter_context(MetricsWriter(run_dir, enabled=ranks.rank == 0))
        ledger = LedgerWriter(run_dir, enabled=ranks.rank == 0)
        stack.callback(ledger.close)
        incidents = Incidents(run_dir, metrics.attempt, enabled=ranks.rank == 0)
        stack.callback(incidents.close)
        stack.enter_context(saver := Saver(store, metrics, run_dir, config.checkpoint, ledger.sync))
        # Leaving may wait for the save under way: the supervisor must not call that a hang.
        stack.callback(heartbeat.mark, "save")
        identity = identity_of(config, corpora, ranks.world_size, versions(ranks.device))
        context = Context(
            config=config,
            ranks=ranks,
            run_dir=run_dir,
            console=console,
            store=store,
            saver=saver,
            metrics=metrics,
            flag=flag,
            corpora=corpora,
            meshes={},
            ledger=ledger,
            heartbeat=heartbeat,
            incidents=incidents,
            attempt=Attempt(config, identity, run_dir, metrics, ranks.rank, ranks.device),
            replays=replays,
            peaks=peaks_of(ranks.device, config.precision),
        )
        _describe(context, tight)
        if ranks.rank == 0:
            say_passes(passes)
        return _run_plan(context)


def _describe(context: Context, tight: str) -> None:
    name, world = context.config.run.name, context.ranks.world_size
    device = describe(context.ranks.device)
    log.info("run %s in %s: ranks %d, %s", name, context.run_dir, world, device)
    log.info("%s", context.peaks)
    for warning in (tight, slow_steps(context.config, world, context.peaks.measured)):
        if warning and context.ranks.rank == 0:
            log.warning("%s", warning)
    for note in layout_notes(context.config, world):
        log.info("%s", note)


def _run_plan(context: Context) -> int:
    config = context.config
    phases = list(config.plan.phases.items())
    first, back = True, None
    while True:
        context.heartbeat.mark("save")
        context.saver.settle()
        context.heartbeat.mark("load")
        found = starting_point(context.store, config.checkpoint.branch_from, Peers.world())
        state = TrainState.from_dict(found.record.train_state) if found else TrainState()
        own = found is not None and found.path.parent == context.store.root
        if found:
            check_entry(found, config, context.corpora, own)
        if back:
            state = _rolled_back(context, state, back)
            back = None
        # May refuse the run, so before anything is written about this attempt.
        enough = only_phase_is_done(config, state.phase_index)
        if first:
            context.attempt.announce(state.step, found.path if found else None, own)
            context.replays.start()
            first = False
        if state.phase_index >= len(phases):
            context.metrics.write("done", step=state.step)
            log.info("done after %d steps and %s tokens", state.step, f"{state.tokens:,}")
            return EXIT_OK
        if enough:
            return EXIT_OK
        try:
            if _run_phase(context, phases[state.phase_index], found, state):
                return EXIT_REQUEUE
        except RollBack as asked:
            back = asked
        # FSDP modules hang in reference cycles: without this two phases' weights would be alive.
        gc.collect()


def _rolled_back(context: Context, state: TrainState, back: RollBack) -> TrainState:
    """The checkpoint's state with the rows to pass over; the record says that steps are undone."""
    context.ledger.rewind()
    context.attempt.rolled_back(state.step, back.avoided[-1])
    if state.phase_index != back.phase_index:
        # No checkpoint of the phase is whole: the rows are those of another one.
        return state
    return replace(state, avoided=back.avoided)


def _run_phase(
    context: Context, row: tuple[str, PhaseConfig], found: Found | None, state: TrainState
) -> bool:
    """One phase from the checkpoint `found` (or from scratch); True if a stop signal ended it."""
    name, phase = row
    config = context.config
    degrees = layout(phase, config.parallel, context.ranks.world_size)
    past = past_phases(config.plan.phases, state.past_rows)
    stream = PhaseStream(config.data, name, phase, config.run.seed, past)
    context.ledger.phase(PhaseEntry(name, state.step, stream.describe()), state.phase_rows)
    with naming_lost_ranks(degrees, config.runtime.step_timeout_seconds):
        built = _built(context, (name, phase), degrees, found)
        if context.ranks.rank == 0:
            keep_tokenizer(config, context.run_dir / TOKENIZER)
        context.metrics.write(
            "phase", name=name, event="begin", step=state.step, **_expected(context, name)
        )
        state, stopped, measured = _steps(context, built, stream, state)
        if stopped:
            return True
        drawn = stream.drawn(state.phase_rows)
        ended = {"step": state.step, "tokens": state.tokens, "drawn_rows": drawn}
        context.metrics.write("phase", name=name, event="end", **ended)
        log.info("phase %s drew rows %s", name, ", ".join(f"{s} {n:,}" for s, n in drawn.items()))
        _save(context, built, state.next_phase(measured), required=True, keep=True)
        return _asked_to_stop(context, state)


def _expected(context: Context, name: str) -> dict[str, Any]:
    """What the planner forecasts of the phase, to stand beside what is measured."""
    config, ranks = context.config, context.ranks
    if ranks.rank:
        return {}
    tokens = document_tokens(config.data, config.plan.phases[name])
    case = Case(config, name, ranks.world_size)
    device = describe(ranks.device)
    return expectation(case, device.name, ranks.local_world_size, tokens, device.units)


def _asked_to_stop(context: Context, state: TrainState) -> bool:
    """Whether a rank has heard a stop signal since the last step of a phase that others follow."""
    number = max(Peers.world().gather(int(context.flag.received or 0)))
    plan = context.config.plan.phases
    ahead = state.phase_index + 1 < len(plan) and context.config.run.only_phase is None
    if number and ahead:
        log.warning("stop signal %d: the phase that follows is left to the next attempt", number)
    return bool(number and ahead)


def _built(
    context: Context, row: tuple[str, PhaseConfig], degrees: Layout, found: Found | None
) -> Built:
    """The phase's model and optimizer with the weights and state it starts from."""
    config = context.config
    if degrees not in context.meshes:
        context.meshes[degrees] = Mesh.build(degrees, context.ranks.device.type)
    built = build_phase(config, row, context.meshes[degrees], context.ranks.device)
    if found:
        context.store.load(found, built.tensors(), to_dict(built.model_config))
    elif config.checkpoint.initial_weights:
        load_initial_weights(built, Path(config.checkpoint.initial_weights))
    context.saver.reserve(built.tensors())
    return built


def _steps(
    context: Context, built: Built, stream: PhaseStream, state: TrainState
) -> tuple[TrainState, bool, dict[str, Any]]:
    """Train the phase: the state, whether a stop signal ended it, and what its gate asks for."""
    feed = _feed(context, built, stream)
    rows_left = phase_sequences(built.phase) - state.phase_rows
    measured: dict[str, Any] = {} if rows_left > 0 else {WITHOUT_STEP: True}
    with ExitStack() as stack:
        bar = stack.enter_context(_progress(context, built.name, built.phase))
        run = _phase_run(context, built, _hooks(context, built, bar, measured), feed)
        starts = step_starts(built.phase, state.phase_rows, feed.unit)
        ahead = prefetch(feed.batches, starts, context.config.data.prefetch_batches)
        batches = stack.enter_context(ahead)
        state, stopped = run_phase(run, batches, state)
    load = measured.pop("load", None)
    if load is not None:
        balance = load_summary(load, built.model_config.num_experts)
        measured |= {key: balance[key] for key in ("skip_rate", "load_entropy")}
    return state, stopped, measured


def load_initial_weights(built: Built, folder: Path) -> None:
    """Weights of a Hugging Face folder into the sharded model, tensor by tensor."""
    theirs = config_from_hf(folder)
    require_same_model(folder, theirs, built.model_config)
    shapes = {n: tuple(t.shape) for n, t in built.model.state_dict().items()}
    built.fill(read_hf(folder, shapes, theirs))
    log.info("weights from %s", folder)


def _feed(context: Context, built: Built, stream: PhaseStream) -> Feed:
    mesh, chunking = built.mesh, chunking_of(built.mesh, context.config)
    unit = mesh.layout.data * built.phase.micro_batch_sequences
    return Feed(stream, built.phase, mesh, chunking, context.ranks.device, unit)


def _progress(context: Context, name: str, phase: PhaseConfig) -> PhaseProgress:
    shown = context.config.logging.progress and context.ranks.rank == 0
    total = phase_sequences(phase) * phase.context_tokens
    return PhaseProgress(context.console if shown else None, name, total)


def _hooks(context: Context, built: Built, bar: PhaseProgress, measured: dict[str, Any]) -> Hooks:
    """What the loop calls; the newest measurements for the phase's gate go into `measured`."""
    config = context.config
    rows = validation_rows(config.data, built.name, built.phase.context_tokens)
    chunking = chunking_of(built.mesh, config)
    device = context.ranks.device

    def evaluate(state: TrainState) -> None:
        if not rows:
            return

        mark = partial(context.heartbeat.mark, "evaluate", state.step)
        losses = validation_losses(built.model, rows, built.mesh, chunking, device, mark)
        if broken := [name for name, loss in losses.items() if not math.isfinite(loss)]:
            raise NumericsError(f"step {state.step}: validation loss of {broken[0]} is not finite")
        measured["validation_loss"] = losses
        context.metrics.write("eval", step=state.step, phase=built.name, losses=losses)
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        log.info("%s step %d | validation %s", built.name, state.step, shown)

    def done(state: TrainState, result: StepResult) -> None:
        context.ledger.step(state.step, state.phase_rows, result.fingerprint)
        bar.update(state.phase_rows * built.phase.context_tokens, result.loss)
        context.saver.report()
        if result.applied:
            measured["load"] = result.load

    return Hooks(
        evaluate=evaluate,
        save=lambda state, required: _save(context, built, state, required),
        first_step_done=lambda: shorten_timeouts(
            config.runtime.step_timeout_seconds,
            built.mesh.groups,
        ),
        progress=done,
        stop_signal=lambda: int(context.flag.received or 0),
        memory_bytes=lambda: peak_memory_bytes(device),
        mark=context.heartbeat.mark,
        step_done=context.heartbeat.step_done,
    )


def _phase_run(context: Context, built: Built, hooks: Hooks, feed: Feed) -> PhaseRun:
    config = context.config
    degree = built.mesh.layout.context
    guard = Guard(config.guard, context.incidents, built.name, feed.dealt, degree)
    return PhaseRun(
        name=built.name,
        phase=built.phase,
        model=built.model,
        optimizer=built.optimizer,
        optim=config.optim,
        reduction=Reduction.of(built.mesh, config.parallel),
        unit=feed.unit,
        num_experts=built.model_config.num_experts,
        metrics=context.metrics,
        log_every_steps=config.logging.every_steps,
        eval_every_steps=config.logging.eval_every_steps,
        save_every_steps=config.checkpoint.every_steps,
        guard=guard,
        drawn=feed.rows.drawn,
        trace=RoutingTrace(context.run_dir, config.logging, context.ranks.rank == 0),
        hooks=hooks,
        throughput=Throughput(built.model_config, context.ranks.world_size, context.peaks),
    )


def _save(
    context: Context, built: Built, state: TrainState, required: bool, keep: bool = False
) -> None:
    record = CheckpointRecord(
        step=state.step,
        phase_name=built.name,
        phase_index=state.phase_index,
        train_state=state.to_dict(),
        model=to_dict(built.model_config),
        mesh=asdict(built.mesh.layout),
        config_hash=config_hash(context.config),
        # A phase that has not begun is not yet part of the past.
        lineage=lineage(
            context.config, state.phase_index - int(state.phase_rows == 0), context.corpora
        ),
        keep=keep,
        identity=context.attempt.identity.to_dict(),
    )
    context.heartbeat.mark("save", state.step)
    context.saver.save(built.tensors(), record, required)
