"""Forecast memory against rehearsals: recorded ones of every shipped recipe, live ones of settings
that change what is kept, gathered and reduced."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers import rehearsal_table
from tests.helpers.tiny import tiny
from zaya_train.config.errors import ConfigError
from zaya_train.main import compose, main
from zaya_train.planning import fitting
from zaya_train.planning.case import Case, cases_of
from zaya_train.planning.changes import CHANGES, overrides
from zaya_train.planning.components import COMPONENTS, GB, RESERVE
from zaya_train.planning.fitting import Budget, refuse
from zaya_train.planning.memory import forecast
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
    assert "the cheapest change that fits: parallel.recompute=selective (71.9 GB" in refused
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
    assert "accumulation" not in told(config, 70e9, 1024, "sft")
    assert "accumulation=all_reduce_last" in told(config, 70e9, 1024, "pretrain_1")


def test_advice_fits_the_phases_that_were_not_refused_too() -> None:
    """`parallel.*` is every phase's, though the sft phase alone is too large."""
    config = compose(["recipe=zaya1_8b"])
    seen: list[tuple[str, ...]] = []

    def counted(_: TrainConfig, ranks: int, names: Iterable[str]) -> list[Case]:
        seen.append(tuple(names))
        return cases_of(config, ranks, seen[-1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "cases_of", counted)
        fitting.advice(config, 1024, config.plan.phases, ["sft"], Budget(1.0, "the test"))
    assert set(seen) == {tuple(config.plan.phases)}


def test_nobody_is_told_to_save_less_than_he_does() -> None:
    lean = ["parallel.accumulation=reduce_each", "parallel.recompute=selective"]
    config = compose(["recipe=zaya1_8b", *lean])
    for change in CHANGES:
        after = change.applied(config, ["sft"]).parallel
        assert after.accumulation == "reduce_each" and after.recompute != "none"
    assert "accumulation" not in told(config, 60e9, 1024)


def test_advice_is_words_for_the_command_line() -> None:
    before = compose([*SMALL, "plan.phases.pretrain_1.micro_batch_sequences=2"])
    after = CHANGES[-1].applied(before, ["pretrain_1", "sft"])
    words = overrides(before, after).split()
    assert words[-3:] == [
        "plan.phases.pretrain_1.micro_batch_sequences=1",
        "plan.phases.pretrain_1.context_parallel=4",
        "plan.phases.sft.context_parallel=32",
    ]
    assert compose([*SMALL, "plan.phases.pretrain_1.micro_batch_sequences=2", *words]) == after
