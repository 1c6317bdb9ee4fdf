"""What TensorBoard and wandb files hold, read back, and what they should hold."""

from __future__ import annotations

import json
import math
import os
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from zaya_train.train.metrics import METRICS_FILE, iter_rows

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

Shown = list[tuple[int, dict[str, Any]]]
"""(step, name -> value) of every row, in order."""
_HEADER_BYTES, _BLOCK_BYTES, _FRAME = 7, 32_768, struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4


def expected(run_dir: Path) -> Shown:
    """Every row of metrics.jsonl, numbers by name, the others as text; no code of ours but the
    reader of the file."""
    rows = list(iter_rows(run_dir / METRICS_FILE))
    result: Shown = []
    for number, row in enumerate(rows):
        launches = [r for r in rows[number + 1 :] if r["kind"] in ("start", "resume")]
        gone = row["kind"] not in ("start", "resume")
        gone = gone and any(launch["step"] < row["step"] for launch in launches)
        if row["kind"] == "step":
            left_out = {"kind", "attempt", "wall_time", "step", "phase_step", "load"}
            values = {f"train/{k}": v for k, v in row.items() if k not in left_out}
            values = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        elif row["kind"] == "eval":
            values = {f"validation/{name}": loss for name, loss in row["losses"].items()}
        else:
            values = {f"events/{row['kind']}": row}
        result.append((row["step"], {("superseded/" * gone) + k: v for k, v in values.items()}))
    return result


def hang_wandb(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """From here on, what is started finds a wandb in `folder` whose import never returns."""
    package = folder / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import threading\nthreading.Event().wait()\n")
    patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def in_wandb(run_dir: Path) -> Shown:
    """The history of the one offline run below `run_dir`."""
    from wandb.proto import wandb_internal_pb2 as messages

    parse: Any = messages.Record  # type: ignore[attr-defined]

    (path,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    result: Shown = []
    for data in _frames(path.read_bytes()):
        record = parse.FromString(data)
        if record.WhichOneof("record_type") != "history":
            continue
        items = record.history.item
        values = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
        step = values.pop("step")
        shown = {name: value for name, value in values.items() if not name.startswith("_")}
        result.append((step, {k: _value(v) for k, v in shown.items()}))
    return result


def in_tensorboard(run_dir: Path) -> Shown:
    """The one event file below `run_dir`."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    (path,) = (run_dir / "tensorboard").glob("events.out.tfevents.*")
    result: Shown = []
    for data in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(data)
        if not event.HasField("summary"):
            continue
        values = {
            v.tag: _value(v.tensor.string_val[0].decode())
            if v.HasField("tensor")
            else v.simple_value
            for v in event.summary.value
        }
        result.append((event.step, values))
    return result


def same(first: Shown, second: Shown, single: bool = False) -> bool:
    """Equal in every row and value; numbers in single precision where asked, NaN like NaN."""

    def plain(shown: Shown) -> list[Any]:
        return [(step, {k: _comparable(v, single) for k, v in row.items()}) for step, row in shown]

    return plain(first) == plain(second)


def _comparable(value: Any, single: bool) -> Any:
    if isinstance(value, dict):
        return value
    if math.isnan(value):
        return "NaN"
    return float(np.float32(value)) if single else float(value)


def _value(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value.startswith("{") else value


def _frames(data: bytes) -> list[bytes]:
    """Records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    position, records, whole = _HEADER_BYTES, [], b""
    while position + _FRAME.size <= len(data):
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        if left < _FRAME.size:
            position += left
            continue
        _, size, kind = _FRAME.unpack_from(data, position)
        position += _FRAME.size
        whole += data[position : position + size]
        position += size
        if kind in (_WHOLE, _LAST):
            records.append(whole)
            whole = b""
    return records
