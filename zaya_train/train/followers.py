"""wandb and TensorBoard, fed with the rows of metrics.jsonl while they are written.

Followers are conveniences: the record is metrics.jsonl. Whatever goes wrong in one of them (a full
quota, a missing package, a broken disk) is logged once with its reason, the follower is dropped
and training goes on. The broad `except Exception` of this file, the only ones allowed in the
project, are there because third-party code may raise anything and none of it may stop a run.
"""

from __future__ import annotations

import logging
import os
import secrets
from typing import TYPE_CHECKING, Any, Literal

from zaya_train.runtime.files import write_text
from zaya_train.train.metrics import Follower, is_launch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from zaya_train.config.schema import LoggingConfig

WANDB_ID_FILE = "wandb_run_id"
TENSORBOARD_DIR = "tensorboard"
WANDB_WAIT_SECONDS = 30.0  # longest an unreachable server may hold up an online run's start or end

_log = logging.getLogger(__name__)
_NOT_CURVES = {"kind", "attempt", "wall_time", "step", "phase_step"}


def open_followers(
    logging_config: LoggingConfig, run_dir: Path, run_name: str, config: Mapping[str, Any]
) -> list[Follower]:
    """The followers that `logging` asks for; call on the one rank that writes metrics.

    config: the whole run as plain dictionaries, shown by wandb. Never raises: a follower that
    cannot be opened is reported and left out. Neither package is imported unless asked for.
    """
    wandb_mode = logging_config.wandb
    chosen: list[Follower] = []
    if wandb_mode != "disabled":
        project = logging_config.wandb_project
        chosen.append(
            _Guarded("wandb", lambda: _Wandb(wandb_mode, project, run_dir, run_name, config))
        )
    if logging_config.tensorboard:
        chosen.append(_Guarded("tensorboard", lambda: _TensorBoard(run_dir / TENSORBOARD_DIR)))
    return chosen


def curves(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row that make a curve: `train/<field>`, `validation/<name>`, or nothing."""
    if row["kind"] == "eval":
        return {f"validation/{name}": float(loss) for name, loss in row["losses"].items()}
    if row["kind"] != "step":
        return {}
    return {
        f"train/{key}": float(value)
        for key, value in row.items()
        if key not in _NOT_CURVES and isinstance(value, int | float)
    }


class _Guarded:
    """Runs a follower until it fails, then warns once and ignores it."""

    def __init__(self, name: str, make: Callable[[], Follower]) -> None:
        self._name = name
        self._follower: Follower | None = None
        try:
            self._follower = make()
        except Exception as error:
            self._drop(error)

    def follow(self, row: dict[str, Any]) -> None:
        if self._follower is None:
            return
        try:
            self._follower.follow(row)
        except Exception as error:
            self._drop(error)

    def close(self) -> None:
        if self._follower is None:
            return
        try:
            self._follower.close()
        except Exception as error:
            self._drop(error)
        self._follower = None

    def _drop(self, error: Exception) -> None:
        self._follower = None
        reason = " ".join(str(error).split()) or "no reason given"
        _log.warning(
            "%s dropped, training goes on without it: %s: %s",
            self._name,
            type(error).__name__,
            reason,
        )


class _Wandb:
    """One wandb run over all attempts: its id is kept in the run directory.

    Offline, nothing opens a connection; `wandb sync <run_dir>/wandb/offline-run-*` uploads later.
    Curves are drawn over `step` as logged, not over wandb's own counter, which can only grow and
    would refuse the rows after a roll back.
    """

    def __init__(
        self,
        mode: Literal["offline", "online"],
        project: str,
        run_dir: Path,
        run_name: str,
        config: Mapping[str, Any],
    ) -> None:
        if mode == "offline":
            # wandb reports its own crashes to a third party unless this is set before its import.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        settings = wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            silent=True,
            init_timeout=WANDB_WAIT_SECONDS,
            finish_timeout=WANDB_WAIT_SECONDS,
            # The machine probes include HTTP requests to a cloud's metadata address.
            x_disable_stats=mode == "offline",
            x_disable_machine_info=mode == "offline",
        )
        self._run = wandb.init(
            mode=mode,
            project=project,
            dir=str(run_dir),
            name=run_name,
            id=_kept_run_id(run_dir / WANDB_ID_FILE),
            resume="allow" if mode == "online" else None,
            config=dict(config),
            settings=settings,
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def follow(self, row: dict[str, Any]) -> None:
        values = curves(row)
        if values:
            self._run.log({"step": row["step"], **values})

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    """Event files below the run directory, one per attempt.

    A launch row at step N tells TensorBoard to forget what earlier attempts logged after N.
    """

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._directory = directory
        self._writer: Any = None

    def follow(self, row: dict[str, Any]) -> None:
        if is_launch(row):
            self.close()
            self._writer = self._open(str(self._directory), purge_step=row["step"] + 1)
        for name, value in curves(row).items():
            if self._writer is None:
                raise RuntimeError("a step row came before any start or resume row")
            self._writer.add_scalar(name, value, row["step"])
        if self._writer is not None and row["kind"] == "eval":
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _kept_run_id(path: Path) -> str:
    """The id of this run at wandb: read back, or drawn and kept by the first attempt."""
    if path.exists():
        return path.read_text(encoding="ascii").strip()
    run_id = secrets.token_hex(4)
    write_text(path, run_id + "\n")
    return run_id
