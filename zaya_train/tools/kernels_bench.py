"""`zaya kernels bench`: every operation's back ends against each other on the device at hand.

Nothing is timed that is not right: a back end is first compared with the reference in float64, and
where the timed shape is a larger one, there with eager.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from zaya_kernels.dtypes import DTYPES
from zaya_kernels.workshop.cases import Case, error, passed
from zaya_kernels.workshop.failures import failures
from zaya_kernels.workshop.timing import Spread, Stopwatch, alternating

from zaya_train.config.errors import ConfigError, first_line
from zaya_train.config.suggest import unknown_name
from zaya_train.runtime.device import DeviceChoice, describe, pick_device
from zaya_train.runtime.peaks import product_rate
from zaya_train.tools.doctor_kernels import FLOOR, SLACK
from zaya_train.tools.kernel_cases import operations_at
from zaya_train.tools.kernel_plots import draw_roofline, plot_path
from zaya_train.tools.kernel_results import Result, append, check_table, read, setting_of
from zaya_train.tools.kernel_rivals import Contender, contenders
from zaya_train.tools.kernel_shapes import SHAPES, Shape, Timed, Work, to_check
from zaya_train.tools.preflight_compute import copy_rate, sizes_for

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console
    from torch import Tensor
    from zaya_kernels.workshop.timing import Sample

    from zaya_train.config.schema import ModelConfig

RESULTS = Path("kernels/bench/results.csv")
LONGER_SUMS = 4.0
"""Times the limit at the checked shape that a back end may differ from eager at the timed one."""


@dataclass(frozen=True)
class BenchRequest:
    """What to time; empty choices stand for all, of the device's shapes."""

    ops: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    rounds: int | None = None
    """None: 20 on a GPU, 5 on a CPU."""
    device: DeviceChoice = "auto"
    dtype: str | None = None
    """None: bf16 on a GPU, fp32 on a CPU."""
    out: Path = RESULTS


@dataclass(frozen=True)
class Rates:
    """What the device measured just now: bytes and operations per second."""

    copy: float
    product: float


@dataclass
class Outcome:
    """Of one operation at one shape."""

    results: list[Result] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    """Back ends that cannot run here, and why."""
    wrong: dict[str, str] = field(default_factory=dict)
    """Back ends whose results are wrong, which were not timed."""


def bench(request: BenchRequest, model_of: Callable[[str], ModelConfig], console: Console) -> int:
    """Check, time, append rows to `request.out` and draw; 1 if a back end was refused, else 0.

    `model_of` gives a recipe's model. ConfigError for unknown names, DataError for a file that is
    no such table, both before anything is timed.
    """
    device = pick_device(request.device)
    shapes = _chosen_shapes(request, device)
    small = _small_operations(model_of)
    known = [timed.op for timed in small]
    ops = _chosen("--op", request.ops, known)
    _chosen("--backend", request.backends, _names(small, device))
    check_table(request.out)
    if request.rounds is not None and request.rounds < 1:
        raise ConfigError(f"--rounds {request.rounds}: must be at least 1")
    dtype = request.dtype or ("bf16" if device.type == "cuda" else "fp32")
    setting = setting_of(device, time.strftime("%Y-%m-%d"))
    rates = _rates(device, DTYPES[dtype])
    facts = (
        f"copy {rates.copy / 1e9:,.1f} GB/s, {dtype} product {rates.product / 1e12:,.2f} TFLOP/s"
    )
    console.print(f"{describe(device)}: {facts}", highlight=False, soft_wrap=True)
    bench_one = partial(_bench_one, request=request, dtype=dtype, rates=rates)
    wrong: list[str] = []
    done: set[tuple[str, str]] = set()
    for shape in shapes:
        model = model_of(shape.recipe)
        for number, op in enumerate(known):
            if op not in ops or (shape.recipe, op) in done:
                continue
            if not small[number].by_tokens:
                done.add((shape.recipe, op))
            outcome = bench_one(model, shape, device, number)
            append(request.out, setting, outcome.results)
            _show(op, shape, outcome, console)
            wrong += [f"{op} {shape.name} {name}: {why}" for name, why in outcome.wrong.items()]
    _draw(request.out, setting.device, ops, console)
    for line in wrong:
        console.print(
            f"not timed, wrong: {line}", style="red", markup=False, highlight=False, soft_wrap=True
        )
    return 1 if wrong else 0


def _small_operations(model_of: Callable[[str], ModelConfig]) -> list[Timed]:
    shape = next(shape for shape in SHAPES if shape.name == "smoke_odd")
    return operations_at(model_of(shape.recipe), shape, torch.device("cpu"))


def _names(operations: Sequence[Timed], device: torch.device) -> list[str]:
    """Of all back ends."""
    found = [rival.name for timed in operations for rival in contenders(timed, device)]
    return list(dict.fromkeys(found))


def _chosen_shapes(request: BenchRequest, device: torch.device) -> list[Shape]:
    names = [shape.name for shape in SHAPES]
    fitting = [name for name in names if name.startswith("8b") == (device.type == "cuda")]
    chosen = _chosen("--shape", request.shapes, names) if request.shapes else fitting
    return [shape for shape in SHAPES if shape.name in chosen]


def _chosen(option: str, words: Sequence[str], known: Sequence[str]) -> list[str]:
    """All of `known` without words; `norm_residual` stands for all of its parts."""
    found: list[str] = []
    for word in words:
        matching = [name for name in known if word in (name, name.split(" ")[0])]
        if not matching:
            raise ConfigError(f"{option} {word}: no such name{unknown_name(word, known)}")
        found += matching
    return found or list(known)


def _rates(device: torch.device, dtype: torch.dtype) -> Rates:
    sizes = sizes_for("quick", device)
    return Rates(
        copy=copy_rate(device, sizes.copy_mib, sizes.repeats),
        product=product_rate(device, dtype),
    )


def _bench_one(
    model: ModelConfig,
    shape: Shape,
    device: torch.device,
    number: int,
    *,
    request: BenchRequest,
    dtype: str,
    rates: Rates,
) -> Outcome:
    """Operation `number` at one shape."""
    small = operations_at(model, to_check(shape), device)[number]
    rivals = contenders(small, device)
    if request.backends:
        # Eager is the yardstick at large shapes, so it is checked whether it is timed or not.
        rivals = [rival for rival in rivals if rival.name in (*request.backends, "eager")]
    if any(rival.name == "compile" for rival in rivals):
        # torch.compile gives up on what it has compiled too often, other operations counted.
        torch.compiler.reset()
    outcome = Outcome()
    outcome.absent = {rival.name: rival.reason for rival in rivals if rival.run is None}
    right = _checked(small, rivals, dtype, outcome)
    timed = small
    if to_check(shape) != shape:
        timed = operations_at(model, shape, device)[number]
        right = _like_eager(timed, right, dtype, outcome)
    if request.backends and "eager" not in request.backends:
        right = [rival for rival in right if rival.name != "eager"]
    if right:
        rounds = request.rounds or (20 if device.type == "cuda" else 5)
        outcome.results = _timed(timed, right, (shape, dtype, rounds), device, rates)
    return outcome


def _case(timed: Timed, rivals: Sequence[Contender]) -> Case:
    """The operation with back ends by name, the reference and eager among them."""
    table = {**timed.backends, **{r.name: r.run for r in rivals if r.run is not None}}

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return timed.call(table[name], x)

    return Case(timed.op, run, timed.inputs, timed.differentiable)


def _checked(
    timed: Timed, rivals: Sequence[Contender], dtype: str, outcome: Outcome
) -> list[Contender]:
    """Those whose error against float64 is at most a few times the reference's own in `dtype`."""
    case, rounded = _case(timed, rivals), timed.rounded(DTYPES[dtype])
    exact = passed(case, "reference", {name: x.double() for name, x in rounded.items()})
    own = max(error(x, exact[key]) for key, x in passed(case, "reference", rounded).items())
    limit = max(SLACK * own, FLOOR[dtype])
    return [r for r in rivals if r.run and _agrees(case, r, rounded, exact, limit, outcome)]


def _like_eager(
    timed: Timed, rivals: Sequence[Contender], dtype: str, outcome: Outcome
) -> list[Contender]:
    """Those that agree with eager at the timed shape too."""
    if "eager" in outcome.wrong:
        outcome.absent |= {r.name: "eager, its yardstick at this shape, is wrong" for r in rivals}
        return []
    case, rounded = _case(timed, rivals), timed.rounded(DTYPES[dtype])
    try:
        expected = {key: x.double() for key, x in passed(case, "eager", rounded).items()}
    except failures() as failure:
        why = f"eager, its yardstick at this shape, does not run: {first_line(failure)}"
        outcome.absent |= {r.name: why for r in rivals}
        return []
    limit = LONGER_SUMS * SLACK * FLOOR[dtype]
    return [r for r in rivals if _agrees(case, r, rounded, expected, limit, outcome)]


def _agrees(
    case: Case,
    rival: Contender,
    inputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    limit: float,
    outcome: Outcome,
) -> bool:
    """Whether all it gives is within `limit`; if not, `outcome` is told."""
    try:
        found = passed(case, rival.name, inputs)
    except failures() as failure:
        said = " ".join(str(failure).split()) or type(failure).__name__
        outcome.absent[rival.name] = said[:200]
        return False
    errors = {key: error(x, expected[key]) for key, x in found.items()}
    # A NaN is at most nothing.
    bad = [key for key, value in errors.items() if not value <= limit]
    if bad:
        said = f"{bad[0]}: error {errors[bad[0]]:.1e}, at most {limit:.1e}"
        outcome.wrong[rival.name] = said
    return not bad


def _timed(
    timed: Timed,
    rivals: Sequence[Contender],
    how: tuple[Shape, str, int],
    device: torch.device,
    rates: Rates,
) -> list[Result]:
    shape, dtype, rounds = how
    leaves = {
        name: x.detach().requires_grad_(timed.differentiable)
        for name, x in timed.rounded(DTYPES[dtype]).items()
    }
    watch = Stopwatch(device)
    held = list(leaves.values()) if timed.differentiable else []

    def call(rival: Contender) -> Sample:
        assert rival.run is not None
        run = rival.run
        return watch.sample(lambda: timed.call(run, leaves), held)

    samples = alternating({rival.name: partial(call, rival) for rival in rivals}, rounds)
    with torch.no_grad():
        outputs = timed.call(timed.backends["eager"], leaves)
    work = timed.work(leaves, outputs)
    return [
        _result((timed.op, direction, name), (shape.name, dtype), rates, work[direction], times)
        for name, own in samples.items()
        for direction, times in _by_pass(own).items()
    ]


def _by_pass(samples: Sequence[Sample]) -> dict[str, list[float]]:
    found = {"forward": [sample.forward for sample in samples]}
    pairs = [(s.forward, s.backward) for s in samples if s.backward is not None]
    if pairs:
        found["backward"] = [backward for _, backward in pairs]
        found["both"] = [forward + backward for forward, backward in pairs]
    return found


def _result(
    what: tuple[str, str, str],
    where: tuple[str, str],
    rates: Rates,
    work: Work,
    milliseconds: Sequence[float],
) -> Result:
    spread = Spread.of(milliseconds)
    seconds = spread.median / 1e3
    bound = max(work.bytes / rates.copy, work.operations / rates.product)
    return Result(
        *what,
        *where,
        rounds=len(milliseconds),
        ms_median=spread.median,
        ms_low=spread.low,
        ms_high=spread.high,
        gb_per_second=work.bytes / seconds / 1e9,
        tflops=work.operations / seconds / 1e12,
        share=bound / seconds,
        copy_gb_per_second=rates.copy / 1e9,
        gemm_tflops=rates.product / 1e12,
    )


def _show(op: str, shape: Shape, outcome: Outcome, console: Console) -> None:
    table = Table("back end", "pass", title=f"{op}, {shape.name}", title_justify="left")
    for column in ("ms", "from", "to", "GB/s", "TFLOP/s", "of the roof"):
        table.add_column(column, justify="right")
    for row in outcome.results:
        figures = (row.ms_median, row.ms_low, row.ms_high, row.gb_per_second, row.tflops)
        cells = [f"{figure:,.4g}" for figure in figures]
        table.add_row(row.backend, row.direction, *cells, f"{row.share:.1%}")
    if outcome.results:
        console.print(table)
    for name, why in outcome.absent.items():
        line = f"{op} {shape.name}: not run: {name}: {why}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _draw(out: Path, device: str, ops: Sequence[str], console: Console) -> None:
    """The rooflines of this device, from all rows that the table has of it."""
    if not out.exists():
        return
    rows = [row for row in read(out) if row["device"] == device]
    for op in ops:
        if own := [row for row in rows if row["op"] == op]:
            path = plot_path(out.parent, device, op)
            draw_roofline(own, path)
            console.print(f"roofline: {path}", highlight=False, soft_wrap=True)
