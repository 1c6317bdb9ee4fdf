"""Composition root of a training run: runtime, then phase by phase mesh, model, optimizer, data,
loop.

Every phase starts from the newest checkpoint that verifies, whether the process lived on from the
phase before or was started again: one code path for the first start, a resume and a phase change.
"""

from __future__ import annotations

import gc
import logging
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from zaya_train.config.build import to_dict
from zaya_train.config.check import check
from zaya_train.config.derive import (
    Layout,
    config_hash,
    layout,
    layout_notes,
    phase_sequences,
)
from zaya_train.config.diff import model_differences
from zaya_train.config.errors import EXIT_OK, EXIT_REQUEUE, ConfigError
from zaya_train.data.check import check_corpora
from zaya_train.data.ledger import LedgerWriter, PhaseEntry
from zaya_train.data.stream import PhaseStream, past_phases, prefetch, validation_rows
from zaya_train.data.survey import survey
from zaya_train.hub.config import config_from_hf, require_same_model
from zaya_train.hub.convert import read_hf
from zaya_train.optim.exchange import Groups
from zaya_train.optim.optimizer import Optimizer
from zaya_train.optim.table import summary
from zaya_train.parallel.apply import chunking_of, parallelize
from zaya_train.parallel.fsdp import Reduction, write_full
from zaya_train.parallel.mesh import Mesh
from zaya_train.phases.chain import only_phase_is_done
from zaya_train.phases.lineage import changes, lengthened, lineage
from zaya_train.runtime.device import check_kernels, describe, peak_memory_bytes
from zaya_train.runtime.dist import Ranks, fail_fast, shorten_timeouts, start, stop
from zaya_train.runtime.files import copy_folder_once
from zaya_train.runtime.log import logging_to
from zaya_train.runtime.lost import naming_lost_ranks
from zaya_train.runtime.seeds import seed_rank
from zaya_train.runtime.signals import StopFlag
from zaya_train.train.attempts import record_attempt
from zaya_train.train.checkpoint import CheckpointStore
from zaya_train.train.evaluate import validation_losses
from zaya_train.train.feed import Feed, step_starts
from zaya_train.train.followers import open_followers
from zaya_train.train.loop import Hooks, PhaseRun, run_phase
from zaya_train.train.manifest import CheckpointRecord
from zaya_train.train.metrics import MetricsWriter
from zaya_train.train.progress import PhaseProgress
from zaya_train.train.saving import Saver
from zaya_train.train.state import TrainState

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_train.config.schema import ModelConfig, PhaseConfig, TrainConfig
    from zaya_train.model.zaya import ZayaModel
    from zaya_train.train.restore import Found
    from zaya_train.train.step import StepResult

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Context:
    """What lives as long as the process."""

    config: TrainConfig
    ranks: Ranks
    run_dir: Path
    console: Console
    store: CheckpointStore
    saver: Saver
    metrics: MetricsWriter
    flag: StopFlag
    corpora: dict[str, str]
    """Content hash of each source by name."""
    meshes: dict[Layout, Mesh]
    """Made so far: every new mesh makes process groups, which live as long as the process."""
    ledger: LedgerWriter


@dataclass(frozen=True)
class Built:
    """What one phase is made of."""

    name: str
    phase: PhaseConfig
    mesh: Mesh
    model: ZayaModel
    model_config: ModelConfig
    optimizer: Optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds, by stable name. Weights are the optimizer's, always the
        fp32 shards; the model's own are the gathered copies between forward and backward."""
        state: dict[str, Tensor] = {
            f"model.{name}": shard.parameter for name, shard in self.optimizer.shards.items()
        }
        state |= {f"model.{name}": value for name, value in self.model.named_buffers()}
        return state | self.optimizer.tensors()


def train(config: TrainConfig) -> int:
    """Run the plan to its end or to a stop signal; returns the exit code (0 or 75).

    ConfigError and friends are raised before anything is allocated.
    """
    check(config, _launched_ranks())
    corpora = check_corpora(config)
    survey(config)
    ranks = start(config.runtime)
    with ExitStack() as stack:
        stack.callback(stop)
        check_kernels(config.kernels, ranks.device)
        console = Console(stderr=True)
        run_dir = Path(config.run.dir)
        stack.enter_context(logging_to(run_dir, ranks.rank, console))
        # Inside the log, so that the failure is in it; a failing rank never reaches `stop`, which
        # would wait for its peers.
        stack.enter_context(fail_fast(ranks))
        flag = stack.enter_context(StopFlag())
        seed_rank(config.run.seed, ranks.rank)
        store = CheckpointStore(run_dir / CHECKPOINTS, config.checkpoint.keep_last)
        stack.callback(store.close)
        metrics = stack.enter_context(_open_metrics(config, run_dir, ranks))
        saver = Saver(store, metrics, run_dir, config.checkpoint.retry_seconds)
        ledger = LedgerWriter(run_dir, enabled=ranks.rank == 0)
        stack.callback(ledger.close)
        context = Context(
            config, ranks, run_dir, console, store, saver, metrics, flag, corpora, {}, ledger
        )
        _describe(context)
        return _run_plan(context)


def _launched_ranks() -> int:
    value = os.environ.get("WORLD_SIZE", "1")
    if not value.isdecimal():
        raise ConfigError(f"launch environment: WORLD_SIZE={value!r} is not an integer")
    return int(value)


def _open_metrics(config: TrainConfig, run_dir: Path, ranks: Ranks) -> MetricsWriter:
    main, name = ranks.rank == 0, config.run.name
    followers = open_followers(config.logging, run_dir, name, to_dict(config)) if main else []
    return MetricsWriter(run_dir, followers, enabled=main)


def _describe(context: Context) -> None:
    log.info(
        "run %s in %s: %d ranks, %s",
        context.config.run.name,
        context.run_dir,
        context.ranks.world_size,
        describe(context.ranks.device),
    )
    for note in layout_notes(context.config, context.ranks.world_size):
        log.info("%s", note)


def _run_plan(context: Context) -> int:
    phases = list(context.config.plan.phases.items())
    first = True
    while True:
        found = context.store.newest()
        state = TrainState.from_dict(found.record.train_state) if found else TrainState()
        if found:
            _check_lineage(found, state, context)
        if first:
            _announce(context, state, resumed=found is not None)
            first = False
        if state.phase_index >= len(phases):
            context.metrics.write("done", step=state.step)
            log.info("done after %d steps and %s tokens", state.step, f"{state.tokens:,}")
            return EXIT_OK
        if only_phase_is_done(context.config, state.phase_index):
            return EXIT_OK
        if _run_phase(context, phases[state.phase_index], found, state):
            return EXIT_REQUEUE
        # FSDP modules hang in reference cycles: without this two phases' weights would be alive.
        gc.collect()


def _check_lineage(found: Found, state: TrainState, context: Context) -> None:
    """Model, phases and corpora behind the checkpoint must be those of the configuration."""
    config, ours = context.config, to_dict(context.config.model)
    different = changes(found.record.lineage, config, context.corpora)
    different += [f"model.{line}" for line in model_differences(found.record.model, ours)]
    different += lengthened(state.past_rows, config.plan.phases)
    if different:
        raise ConfigError(
            f"{found.path}: was trained under another plan or on other data, so the run cannot "
            f"continue it: {'; '.join(different)}; restore these or choose another run.dir"
        )


def _announce(context: Context, state: TrainState, resumed: bool) -> None:
    """Record this attempt, once nothing speaks against it, and what it changed."""
    changed = {}
    if context.ranks.rank == 0:
        values = to_dict(context.config)
        changed = record_attempt(context.run_dir, context.metrics.attempt, values)
    for key, (old, new) in changed.items():
        log.warning("configuration changed since the attempt before: %s: %s -> %s", key, old, new)
    context.metrics.write(
        "resume" if resumed else "start",
        step=state.step,
        world_size=context.ranks.world_size,
        device=str(context.ranks.device),
        config_hash=config_hash(context.config),
        config_changes=changed,
    )
    if resumed:
        log.info("resuming at step %d, %s tokens", state.step, f"{state.tokens:,}")


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
    built = _build(context, name, phase, degrees)
    if found:
        context.store.load(found, built.tensors(), to_dict(built.model_config))
    elif config.checkpoint.initial_weights:
        _load_initial_weights(built, Path(config.checkpoint.initial_weights))
    if context.ranks.rank == 0:
        copy_folder_once(stream.tokenizer_path, context.run_dir / TOKENIZER)
    context.metrics.write("phase", name=name, event="begin", step=state.step)
    unit = degrees.data * phase.micro_batch_sequences
    with ExitStack() as stack:
        bar = stack.enter_context(_progress(context, name, phase))
        hooks = _hooks(context, built, bar)
        batches = stack.enter_context(
            prefetch(
                _feed(context, built, stream, unit).batches,
                step_starts(phase, state.phase_rows, unit),
                config.data.prefetch_batches,
            )
        )
        stack.enter_context(naming_lost_ranks(degrees, config.runtime.step_timeout_seconds))
        state, stopped = run_phase(_phase_run(context, built, hooks, unit), batches, state)
    if not stopped:
        drawn = stream.drawn(state.phase_rows)
        context.metrics.write("phase", name=name, event="end", step=state.step, drawn_rows=drawn)
        log.info("phase %s drew rows %s", name, ", ".join(f"{s} {n:,}" for s, n in drawn.items()))
        _save(context, built, state.next_phase(), required=True, keep=True)
    return stopped


def _build(context: Context, name: str, phase: PhaseConfig, degrees: Layout) -> Built:
    config = context.config
    if degrees not in context.meshes:
        context.meshes[degrees] = Mesh.build(degrees, context.ranks.device.type)
    mesh = context.meshes[degrees]
    model_config = replace(config.model, rope_base=phase.rope_base)
    model = parallelize(config, model_config, mesh, context.ranks.device)
    optimizer = Optimizer(
        dict(model.named_parameters()),
        [buffer for _, buffer in model.named_buffers()],
        model_config.num_experts,
        config.optim,
        Groups(mesh.fsdp_group, mesh.sharding.get_group("replicate")),
        config.kernels.newton_schulz,
    )
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    log.info(
        "phase %s: %d tokens of context, mesh %s\n%s",
        name,
        phase.context_tokens,
        degrees,
        "\n".join(summary(optimizer.table, shapes)),
    )
    return Built(name, phase, mesh, model, model_config, optimizer)


def _load_initial_weights(built: Built, folder: Path) -> None:
    """Weights of a Hugging Face folder into the sharded model, tensor by tensor."""
    theirs = config_from_hf(folder)
    require_same_model(folder, theirs, built.model_config)
    shapes = {n: tuple(t.shape) for n, t in built.model.state_dict().items()}
    targets = dict(built.model.named_parameters()) | dict(built.model.named_buffers())
    with torch.no_grad():
        for name, full in read_hf(folder, shapes, theirs):
            write_full(targets[name], full.to(targets[name].device, torch.float32))
    log.info("weights from %s", folder)


def _feed(context: Context, built: Built, stream: PhaseStream, unit: int) -> Feed:
    mesh, chunking = built.mesh, chunking_of(built.mesh, context.config)
    return Feed(stream, built.phase, mesh, chunking, context.ranks.device, unit)


def _progress(context: Context, name: str, phase: PhaseConfig) -> PhaseProgress:
    shown = context.config.logging.progress and context.ranks.rank == 0
    total = phase_sequences(phase) * phase.context_tokens
    return PhaseProgress(context.console if shown else None, name, total)


def _hooks(context: Context, built: Built, bar: PhaseProgress) -> Hooks:
    config = context.config
    rows = validation_rows(config.data, built.name, built.phase.context_tokens)
    chunking = chunking_of(built.mesh, config)
    device = context.ranks.device

    def evaluate(state: TrainState) -> None:
        if not rows:
            return
        losses = validation_losses(built.model, rows, built.mesh, chunking, device)
        context.metrics.write("eval", step=state.step, phase=built.name, losses=losses)
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        log.info("%s step %d | validation %s", built.name, state.step, shown)

    def done(state: TrainState, result: StepResult) -> None:
        context.ledger.step(state.step, state.phase_rows, result.fingerprint)
        bar.update(state.phase_rows * built.phase.context_tokens, result.loss)

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
    )


def _phase_run(context: Context, built: Built, hooks: Hooks, unit: int) -> PhaseRun:
    config = context.config
    return PhaseRun(
        name=built.name,
        phase=built.phase,
        model=built.model,
        optimizer=built.optimizer,
        optim=config.optim,
        reduction=Reduction.of(built.mesh, config.parallel),
        unit=unit,
        num_experts=built.model_config.num_experts,
        metrics=context.metrics,
        log_every_steps=config.logging.every_steps,
        eval_every_steps=config.logging.eval_every_steps,
        save_every_steps=config.checkpoint.every_steps,
        hooks=hooks,
    )


def _save(
    context: Context, built: Built, state: TrainState, required: bool, keep: bool = False
) -> None:
    degrees = built.mesh.layout
    record = CheckpointRecord(
        step=state.step,
        phase_name=built.name,
        phase_index=state.phase_index,
        train_state=state.to_dict(),
        model=to_dict(built.model_config),
        mesh={
            "replicate": degrees.replicate,
            "shard": degrees.shard,
            "context": degrees.context,
            "expert": degrees.expert,
        },
        config_hash=config_hash(context.config),
        # A phase that has not begun is not yet part of the past.
        lineage=lineage(
            context.config, state.phase_index - int(state.phase_rows == 0), context.corpora
        ),
        keep=keep,
    )
    context.ledger.sync()
    context.saver.save(built.tensors(), record, required)
