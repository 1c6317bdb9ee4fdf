"""`zaya checkpoint diff`: what two checkpoints have in common and where they part.

Both are verified first. Tensors are read in groups, so two states of any size compare in little
memory; every file is read once for its hash and once for its tensors.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from rich.text import Text

from zaya_train.config.derive import hash_of
from zaya_train.config.diff import differences
from zaya_train.config.errors import EXIT_OK
from zaya_train.tools.checkpoint import checkpoint_at
from zaya_train.train import dcp
from zaya_train.train.attempts import CONFIG_DIR, read_config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console
    from torch import Tensor

    from zaya_train.train.manifest import CheckpointRecord, TensorEntry
    from zaya_train.train.restore import Found

EXIT_DIFFERENT = 1
"""As of diff(1)."""
GROUP_BYTES = 256_000_000
MOST_CHARACTERS = 100
"""Of a value in the tables."""


Values = dict[str, tuple[Any, Any]]
"""Dotted key -> the values in the first and the second."""


@dataclass(frozen=True)
class TensorDifference:
    """How two tensors of one name differ."""

    key: str
    shapes: tuple[str, str]
    """dtype[shape], or `absent`."""
    elements: int = 0
    """That differ in any bit; 0 where shapes or dtypes do."""
    relative: float = 0.0
    """Largest difference of an element over the largest magnitude in either tensor."""


@dataclass(frozen=True)
class CheckpointDifference:
    """Two checkpoints side by side."""

    equal_tensors: int
    tensors: tuple[TensorDifference, ...]
    """Those that differ, the largest relative difference first."""
    position: Values
    """Step, phase, counters and data position."""
    past: Values
    """Model, seed, phases and corpora behind them."""
    configuration: Values
    """Of the attempts that wrote them, where the runs kept it: decides about the future."""
    writing: Values
    """Mesh, versions, retention: how they were written, which changes nothing in them."""

    @property
    def equal(self) -> bool:
        """Whether training goes on from both alike, given the same configuration."""
        return not (self.tensors or self.position or self.past)


def compare_checkpoints(first: Found, second: Found) -> CheckpointDifference:
    """Everything in which two verified checkpoints differ."""
    entries = (first.manifest.tensors, second.manifest.tensors)
    shared = [k for k in sorted(entries[0].keys() & entries[1].keys()) if _same(entries, k)]
    other = sorted((entries[0].keys() | entries[1].keys()) - set(shared))
    found = [
        TensorDifference(key, (_shape(entries[0].get(key)), _shape(entries[1].get(key))))
        for key in other
    ]
    for keys in _groups(shared, entries[0]):
        tensors = [_read(checkpoint, keys) for checkpoint in (first, second)]
        for key in keys:
            difference = _compare(key, tensors[0][key], tensors[1][key])
            found += [difference] if difference else []
    places = [_places(checkpoint) for checkpoint in (first, second)]
    values = [differences(before, now) for before, now in zip(*places, strict=True)]
    found.sort(key=lambda d: (-d.relative, d.key))
    return CheckpointDifference(
        equal_tensors=len(shared) - len(found) + len(other),
        tensors=tuple(found),
        position=values[0],
        past=values[1],
        configuration=values[2],
        writing=values[3],
    )


def diff_checkpoints(first: Path, second: Path, rows: int, console: Console) -> int:
    """Print how two checkpoints, or the newest of two runs, differ; at most `rows` tensors.

    Returns 0 when tensors, position and past are equal, else 1.

    Raises:
        CheckpointError: one of them does not verify.
        ConfigError, StorageError: a configuration that its run kept is none, or cannot be read.
    """
    found = [checkpoint_at(path) for path in (first, second)]
    for name, checkpoint in zip("AB", found, strict=True):
        console.print(Text(f"{name}: {checkpoint.path}"))
    result = compare_checkpoints(found[0], found[1])
    console.print(
        f"tensors: {result.equal_tensors:,} bitwise equal, {len(result.tensors):,} different"
    )
    if result.tensors:
        console.print(_tensor_table(result.tensors, rows))
    for title, values in (
        ("position", result.position),
        ("model and past", result.past),
        ("configuration", result.configuration),
        ("how written", result.writing),
    ):
        console.print(_value_table(title, values) if values else f"{title}: equal")
    return EXIT_OK if result.equal else EXIT_DIFFERENT


def _same(entries: tuple[dict[str, TensorEntry], dict[str, TensorEntry]], key: str) -> bool:
    return entries[0][key] == entries[1][key]


def _shape(entry: TensorEntry | None) -> str:
    return f"{entry.dtype}{list(entry.shape)}" if entry else "absent"


def _groups(keys: list[str], entries: dict[str, TensorEntry]) -> Iterator[list[str]]:
    """Runs of keys of about GROUP_BYTES each."""
    group: list[str] = []
    size_bytes = 0
    for key in keys:
        entry = entries[key]
        elements = torch.Size(entry.shape).numel()
        size_bytes += elements * getattr(torch, entry.dtype).itemsize
        group.append(key)
        if size_bytes >= GROUP_BYTES:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def _read(checkpoint: Found, keys: list[str]) -> dict[str, Tensor]:
    entries = checkpoint.manifest.tensors
    tensors = {
        key: torch.empty(entries[key].shape, dtype=getattr(torch, entries[key].dtype))
        for key in keys
    }
    dcp.read(tensors, checkpoint.path, checkpoint.manifest, group=None)
    return tensors


def _compare(key: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    """None for equal bits: 0.0 and -0.0 are not."""
    bits = [t.reshape(-1).view(torch.uint8).reshape(t.numel(), -1) for t in (a, b)]
    different = int((bits[0] != bits[1]).any(dim=1).sum()) if a.numel() else 0
    if not different:
        return None
    x, y = a.double(), b.double()
    largest = float(torch.maximum(x.abs().max(), y.abs().max()))
    relative = float((x - y).abs().max()) / largest if largest else 0.0
    shape = f"{str(a.dtype).removeprefix('torch.')}{list(a.shape)}"
    return TensorDifference(key, (shape, shape), different, relative)


def _places(checkpoint: Found) -> tuple[dict[str, Any], ...]:
    """Position, past, configuration and manner of writing as nested dictionaries."""
    record = checkpoint.record
    position = {
        "step": record.step,
        "phase": {"name": record.phase_name, "index": record.phase_index},
        "state": record.train_state,
    }
    past = {"model": record.model, **record.lineage, "phases": dict(record.lineage["phases"])}
    configuration = {"hash": record.config_hash, **_config_of(checkpoint.path, record)}
    version = checkpoint.manifest.torch_version
    return (
        position,
        past,
        configuration,
        {
            "mesh": record.mesh,
            "torch": version,
            "kept": record.keep,
        },
    )


def _config_of(path: Path, record: CheckpointRecord) -> dict[str, Any]:
    """The configuration of the attempt that wrote the checkpoint, its own or, of earlier versions,
    the one of the record's hash that the run kept."""
    if record.identity:
        config: dict[str, Any] = record.identity["config"]
        return config
    for file in sorted((path.parent.parent / CONFIG_DIR).glob("attempt-*.json")):
        values = read_config(file)
        if hash_of(values) == record.config_hash:
            return values
    return {}


def _tensor_table(tensors: tuple[TensorDifference, ...], rows: int) -> Table:
    table = Table("tensor", "A", "B", "elements", "largest relative difference")
    for entry in tensors[:rows]:
        same = entry.shapes[0] == entry.shapes[1]
        table.add_row(
            entry.key,
            entry.shapes[0],
            "same" if same else entry.shapes[1],
            f"{entry.elements:,}" if same else "",
            f"{entry.relative:.3g}" if same else "",
        )
    if len(tensors) > rows:
        kinds = Counter(entry.key.split(".")[0] for entry in tensors[rows:])
        rest = ", ".join(f"{count:,} of {kind}" for kind, count in sorted(kinds.items()))
        table.add_row(f"and {len(tensors) - rows:,} more: {rest}")
    return table


def _value_table(title: str, values: dict[str, tuple[Any, Any]]) -> Table:
    table = Table(title, "A", "B")
    for key, pair in values.items():
        table.add_row(*(Text(_short(value)) for value in (key, *pair)))
    return table


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 3]}..."
