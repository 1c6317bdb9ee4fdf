"""Where `zaya sync` puts rows: TensorBoard event files, and a run of wandb.

Step and evaluation rows become curves, `train/FIELD` and `validation/NAME`; rows that were rolled
back keep theirs below `superseded/`. All other rows (starts, checkpoints, phases, ...) are text,
`events/KIND`, as they stand in metrics.jsonl.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from typing import TYPE_CHECKING, Any, Protocol

from zaya_train.runtime.files import write_text
from zaya_train.train.attempts import CONFIG_FILE, read_config
from zaya_train.train.metrics import encode_floats

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

WANDB_ID_FILE = "wandb_run_id"
TENSORBOARD_DIR = "tensorboard"
EVENT_FILES = "events.out.tfevents.*"
WANDB_WAIT_SECONDS = 30.0  # longest an unreachable server may hold up an online replay's start, end

_NOT_CURVES = {"kind", "attempt", "wall_time", "step", "phase_step"}


class Sink(Protocol):
    """What rows are replayed into."""

    def write(self, row: dict[str, Any], superseded: bool) -> None:
        """Take one row, as `read_metrics` would return it."""

    def close(self) -> None:
        """Flush and let go."""


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


def shown(row: Mapping[str, Any], superseded: bool) -> dict[str, float | str]:
    """Everything a sink shows of a row, by name."""
    values: dict[str, float | str] = dict(curves(row))
    if row["kind"] not in ("step", "eval"):
        values = {f"events/{row['kind']}": json.dumps(encode_floats(row), sort_keys=True)}
    return {f"superseded/{name}": v for name, v in values.items()} if superseded else values


class TensorBoard:
    """One event file below the run directory, in place of those of earlier replays."""

    def __init__(self, run_dir: Path, online: bool = False) -> None:
        # Its own package writes without torch or TensorFlow.
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._metadata, self._tensor = summary_pb2.SummaryMetadata, tensor_pb2.TensorProto
        self._string = types_pb2.DT_STRING
        directory = run_dir / TENSORBOARD_DIR
        for old in directory.glob(EVENT_FILES):
            old.unlink()
        self._writer = EventFileWriter(str(directory), flush_secs=10)

    def write(self, row: dict[str, Any], superseded: bool) -> None:
        values = [self._value(name, value) for name, value in shown(row, superseded).items()]
        summary = self._summary(value=values)
        event = self._event(wall_time=row["wall_time"], step=row["step"], summary=summary)
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()

    def _value(self, name: str, value: float | str) -> Any:
        if isinstance(value, float):
            return self._summary.Value(tag=name, simple_value=value)
        plugin = self._metadata.PluginData(plugin_name="text")
        text = self._tensor(dtype=self._string, string_val=[value.encode()])
        metadata = self._metadata(plugin_data=plugin)
        return self._summary.Value(tag=name, metadata=metadata, tensor=text)


class Wandb:
    """One wandb run over all attempts: its id is kept in the run directory.

    Offline, nothing opens a connection; `wandb sync RUN/wandb/offline-run-*` uploads later. Curves
    are drawn over `step` as logged, not over wandb's own counter, which can only grow.
    """

    def __init__(self, run_dir: Path, online: bool) -> None:
        if not online:
            # wandb reports its own crashes to a third party unless this is set before its import.
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        run_id = _kept_run_id(run_dir / WANDB_ID_FILE)
        for old in (run_dir / "wandb").glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(old)
        config = read_config(run_dir / CONFIG_FILE)
        self._run = wandb.init(
            mode="online" if online else "offline",
            project=config["logging"]["wandb_project"],
            dir=str(run_dir),
            name=config["run"]["name"],
            # Without `resume` an online run of this id is replaced, as every replay is whole.
            id=run_id,
            config=config,
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                silent=True,
                init_timeout=WANDB_WAIT_SECONDS,
                finish_timeout=WANDB_WAIT_SECONDS,
                # The machine probes include HTTP requests to a cloud's metadata address.
                x_disable_stats=not online,
                x_disable_machine_info=not online,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, Any], superseded: bool) -> None:
        values = shown(row, superseded)
        self._run.log({"step": row["step"], "_timestamp": row["wall_time"], **values})

    def close(self) -> None:
        self._run.finish()


SINKS: dict[str, Callable[[Path, bool], Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def _kept_run_id(path: Path) -> str:
    """The id of this run at wandb: read back, or drawn and kept by the first replay."""
    if path.exists():
        return path.read_text(encoding="ascii").strip()
    run_id = secrets.token_hex(4)
    write_text(path, run_id + "\n")
    return run_id
