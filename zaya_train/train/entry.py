"""What must hold before a run goes on from a checkpoint, its own or another run's."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_train.config.build import to_dict
from zaya_train.config.defaults import defaults
from zaya_train.config.diff import ABSENT, model_differences
from zaya_train.config.errors import CheckpointError, ConfigError, NumericsError, StorageError
from zaya_train.config.kinds import AT_START, math_values, nameable
from zaya_train.config.schema import TrainConfig
from zaya_train.phases.gates import missed
from zaya_train.phases.lineage import changes, lengthened
from zaya_train.train.attempts import newest_config
from zaya_train.train.manifest import MANIFEST_NAME
from zaya_train.train.restore import verified
from zaya_train.train.state import TrainState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from zaya_train.train.checkpoint import CheckpointStore
    from zaya_train.train.peers import Peers
    from zaya_train.train.restore import Found

log = logging.getLogger(__name__)


def check_paths(config: TrainConfig) -> None:
    """Raise where a path of the run cannot be what it is meant to be; before any process group.

    Raises:
        ConfigError: nothing to start from where checkpoint.initial_weights or branch_from points.
        StorageError: run.dir cannot be made or written.
    """
    start = config.checkpoint
    for key, path, name in (
        ("initial_weights", start.initial_weights, "config.json"),
        ("branch_from", start.branch_from, MANIFEST_NAME),
    ):
        if path and not Path(path, name).is_file():
            raise ConfigError(f"checkpoint.{key}: {path} has no {name}")
    run_dir = Path(config.run.dir)
    existing = next(folder for folder in (run_dir, *run_dir.parents) if folder.exists())
    if not existing.is_dir():
        raise StorageError(f"{run_dir}: cannot be made (run.dir): {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"{run_dir}: cannot be made (run.dir): no right to write to {existing}")


def starting_point(store: CheckpointStore, branch: str | None, peers: Peers) -> Found | None:
    """The run's newest checkpoint, else the one it branches from, if any."""
    found = store.newest()
    return branch_point(Path(branch), peers) if branch and not found else found


def branch_point(path: Path, peers: Peers) -> Found:
    """The checkpoint in directory `path`, verified; collective.

    Raises:
        CheckpointError: it is none, or does not verify.
    """
    try:
        return verified(path, peers)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.branch_from: {error}") from error


def check_entry(
    found: Found, config: TrainConfig, corpora: Mapping[str, str], own: bool = True
) -> None:
    """Raise where `config` cannot go on from the checkpoint.

    Args:
        found: its own, or the one it branches from.
        config: what is to go on.
        corpora: content hash of each source by name.
        own: whether it resumes; a branch is another run, which may have other math.

    Raises:
        ConfigError: model, phases or corpora behind the checkpoint are not the configuration's, or
            math keys are not that neither checkpoint.allow_changed names nor an earlier attempt at
            this run has changed.
        NumericsError: the phase that ended there missed its exit gate.
    """
    state = TrainState.from_dict(found.record.train_state)
    named = frozenset(config.checkpoint.allow_changed) | _accepted(config)
    different = changes(found.record.lineage, config, corpora, named)
    ours = to_dict(config.model)
    different += [f"model.{line}" for line in model_differences(found.record.model, ours)]
    different += lengthened(state.past_rows, config.plan.phases)
    if different:
        raise ConfigError(
            f"{found.path}: was trained under another plan or on other data, so the run cannot "
            f"continue it: {'; '.join(different)}; restore these{_hint(config, different)} or "
            "choose another run.dir"
        )
    if own:
        _check_math(found, config, named)
    _check_gate(found, state, config)


def _accepted(config: TrainConfig) -> frozenset[str]:
    """Keys whose values the newest attempt at this run had too: it went on with them, so they are
    the run's own by now, whichever checkpoint it is taken back to."""
    before = math_values(newest_config(Path(config.run.dir)))
    now = math_values(to_dict(config))
    return frozenset(key for key, value in now.items() if before.get(key, ABSENT) == value)


def _hint(config: TrainConfig, lines: list[str]) -> str:
    """What of these differences, each behind its key, could be named instead."""
    keys = [key for key in (line.partition(": ")[0] for line in lines) if nameable(key)]
    return f", say so ({_naming(config, keys)})" if keys else ""


def _naming(config: TrainConfig, keys: Iterable[str]) -> str:
    """The setting that names these keys besides those that are named already."""
    return f"checkpoint.allow_changed=[{','.join((*config.checkpoint.allow_changed, *keys))}]"


def _check_math(found: Found, config: TrainConfig, named: frozenset[str]) -> None:
    """ConfigError for changed math keys besides those that `check_entry` has compared by then."""
    before = found.record.identity.get("config", {})
    if not before:
        log.warning(
            "%s: written by a version that kept no identity, so whether the keys that decide the "
            "curve are what they were (optim, precision, guard) is not known",
            found.path,
        )
    changed = changed_math(before, config)
    unnamed = {key: pair for key, pair in changed.items() if key not in named}
    if unnamed:
        lines = "; ".join(f"{key}: {old} -> {new}" for key, (old, new) in unnamed.items())
        raise ConfigError(
            f"{found.path}: was trained with other values of keys that decide the curve: {lines}; "
            f"restore them, or say so: {_naming(config, unnamed)}"
        )


def changed_math(before: Mapping[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Math keys outside model, data and plan that differ: dotted key -> (old, new value).

    before: the configuration behind a checkpoint; empty where it is not known. A key that it lacks
    is of a later version, and had the effect of its default.
    """
    if not before:
        return {}
    now = {k: v for k, v in math_values(to_dict(config)).items() if _compared_here(k)}
    old = {**math_values(defaults(TrainConfig)), **math_values(before)}
    return {k: (old.get(k, ABSENT), v) for k, v in now.items() if old.get(k, ABSENT) != v}


def _compared_here(key: str) -> bool:
    """Lineage and model have rules of their own, and a start is behind a run that resumes."""
    section = key.split(".")[0]
    return section not in ("run", "model", "data", "plan") and key not in AT_START


def _check_gate(found: Found, state: TrainState, config: TrainConfig) -> None:
    if state.phase_rows or not state.phase_index:
        return
    name, phase = list(config.plan.phases.items())[state.phase_index - 1]
    lines = missed(phase.exit_gate, state.measured)
    if lines:
        raise NumericsError(
            f"{found.path}: phase {name} ended without meeting plan.phases.{name}.exit_gate: "
            f"{'; '.join(lines)}; change the gate, or branch from an earlier checkpoint"
        )
