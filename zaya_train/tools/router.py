"""`zaya router RUN`: the balancing controller's cockpit. What every layer's load, bias and
controller do at the newest steps, advice in plain words, and what other gains would have done to a
recorded trace.

Legend: N rows, L layers, C router classes, E experts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.table import Table

from zaya_train.config.build import build
from zaya_train.config.check import balancing_problems, refuse
from zaya_train.config.errors import ConfigError, DataError
from zaya_train.config.schema import BalancingConfig
from zaya_train.optim.balancing import BalancingController
from zaya_train.tools.router_replay import Replay, as_recorded, read_trace, replay, traced_files
from zaya_train.tools.tail import Tail
from zaya_train.train.attempts import CONFIG_FILE, read_config
from zaya_train.train.loop import load_summary
from zaya_train.train.metrics import METRICS_FILE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from rich.console import Console

RECENT = 50
"""Rows whose means say how a layer is now: the controller's averages span 10 and 20 steps."""
DEAD_SHARE = 0.01
"""Of the even share: below it an expert counts as dead."""
DEAD_STEPS = 20
"""Shorter pauses are no finding: a rare document may hold most of an expert's tokens."""
CROWDED = 0.5
"""Lasting violation from which a layer is called crowded: half as much again as an even share.
Single steps do not count: of few documents some expert always has more."""
SWINGS = 0.7
"""Share of steps at which the busiest classes' bias turns round, from which gains are too high."""
BIAS_SPAN = 1.0
"""Probabilities lie in [0, 1]: biases further apart decide alone."""
OTHER_RATES = (1 / 3, 3.0)
NO_TRACE = "No what-if: nothing was traced. Train with logging.trace_steps to record some steps."

LEFT_OUT = (
    "traced steps are not replayed: the run's gains do not lead from one to the next (attempts "
    "with other gains, or steps before and after a roll back)."
)


@dataclass(frozen=True)
class LayerState:
    """One layer's router over the newest rows."""

    layer: int
    max_violation: float
    """Mean over the rows of max_e p_e E - 1."""
    lasting_violation: float
    """The same of the mean load: what does not average out."""
    busiest: int
    weakest: int
    weakest_share: float
    """Over the even share."""
    skip_rate: float
    dead_expert: int | None
    dead_steps: int
    """How long the longest dead expert has been so; as far back as rows are read."""
    bias_span: float
    """Largest minus smallest bias of the experts; NaN where rows lack biases."""
    error: float
    """Largest |share - target| of the newest step: what the controller's gradient is."""
    average: float
    """Largest |first moment|, corrected for its start."""
    scale: float
    """Root of the mean second moment, corrected; the update is rate x average / scale."""
    turning: float
    """Share of steps at which an expert's bias turned round, mean over experts; NaN where rows lack
    biases or lie more than a step apart."""


def gains_of(run_dir: Path) -> tuple[BalancingConfig, int]:
    """The run's balancing gains and its number of experts. DataError without a configuration or
    without these in it; ConfigError where another version wrote it."""
    path = run_dir / CONFIG_FILE
    if not path.exists():
        raise DataError(f"{path}: missing; the gains and the number of experts are in it")
    config = read_config(path)
    try:
        balancing, num_experts = config["optim"]["balancing"], config["model"]["num_experts"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: lacks {error} of the routers' gains") from error
    return build(BalancingConfig, balancing, "optim.balancing"), int(num_experts)


def changed_gains(gains: BalancingConfig, words: str) -> BalancingConfig:
    """`gains` with what `learning_rate=0.003,beta1=0.8` names. ConfigError for anything else, and
    for what a configuration would be refused for."""
    known = asdict(gains)
    changes: dict[str, float | None] = {}
    for word in words.split(","):
        key, _, value = word.partition("=")
        if key not in known:
            raise ConfigError(f"--gains {word}: no gain of that name; there are {', '.join(known)}")
        try:
            changes[key] = None if value == "null" else float(value)
        except ValueError:
            raise ConfigError(f"--gains {word}: {value!r} is no number") from None
    changed = build(BalancingConfig, {**known, **changes}, "--gains")
    refuse(f"--gains {words}: {problem}" for problem in balancing_problems(changed))
    return changed


def layer_states(
    rows: Sequence[dict[str, Any]], num_experts: int, gains: BalancingConfig
) -> list[LayerState]:
    """Every layer from the newest `step` rows, oldest first, that carry a load."""
    steps = np.array([row["step"] for row in rows])
    load = np.array([row["load"] for row in rows])
    biases = _biases(rows)
    stride = int(np.median(np.diff(steps))) if len(steps) > 1 else 1
    moments = _moments(load, num_experts, gains, stride)
    dead = stride * _dead_rows(load[..., :num_experts])
    states = [
        _layer_state(layer, load[:, layer], biases[:, layer] if biases is not None else None,
                     [moment[layer] for moment in moments], dead[layer], num_experts)
        for layer in range(load.shape[1])
    ]  # fmt: skip
    if stride > 1:  # rows apart do not tell how often a bias turned round between them
        return [replace(state, turning=math.nan) for state in states]
    return states


def _layer_state(
    layer: int,
    load: NDArray[np.float64],
    bias: NDArray[np.float64] | None,
    moments: list[NDArray[np.float64]],
    dead: NDArray[np.int64],
    num_experts: int,
) -> LayerState:
    """load and bias [N, C] of one layer, moments three [C], dead [E]."""
    recent = load[-RECENT:, :num_experts]
    shares = recent / np.maximum(recent.sum(axis=1, keepdims=True), 1e-30)
    mean = shares.mean(axis=0)
    longest = int(dead.argmax())
    error, average, scale = moments
    return LayerState(
        layer=layer,
        max_violation=float((shares.max(axis=1) * num_experts - 1).mean()),
        lasting_violation=float(mean.max() * num_experts - 1),
        busiest=int(mean.argmax()),
        weakest=int(mean.argmin()),
        weakest_share=float(mean.min() * num_experts),
        skip_rate=float(load[-RECENT:, num_experts:].sum(axis=1).mean()),
        dead_expert=longest if dead[longest] else None,
        dead_steps=int(dead[longest]),
        bias_span=float(np.ptp(bias[-1, :num_experts])) if bias is not None else float("nan"),
        error=float(np.abs(error).max()),
        average=float(np.abs(average).max()),
        scale=float(np.sqrt((scale**2).mean())),
        turning=_turning(bias[-RECENT:, :num_experts]) if bias is not None else float("nan"),
    )


def _biases(rows: Sequence[dict[str, Any]]) -> NDArray[np.float64] | None:
    """[N, L, C]; None where a row lacks them."""
    if any("balancing_bias" not in row for row in rows):
        return None
    return np.array([row["balancing_bias"] for row in rows])


def _moments(
    load: NDArray[np.float64], num_experts: int, gains: BalancingConfig, stride: int
) -> list[NDArray[np.float64]]:
    """[L, C] each: newest gradient, first moment, root of the second, as the controller has them.

    The controller runs over the rows from moments of zero, which their corrections undo; what came
    before the rows has faded where they are fifty or more. A row stands for the `stride` steps up
    to it, through which its load is taken to have lasted.
    """
    beta1, beta2 = gains.beta1**stride, gains.beta2**stride
    still = replace(gains, learning_rate=0.0, beta1=beta1, beta2=beta2)
    zero = torch.zeros(load.shape[2])
    controller = BalancingController([zero.clone() for _ in load[0]], num_experts, still)
    before = controller.first.clone()
    for one in load:
        before = controller.first.clone()
        controller.step(torch.from_numpy(one).float())
    count = len(load)
    error = (controller.first - beta1 * before) / (1 - beta1)
    average = controller.first / (1 - beta1**count)
    scale = (controller.second / (1 - beta2**count)).sqrt()
    return [moment.double().numpy() for moment in (error, average, scale)]


def _dead_rows(load: NDArray[np.float64]) -> NDArray[np.int64]:
    """[L, E]: rows for which each expert has had less than DEAD_SHARE of its even share."""
    shares = load / np.maximum(load.sum(axis=2, keepdims=True), 1e-30)
    alive = shares * load.shape[2] >= DEAD_SHARE
    # The first row from the end in which it lived; all rows where it never did.
    back: NDArray[np.int64] = np.where(alive.any(axis=0), alive[::-1].argmax(axis=0), len(load))
    return back


def _turning(bias: NDArray[np.float64]) -> float:
    """bias [N, E] -> share of the steps at which a bias turned round, mean over experts."""
    moves = np.sign(np.diff(bias, axis=0))
    if len(moves) < 2:
        return 0.0
    return float((moves[1:] * moves[:-1] < 0).mean())


def advice(states: Sequence[LayerState], gains: BalancingConfig) -> list[str]:
    """What to do, in plain words; one line that says so where there is nothing to do."""
    key, rate = "optim.balancing.learning_rate", gains.learning_rate
    said = []
    for s in states:
        if s.dead_expert is not None and s.dead_steps >= DEAD_STEPS:
            said.append(
                f"layer {s.layer}: expert {s.dead_expert} has had nearly no token for "
                f"{s.dead_steps} steps. Its bias is rising; if it stays dead, raise {key} "
                f"(now {rate:g}), or look at the EDA gain of this layer"
            )
        elif s.turning > SWINGS:
            said.append(
                f"layer {s.layer}: biases turn round at {100 * s.turning:.0f} % of the steps, so "
                f"the controller chases its own tail. Lower {key} (now {rate:g}) or raise "
                f"optim.balancing.beta1 (now {gains.beta1:g})"
            )
        elif s.lasting_violation > CROWDED:
            said.append(
                f"layer {s.layer}: expert {s.busiest} gets {1 + s.lasting_violation:.1f} times its "
                f"share on average. Early in a phase this settles; if it lasts, raise {key} "
                f"(now {rate:g})"
            )
        if s.bias_span > BIAS_SPAN:
            said.append(
                f"layer {s.layer}: biases lie {s.bias_span:.2f} apart, more than any probability: "
                f"they choose, not the router. Lower {key} (now {rate:g}) and let it recover"
            )
    limit = 2 * (gains.skip_target or 0.0) + 0.05
    skipping = [s for s in states if s.skip_rate > limit]
    if skipping:
        most = max(skipping, key=lambda s: s.skip_rate)
        said.append(
            f"{len(skipping)} layers send more than {100 * limit:.0f} % of tokens past the "
            f"experts (most: layer {most.layer}, {100 * most.skip_rate:.0f} %); "
            f"optim.balancing.skip_target is {gains.skip_target}"
        )
    return said or ["nothing to do: loads are even, no expert is dead, biases are steady"]


@dataclass(frozen=True)
class Cockpit:
    """All there is to say about a run's routers."""

    step: int
    states: list[LayerState]
    words: list[str]
    tried: list[Replay]
    """Under the recorded gains first; empty without a trace."""
    traced: tuple[int, int]
    """First and last replayed step of the trace; zeros without."""
    left_out: int
    """Traced steps that the run's gains did not make, which are not replayed."""
    num_experts: int


def newest_steps(run_dir: Path) -> list[dict[str, Any]]:
    """The newest `step` rows whose step was applied: the others' load moved no bias."""
    rows = Tail(run_dir / METRICS_FILE).read()
    return [row for row in rows if row["kind"] == "step" and row["applied"]]


def cockpit(run_dir: Path, rows: Sequence[dict[str, Any]], wanted: Sequence[str] = ()) -> Cockpit:
    """Look at a run by its `newest_steps`, which must not be empty; `wanted`: gains to replay its
    trace under, one text each (`changed_gains`).

    DataError where the run has no usable configuration, or gains are asked for without a trace;
    ConfigError for unknown gains.
    """
    gains, num_experts = gains_of(run_dir)
    others = [changed_gains(gains, each) for each in wanted]
    states = layer_states(rows, num_experts, gains)
    read = read_trace(run_dir) if others or traced_files(run_dir) else []
    trace = as_recorded(read, num_experts, gains)
    others = others or [
        replace(gains, learning_rate=gains.learning_rate * factor) for factor in OTHER_RATES
    ]
    return Cockpit(
        step=rows[-1]["step"],
        states=states,
        words=advice(states, gains),
        tried=[replay(trace, num_experts, each) for each in (gains, *others)] if trace else [],
        traced=(trace[0].step, trace[-1].step) if trace else (0, 0),
        left_out=len(read) - len(trace),
        num_experts=num_experts,
    )


def router(run_dir: Path, wanted: Sequence[str], console: Console) -> None:
    """Print the cockpit of a run. Errors as `cockpit`; DataError without a step."""
    rows = newest_steps(run_dir)
    if not rows:
        why = "holds no applied step yet" if run_dir.is_dir() else "no such run"
        raise DataError(f"{run_dir / METRICS_FILE}: {why}")
    seen = cockpit(run_dir, rows, wanted)
    console.print(_state_table(seen.states, seen.step))
    console.print(LEGEND, style="dim", highlight=False)
    for line in seen.words:
        console.print(f"- {line}", highlight=False)
    if not seen.tried:
        console.print(NO_TRACE, style="dim", highlight=False)
        return
    console.print(_replay_table(seen.tried, seen.num_experts, *seen.traced))
    if seen.left_out:
        console.print(f"{seen.left_out} {LEFT_OUT}", style="yellow", highlight=False)


def state_cells(state: LayerState) -> list[str]:
    """A row of the table of layers, under STATE_HEAD."""
    dead = f"{state.dead_expert}: {state.dead_steps:,}" if state.dead_expert is not None else ""
    return [
        str(state.layer),
        f"{state.max_violation:.2f}",
        f"{state.lasting_violation:.2f}",
        str(state.busiest),
        f"{state.weakest} ({state.weakest_share:.2f})",
        dead,
        f"{state.skip_rate:.3f}",
        f"{state.error:.3f}",
        f"{state.average:.4f}",
        f"{state.scale:.4f}",
        f"{state.bias_span:.3f}",
        f"{state.turning:.2f}",
    ]


STATE_HEAD = (
    *("layer", "MaxVio", "lasting", "top", "weakest", "dead", "skip"),
    *("error", "first", "second", "span", "turns"),
)
LEGEND = (
    "MaxVio: excess of a step's busiest expert over its even share; lasting: of the mean load, "
    "whose busiest expert is top; weakest: expert and its share of even; dead: expert and steps; "
    "skip: share of tokens; error, first, second: the controller's largest |share - target| of the "
    "newest step, largest mean and root mean square of it, update = rate x first / second; span: "
    "of the experts' biases; turns: share of steps at which a bias turned round, where all are "
    "logged."
)
REPLAY_HEAD = ("gains", "MaxVio", "entropy", "weakest", "moved", "span")


def replay_cells(tried: Replay, num_experts: int) -> list[str]:
    """A row of the table of replays; means over the later half of the trace."""
    half = tried.loads[len(tried.loads) // 2 :]
    told = [load_summary(torch.from_numpy(load), num_experts) for load in half]
    experts = half[..., :num_experts]
    shares = experts / np.maximum(experts.sum(axis=2, keepdims=True), 1e-30)
    gains = tried.gains
    span = np.ptp(tried.biases[-1][:, :num_experts], axis=1).max()
    words = f"rate {gains.learning_rate:g} betas {gains.beta1:g} {gains.beta2:g}"
    if gains.skip_target is not None:
        words += f" skip {gains.skip_target:g}"
    return [
        words,
        f"{np.mean([each['max_violation'] for each in told]):.3f}",
        f"{np.mean([each['load_entropy'] for each in told]):.4f}",
        f"{(shares.min(axis=(1, 2)) * num_experts).mean():.3f}",
        f"{100 * tried.moved[len(tried.moved) // 2 :].mean():.2f} %",
        f"{span:.3f}",
    ]


def _state_table(states: Sequence[LayerState], step: int) -> Table:
    title = f"routers at step {step:,}, means over {RECENT} rows"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for head in STATE_HEAD:
        table.add_column(head, justify="right")
    for state in states:
        table.add_row(*state_cells(state))
    return table


def _replay_table(tried: Sequence[Replay], num_experts: int, first: int, last: int) -> Table:
    title = f"what if, steps {first:,} to {last:,}; first row: as recorded"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    for head in REPLAY_HEAD:
        table.add_column(head, justify="left" if head == "gains" else "right")
    for each in tried:
        table.add_row(*replay_cells(each, num_experts))
    return table
