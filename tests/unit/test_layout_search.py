"""`zaya plan --search` and `--explain`: what is found obeys the rules, fits and is the fastest."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from zaya_train.config.check import problems
from zaya_train.main import compose, main
from zaya_train.planning.case import Case, cases_of
from zaya_train.planning.components import GB, RESERVE
from zaya_train.planning.fitting import Budget
from zaya_train.planning.memory import forecast
from zaya_train.planning.search import search

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig

SMALL = ["recipe=zaya1_8b", "model.num_layers=2", "model.vocab_size=32768"]


def small() -> TrainConfig:
    config = compose(SMALL)
    phases = {name: config.plan.phases[name] for name in ("pretrain_1", "sft")}
    return replace(config, plan=replace(config.plan, phases=phases))


def seconds(case: Case) -> float:
    """A clock of the test's own: full recompute and many rows are fastest."""
    return {"none": 3.0, "selective": 2.0, "full": 1.0}[case.parallel.recompute] / (
        case.phase.micro_batch_sequences
    )


def test_what_is_found_is_valid_fits_and_is_the_fastest() -> None:
    config = small()
    budget = Budget(192, "192 GB")
    found = search(config, (16, 8), budget, seconds)
    assert found.best
    for one in found.best:
        assert not list(problems(one.config, 16))
        peak = max(forecast(case).peak.bytes for case in cases_of(one.config, 16))
        assert one.peak_bytes == peak <= budget.usable_bytes
    times = [one.seconds for one in found.best]
    assert times == sorted(times)
    first = found.best[0].config
    assert first.parallel.recompute == "full"
    assert {p.micro_batch_sequences for p in first.plan.phases.values()} == {4}
    assert len(found.best) + sum(found.refused.values()) == found.tried


def test_a_plans_seconds_are_those_of_all_its_steps() -> None:
    """Phases of one context that differ in batch or in context ranks are judged apart."""
    config = small()
    first = config.plan.phases["pretrain_1"]
    phases = {
        "one": first,
        "two": replace(first, global_batch_tokens=first.global_batch_tokens // 2),
        "three": replace(first, context_parallel=4),
    }
    config = replace(config, plan=replace(config.plan, phases=phases))

    def by_context(case: Case) -> float:
        return case.micro_batches / case.phase.context_parallel**2

    best = search(config, (16, 8), Budget(192, "192 GB"), by_context).best[0]
    chosen = best.config.plan.phases
    assert [phase.context_parallel for phase in chosen.values()] == [2, 2, 8]
    steps = [phase.tokens / phase.global_batch_tokens for phase in phases.values()]
    each = [by_context(case) for case in cases_of(best.config, 16)]
    assert best.seconds == pytest.approx(sum(n * s for n, s in zip(steps, each, strict=True)))


def test_what_does_not_fit_is_counted_with_its_reason() -> None:
    config = small()
    peaks = [one.peak_bytes for one in search(config, (16, 8), Budget(192, ""), seconds).best]
    middle = sorted(peaks)[len(peaks) // 2]
    found = search(config, (16, 8), Budget(middle / (1 - RESERVE) / GB, ""), seconds)
    assert all(one.peak_bytes <= middle for one in found.best)
    nothing = search(config, (16, 8), Budget(0.001, ""), seconds)
    assert "more memory than a device has" in " ".join(nothing.refused)
    assert not nothing.best and sum(nothing.refused.values()) == nothing.tried


def test_the_command_shows_layouts_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", *SMALL, "--ranks", "8", "--search"]
    assert main(words) == 2
    assert "--search: needs a --device" in capsys.readouterr().err
    assert main([*words, "--device", "MI300X"]) == 0
    shown = capsys.readouterr().out
    assert "settings, seconds relative to the first" in shown and "1.000" in shown
    assert "days" in shown
    assert main([*words, "--device", "MI300X", "--memory-gb", "0.001"]) == 2
    told = capsys.readouterr()
    assert "36 of 36 settings are out: phase pretrain_1: more memory" in told.out
    assert "none of 36 settings fits 0.001 GB" in told.err


def test_explain_gives_every_part_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", *SMALL, "--ranks", "1024", "--phase", "sft", "--explain"]
    assert main([*words, "--device", "MI300X"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 x 2 x 4 D T" in shown and "T 16,384 tokens" in shown
    assert "most of the memory: activations" in shown
    assert "most of the time: attention" in shown
    assert "data sheet" in shown and "assumed" in shown
