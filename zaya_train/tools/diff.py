"""`zaya diff`: whether two runs must give the same loss curve, and if not, why not.

A side is a run directory, a checkpoint, or a configuration (frozen by `zaya submit`, or one that a
run kept). What only orders sums differently leaves the curves equal to rounding; what neither side
says about itself is named as unknown and never taken for equal where anything hints otherwise.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from zaya_train.config.build import build
from zaya_train.config.derive import layout, phase_sequences, sequences_per_step
from zaya_train.config.errors import EXIT_OK
from zaya_train.config.kinds import (
    AT_START,
    EXACT,
    PHASES,
    SOURCES,
    drawn,
    kind_of,
    leaf_differences,
    of_source,
)
from zaya_train.config.schema import ParallelConfig, PhaseConfig
from zaya_train.tools.checkpoint_diff import EXIT_DIFFERENT
from zaya_train.tools.diff_sides import Side, load_side

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from rich.console import Console

    from zaya_train.train.identity import Identity

Effect = Literal["curve", "rounding", "none"]
Group = Literal["math", "seed", "data", "code", "versions", "world", "speed", "io"]
_VERDICTS: dict[Effect, str] = {
    "curve": "the two need not give the same loss curve",
    "rounding": "the two must give the same loss curve, to rounding",
    "none": "the two must give the same loss curve",
}


@dataclass(frozen=True)
class Finding:
    """One thing in which the sides differ."""

    group: Group
    key: str
    first: Any
    second: Any
    effect: Effect
    after_step: int = 0
    """It differs in the steps behind this one."""


@dataclass(frozen=True)
class RunDifference:
    """Two sides compared."""

    sides: tuple[Side, Side]
    findings: tuple[Finding, ...]
    unknown: tuple[str, ...]
    """What at least one side does not record."""

    @property
    def effect(self) -> Effect:
        effects = {finding.effect for finding in self.findings}
        return "curve" if "curve" in effects else "rounding" if "rounding" in effects else "none"

    @property
    def same(self) -> bool:
        """Whether both must give the same curve, at least to rounding."""
        return self.effect != "curve"

    def common_phases(self) -> list[str]:
        """Phases from the first one on over which the curves must be the same all the same."""
        plans = [
            [identity.config["plan"]["phases"] for _, identity in side.segments]
            for side in self.sides
        ]
        # Phases that were trained cannot change, so a side's last attempt names them all.
        pairs = zip(plans[0][-1], plans[1][-1], strict=False)
        names = [name for name, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]
        every = [phases for side in plans for phases in side]
        starts = [_first_phase(f.key, names, every) for f in self.findings if f.effect == "curve"]
        return names[: min(starts, default=len(names))]

    def to_dict(self) -> dict[str, Any]:
        return {
            "same": self.same,
            "effect": self.effect,
            "verdict": _VERDICTS[self.effect],
            "sides": [
                {"path": str(side.path), "math_hash": side.segments[-1][1].math_hash}
                for side in self.sides
            ],
            "common_phases": self.common_phases(),
            "findings": [asdict(finding) for finding in self.findings],
            "unknown": list(self.unknown),
        }


def compare_sides(first: Side, second: Side) -> RunDifference:
    """Everything in which two sides differ, each thing at the first step it concerns."""
    found: dict[tuple[str, str], Finding] = {}
    both = (first, second)
    since = [side.segments[0][0] for side in both]
    unknown = {f"steps 1 to {s} of {name}": None for name, s in zip("AB", since, strict=True) if s}
    steps = {start for side in both for start, _ in side.segments if start >= max(since)}
    for step in sorted(steps):
        a, b = first.at(step), second.at(step)
        for finding in _findings(a, b, step):
            found.setdefault((finding.group, finding.key), finding)
        unknown |= dict.fromkeys(_unknown(a, b))
    order: tuple[Effect, ...] = ("curve", "rounding", "none")
    ordered = sorted(found.values(), key=lambda f: (order.index(f.effect), f.after_step))
    return RunDifference((first, second), tuple(ordered), tuple(unknown))


def diff_runs(first: Path, second: Path, as_json: bool, console: Console) -> int:
    """Say whether the two must give the same loss curve; 0 if so, 1 if not.

    Raises:
        ConfigError, CheckpointError, StorageError: a side is none of the three, or is damaged.
    """
    result = compare_sides(load_side(first), load_side(second))
    if as_json:
        console.print_json(json.dumps(result.to_dict()))
    else:
        _show(result, console)
    return EXIT_OK if result.same else EXIT_DIFFERENT


def _findings(a: Identity, b: Identity, step: int) -> Iterator[Finding]:
    unused = {*_sources(a), *_sources(b)} - drawn(a.config) - drawn(b.config)
    for key, (old, new) in leaf_differences(a.config, b.config).items():
        if of_source(key) not in unused:
            yield _of_key(key, old, new, step)
    yield from _of_data(a, b, step)
    for name in sorted(a.versions.keys() & b.versions.keys()):
        if a.versions[name] != b.versions[name]:
            pair = (a.versions[name], b.versions[name])
            # Other sources may compute anything; another torch or device the same, otherwise.
            code = name == "code"
            group: Group = "code" if code else "versions"
            yield Finding(group, name, *pair, "curve" if code else "rounding", step)
    yield from _of_world(a, b, step)


def _of_key(key: str, old: Any, new: Any, step: int) -> Finding:
    kind = kind_of(key)
    if kind == "speed":
        return Finding("speed", key, old, new, "none" if key in EXACT else "rounding", step)
    if kind == "io":
        return Finding("io", key, old, new, "none", step)
    if key in AT_START and step:
        return Finding("math", key, old, new, "none", step)
    # A key of another version, which has no tag here, may mean anything.
    return Finding("seed" if key == "run.seed" else "math", key, old, new, "curve", step)


def _of_data(a: Identity, b: Identity, step: int) -> Iterator[Finding]:
    sources = [_sources(side) for side in (a, b)]
    for name in sorted(drawn(a.config) & drawn(b.config)):
        key = f"{SOURCES}.{name}"
        hashes = (a.corpora.get(name), b.corpora.get(name))
        if None not in hashes:
            if hashes[0] != hashes[1]:
                yield Finding("data", key, *hashes, "curve", step)
        elif sources[0][name]["path"] != sources[1][name]["path"]:
            first, second = (
                digest or f"contents of {side[name]['path']} unknown"
                for digest, side in zip(hashes, sources, strict=True)
            )
            yield Finding("data", key, first, second, "curve", step)


def _of_world(a: Identity, b: Identity, step: int) -> Iterator[Finding]:
    if None in (a.world_size, b.world_size):
        return
    if a.world_size != b.world_size:
        yield Finding("world", "ranks", a.world_size, b.world_size, "rounding", step)
    shared = [name for name in a.config["plan"]["phases"] if name in b.config["plan"]["phases"]]
    for name in shared:
        rows = [_step_rows(side, name) for side in (a, b)]
        if rows[0] != rows[1]:
            key = f"{PHASES}.{name}: rows of its steps"
            yield Finding("world", key, rows[0], rows[1], "curve", step)


def _step_rows(side: Identity, name: str) -> str:
    """Where ranks and micro-batches decide how many rows a step has: in a ramp, whose increments
    they are, and in a last step that is rounded up to work for all ranks (phases.plan)."""
    assert side.world_size is not None
    phase = build(PhaseConfig, side.config["plan"]["phases"][name])
    parallel = build(ParallelConfig, side.config["parallel"])
    unit = layout(phase, parallel, side.world_size).data * phase.micro_batch_sequences
    if phase.batch_ramp is not None:
        return f"ramp in multiples of {unit}"
    left = phase_sequences(phase) % sequences_per_step(phase)
    return f"last step {unit * math.ceil(left / unit) or sequences_per_step(phase)}"


def _unknown(a: Identity, b: Identity) -> Iterator[str]:
    for name, sides in (
        ("versions (code, torch, device)", (a.versions, b.versions)),
        ("ranks", (a.world_size, b.world_size)),
    ):
        if not all(sides):
            yield name
    for name in sorted(drawn(a.config) & drawn(b.config)):
        if not (name in a.corpora and name in b.corpora):
            yield f"contents of {SOURCES}.{name}"


def _sources(side: Identity) -> dict[str, Any]:
    sources: dict[str, Any] = side.config["data"]["sources"]
    return sources


def _first_phase(key: str, names: list[str], plans: list[dict[str, Any]]) -> int:
    """Position in `names` of the first phase that a difference in `key` concerns in one of the
    plans; behind them all where it concerns none of them."""
    parts = key.split(": ")[0].split(".")
    if parts[:2] == PHASES.split("."):
        return names.index(parts[2]) if parts[2:] and parts[2] in names else len(names)
    if parts[:2] == SOURCES.split("."):
        drawing = (
            position
            for position, name in enumerate(names)
            for plan in plans
            if plan.get(name, {"mixture": {}})["mixture"].get(parts[2], 0) > 0
        )
        return next(drawing, len(names))
    return 0


def _show(result: RunDifference, console: Console) -> None:
    for name, side in zip("AB", result.sides, strict=True):
        digest = side.segments[-1][1].math_hash
        attempts = f", {len(side.segments)} attempts" if len(side.segments) > 1 else ""
        console.print(Text(f"{name}: {side.path} (math {digest}{attempts})"))
    shown = [finding for finding in result.findings if finding.effect != "none"]
    if shown:
        table = Table("what", "key", "A", "B", "effect", "after step")
        for f in shown:
            effect = "another curve" if f.effect == "curve" else "rounding"
            cells = (f.group, f.key, f.first, f.second, effect, f.after_step)
            table.add_row(*(Text(str(cell)) for cell in cells))
        console.print(table)
    if silent := len(result.findings) - len(shown):
        found = "1 difference that changes" if silent == 1 else f"{silent} differences that change"
        console.print(f"{found} no number; --json lists it all")
    for line in result.unknown:
        console.print(Text(f"not recorded on both sides: {line}"))
    console.print(Text(_VERDICTS[result.effect]))
    if not result.same and (common := result.common_phases()):
        console.print(Text(f"the same until the end of phase {common[-1]}"))
