"""Forecast memory against rehearsals: recorded ones of every shipped recipe, live ones of settings
that change what is kept, gathered and reduced."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import rehearsal_table
from tests.helpers.tiny import tiny
from zaya_train.config.check import problems
from zaya_train.config.errors import ConfigError
from zaya_train.main import compose, main
from zaya_train.planning import fitting
from zaya_train.planning.case import Case, cases_of
from zaya_train.planning.changes import REACHES, Reach, leaner, overrides
from zaya_train.planning.components import COMPONENTS, GB, RESERVE
from zaya_train.planning.fitting import Budget, refuse
from zaya_train.planning.machine import machine_of, with_links
from zaya_train.planning.memory import forecast
from zaya_train.planning.time import plan_seconds
from zaya_train.tools.rehearsal import rehearse

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zaya_train.config.schema import TrainConfig

GOLDEN: dict[str, Any] = json.loads(rehearsal_table.GOLDEN.read_text())
TOLERANCE = 0.02
SHIPPED = [(launch, phase) for launch, phases in GOLDEN.items() for phase in phases]
SMALL = ("recipe=zaya1_8b", "model.num_layers=2", "model.vocab_size=32768")
SETTINGS = (
    # Overrides, ranks, phase: each changes another term of the forecast.
    (("recipe=smoke_cpu",), 1, "sft"),
    (("recipe=smoke_cpu", "parallel.recompute=full"), 2, "midtrain"),
    (("recipe=smoke_cpu", "parallel.recompute=selective"), 2, "sft"),
    ((*SMALL, "parallel.expert_parallel=8"), 1024, "pretrain_1"),
    ((*SMALL, "parallel.recompute=full", "parallel.accumulation=reduce_each"), 1024, "pretrain_1"),
    ((*SMALL, "parallel.recompute=full", "parallel.reshard_after_forward=true"), 1024, "sft"),
)
NIGHTLY = tuple(
    ((*SMALL, *(f"parallel.{change}" for change in changes)), ranks, phase)
    for phase in ("pretrain_1", "midtrain", "sft")
    for ranks, changes in (
        (1024, ("recompute=selective", "expert_parallel=2")),
        (1024, ("recompute=full", "accumulation=all_reduce_last")),
        (1024, ("recompute=full", "expert_parallel=8")),
        (1024, ("reshard_after_forward=true",)),
        (64, ("shard=0", "reshard_after_forward=true")),
    )
)


def peak_of(overrides: tuple[str, ...], ranks: int, phase: str) -> int:
    return forecast(Case(compose(overrides), phase, ranks)).peak.bytes


@pytest.mark.parametrize(("launch", "phase"), SHIPPED)
def test_shipped_recipes_as_rehearsed(launch: str, phase: str) -> None:
    """The peak within 2 %, and every component at it within 2 % of the peak."""
    overrides, ranks = rehearsal_table.LAUNCHES[launch]
    found = forecast(Case(compose(overrides), phase, ranks))
    recorded = GOLDEN[launch][phase]
    stage, peak = max(recorded["peak_bytes"].items(), key=lambda item: item[1])
    assert found.peak.bytes == pytest.approx(peak, rel=TOLERANCE)
    for name, size in recorded["peak_bytes"].items():
        if name == stage:
            assert found.stage(name) == pytest.approx(size, rel=TOLERANCE), name
    moment = max((m for m in found.moments if m.stage == stage), key=lambda m: m.bytes)
    if moment is found.peak and moment.name.startswith("loss"):
        for component in COMPONENTS:
            expected = recorded["components"].get(component, 0)
            mine = moment.components.get(component, 0)
            assert mine == pytest.approx(expected, abs=TOLERANCE * peak), component


@pytest.mark.parametrize(("overrides", "ranks", "phase"), SETTINGS)
def test_settings_as_rehearsed_now(overrides: tuple[str, ...], ranks: int, phase: str) -> None:
    rehearsed = rehearse(compose(overrides), phase, ranks).peak.bytes
    assert peak_of(overrides, ranks, phase) == pytest.approx(rehearsed, rel=TOLERANCE)


@pytest.mark.parametrize("reshard", ["false", "true"])
def test_padding_of_large_groups_as_rehearsed_now(reshard: str) -> None:
    """16 experts over 64 ranks: what is gathered and sent is four times the weights, more than a
    layer's activations."""
    words = (*SMALL, "parallel.shard=64", f"parallel.reshard_after_forward={reshard}")
    found = forecast(Case(compose(words), "pretrain_1", 1024))
    for stage, peak in rehearse(compose(words), "pretrain_1", 1024).peaks.items():
        if stage != "optimizer":
            assert found.stage(stage) == pytest.approx(peak.bytes, rel=TOLERANCE), stage


@pytest.mark.nightly
@pytest.mark.parametrize(("overrides", "ranks", "phase"), NIGHTLY)
def test_more_settings_as_rehearsed_now(overrides: tuple[str, ...], ranks: int, phase: str) -> None:
    rehearsed = rehearse(compose(overrides), phase, ranks).peak.bytes
    assert peak_of(overrides, ranks, phase) == pytest.approx(rehearsed, rel=TOLERANCE)


@pytest.mark.nightly
@pytest.mark.parametrize("launch", rehearsal_table.LAUNCHES)
def test_shipped_recipes_as_rehearsed_now(launch: str) -> None:
    overrides, ranks = rehearsal_table.LAUNCHES[launch]
    for phase, rehearsal in rehearsal_table.measured(launch).items():
        assert peak_of(overrides, ranks, phase) == pytest.approx(
            rehearsal.peak.bytes, rel=TOLERANCE
        )


def test_what_does_not_fit_is_refused_with_the_cheapest_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["plan", "recipe=zaya1_8b", "--ranks", "1024", "--phase", "sft", "--memory-gb"]
    assert main([*words, "192"]) == 0
    shown = capsys.readouterr().out
    assert "margin, at least 10%" in shown and "forecast peak memory of rank 0 of 1,024" in shown
    assert main([*words, "80"]) == 2
    refused = capsys.readouterr().err
    assert "phase sft: a peak of 84.0 GB exceeds 72.0 GB, 90% of --memory-gb 80" in refused
    words_said = "parallel.shard=16 parallel.reshard_after_forward=true (62.9 GB; -1.5% time"
    assert f"cheapest change that fits: {words_said} by forecast for MI300X)" in refused
    assert main([*words, "1"]) == 2
    assert "no setting of parallel.* makes it fit" in capsys.readouterr().err


def told(config: TrainConfig, usable_bytes: float, ranks: int, *phases: str) -> str:
    """What is refused, or nothing."""
    try:
        refuse(config, ranks, Budget(usable_bytes / (1 - RESERVE) / GB, "the test"), phases)
    except ConfigError as refusal:
        return str(refusal)
    return ""


def test_the_limit_is_nine_tenths_to_the_byte() -> None:
    peak = forecast(Case(tiny(), "long", 2)).peak.bytes
    assert told(tiny(), peak + 1, 2, "long") == ""
    assert "phase long" in told(tiny(), peak - 1, 2, "long")


def test_advice_fits_every_refused_phase() -> None:
    config = compose(["recipe=zaya1_8b"])
    refused = told(config, 79e9, 1024)
    assert "phase sft" in refused and "and so does that of midtrain (80.0)" in refused
    assert "pretrain_1 (77.9)" not in refused
    words = refused.split("that fits: ")[1].split(" (")[0].split()
    better = compose(["recipe=zaya1_8b", *words])
    assert told(better, 79e9, 1024) == ""


def test_nobody_with_one_micro_batch_is_told_to_accumulate_otherwise() -> None:
    config = compose(["recipe=zaya1_8b"])
    assert "accumulation" not in told(config, 30e9, 1024, "sft")
    assert "accumulation=all_reduce_last" in told(config, 40e9, 1024, "pretrain_1")


def test_advice_is_the_fastest_that_fits_by_the_devices_own_rates() -> None:
    """Weights gathered again on a fast network, activations made again on a slow one."""
    config = compose(["recipe=zaya1_8b"])
    sheet = machine_of("H200", config.precision)
    case = Case(config, "sft", 1024)
    for gb, words in ((1e3, "reshard_after_forward=true"), (1.0, "recompute=selective")):
        machine = with_links(sheet, gb, gb)
        budget = Budget(72.0 / (1 - RESERVE), "the test", machine)
        said = fitting.advice(config, 1024, ["sft"], ["sft"], budget)
        assert f"fits: parallel.shard=16 parallel.{words} (" in said and said.endswith(
            "time by forecast for H200)"
        )
        near = next(leaner(config, 1024, ["sft"]))
        fits = [c for c in near if forecast(replace(case, config=c)).peak.bytes <= 72e9]
        own = plan_seconds([case], machine)
        least = min(plan_seconds([replace(case, config=c)], machine) for c in fits) / own - 1
        assert f"{least:+.1%} time" in said


def test_advice_fits_the_phases_that_were_not_refused_too() -> None:
    """`parallel.*` is every phase's, though the sft phase alone is too large."""
    config = compose(["recipe=zaya1_8b"])
    seen: list[tuple[str, ...]] = []

    def counted(_: TrainConfig, ranks: int, names: Iterable[str]) -> list[Case]:
        seen.append(tuple(names))
        return cases_of(config, ranks, seen[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "cases_of", counted)
        fitting.advice(config, 1024, [*config.plan.phases], ["sft"], Budget(1.0, "the test"))
    assert set(seen) == {tuple(config.plan.phases)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "advice", lambda c, n, judged, short, b: f"{judged} for {short}")
        assert told(config, 81e9, 1024).endswith(f"{[*config.plan.phases]} for ['sft']")


def test_nobody_is_told_to_save_less_than_he_does() -> None:
    lean = ["parallel.accumulation=reduce_each", "parallel.recompute=selective"]
    config = compose(["recipe=zaya1_8b", *lean])
    stages = list(leaner(config, 1024, ["sft"]))
    assert stages[0] and not any(config in found for found in stages)
    for found in stages:
        for other in found:
            assert other.parallel.accumulation == "reduce_each"
            assert other.parallel.recompute != "none" and other.parallel.shard >= 8
            assert not list(problems(other, 1024))


def test_a_group_grows_to_as_many_ranks_as_there_are_experts() -> None:
    config = compose(["recipe=zaya1_8b", "parallel.shard=0"])
    assert {c.parallel.shard for found in leaner(config, 16, ["sft"]) for c in found} == {0}
    config = compose(["recipe=zaya1_8b"])
    assert {c.parallel.shard for c in next(leaner(config, 64, ["sft"]))} == {8, 16}


def test_advice_is_words_for_the_command_line() -> None:
    words = [*SMALL, "plan.phases.pretrain_1.micro_batch_sequences=2"]
    before = compose(words)
    reached = dict(zip(REACHES, leaner(before, 1024, ["pretrain_1", "sft"]), strict=True))
    far = reached[Reach(rows=1, context=2)]
    after = next(c for c in far if c.parallel.shard == 16 and c.parallel.reshard_after_forward)
    changed = overrides(before, after)
    assert changed[:2] == ["parallel.shard=16", "parallel.reshard_after_forward=true"]
    assert changed[-3:] == [
        "plan.phases.pretrain_1.micro_batch_sequences=1",
        "plan.phases.pretrain_1.context_parallel=2",
        "plan.phases.sft.context_parallel=16",
    ]
    assert compose([*words, *changed]) == after
