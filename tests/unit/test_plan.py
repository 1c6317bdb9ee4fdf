"""The plan as pure functions: schedules, batch ramp, steps, carry-over."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.tiny import tiny
from zaya_train.config.derive import phase_sequences, sequences_per_step
from zaya_train.config.schema import BatchRampConfig, PhaseConfig, ScheduleConfig, ScheduleKind
from zaya_train.phases.carry import carry_over
from zaya_train.phases.plan import batch_sequences, schedule_factor, steps_in
from zaya_train.tools.plan import PlanRequest, as_launched

TOTAL = 1000
PHASE = tiny().plan.phases["short"]


def factor(tokens: int, schedule: ScheduleConfig) -> float:
    return schedule_factor(schedule, tokens, TOTAL)


def test_wsd_at_its_corners() -> None:
    wsd = ScheduleConfig(kind="wsd", warmup_tokens=100, decay_tokens=400, final_ratio=0.2)
    expected = {0: 0.0, 50: 0.5, 99: 0.99, 100: 1.0, 600: 1.0, 800: 0.6, 1000: 0.2, 1100: 0.2}
    for tokens, value in expected.items():
        assert factor(tokens, wsd) == pytest.approx(value, abs=1e-12), tokens


def test_wsd_without_decay_stays_at_its_peak() -> None:
    wsd = ScheduleConfig(kind="wsd", warmup_tokens=100, final_ratio=0.2)
    assert [factor(t, wsd) for t in (100, 999, 1000, 1200)] == [1.0] * 4


def test_wsd_may_decay_right_after_warmup() -> None:
    wsd = ScheduleConfig(kind="wsd", warmup_tokens=500, decay_tokens=500)
    assert [factor(t, wsd) for t in (250, 500, 750, 1000)] == [0.5, 1.0, 0.5, 0.0]


def test_cosine_at_its_corners() -> None:
    cosine = ScheduleConfig(kind="cosine", warmup_tokens=200, final_ratio=0.1)
    half = 0.1 + 0.9 * 0.5
    quarter = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))
    expected = {0: 0.0, 100: 0.5, 200: 1.0, 400: quarter, 600: half, 1000: 0.1, 1300: 0.1}
    for tokens, value in expected.items():
        assert factor(tokens, cosine) == pytest.approx(value, abs=1e-12), tokens


def test_linear_at_its_corners() -> None:
    linear = ScheduleConfig(kind="linear", final_ratio=0.5)
    expected = {0: 1.0, 250: 0.875, 500: 0.75, 1000: 0.5, 2000: 0.5}
    assert {t: factor(t, linear) for t in expected} == pytest.approx(expected)


def test_constant_after_warmup() -> None:
    constant = ScheduleConfig(kind="constant", warmup_tokens=10, final_ratio=0.3)
    assert [factor(t, constant) for t in (5, 10, 1000)] == [0.5, 1.0, 1.0]


def test_a_phase_that_is_all_warmup() -> None:
    kinds: tuple[ScheduleKind, ...] = ("wsd", "cosine", "linear", "constant")
    for kind in kinds:
        assert factor(TOTAL, ScheduleConfig(kind=kind, warmup_tokens=TOTAL)) == 1.0


@given(
    kind=st.sampled_from(["wsd", "cosine", "linear", "constant"]),
    warmup=st.integers(0, 500),
    decay=st.integers(0, 500),
    final=st.floats(0, 1),
    tokens=st.integers(1, 1500),
)
def test_schedule_rises_then_falls_within_its_bounds(
    kind: ScheduleKind, warmup: int, decay: int, final: float, tokens: int
) -> None:
    schedule = ScheduleConfig(
        kind=kind,
        warmup_tokens=warmup,
        decay_tokens=decay if kind == "wsd" else 0,
        final_ratio=final,
    )
    now, after = factor(tokens, schedule), factor(tokens + 1, schedule)
    assert 0 <= now <= 1
    if tokens + 1 <= warmup:
        assert after > now
    elif tokens >= warmup:
        assert after <= now
        assert now >= final - 1e-12


def ramped(start: int, over: int, full: int = 16, rows: int = 200) -> PhaseConfig:
    """A phase counted in rows of 64 tokens."""
    ramp = BatchRampConfig(start_tokens=start * 64, over_tokens=over * 64)
    return replace(PHASE, tokens=rows * 64, global_batch_tokens=full * 64, batch_ramp=ramp)


def steps_of(phase: PhaseConfig, unit: int) -> list[int]:
    """Rows of every step, by iterating."""
    consumed, sizes = 0, []
    while consumed < phase_sequences(phase):
        sizes.append(batch_sequences(phase, consumed, unit))
        consumed += sizes[-1]
    return sizes


@given(
    unit=st.sampled_from([1, 2, 4]),
    start=st.integers(1, 4),
    over=st.integers(1, 200),
    rows=st.integers(1, 200),
)
def test_ramp_grows_in_multiples_of_the_unit(unit: int, start: int, over: int, rows: int) -> None:
    phase = ramped(start * unit, min(over, rows), full=8 * unit, rows=rows)
    sizes = steps_of(phase, unit)
    assert all(size % unit == 0 and 0 < size <= sequences_per_step(phase) for size in sizes)
    assert all(before <= after for before, after in pairwise(sizes[:-1]))
    assert sum(sizes[:-1]) < phase_sequences(phase) <= sum(sizes)
    assert sum(sizes) - phase_sequences(phase) < unit
    assert steps_in(phase, unit) == len(sizes)


def test_ramp_by_hand() -> None:
    phase = ramped(start=4, over=24, full=16, rows=80)
    # After n rows: 4 + 12 n / 24, floored to even.
    assert steps_of(phase, 2) == [4, 6, 8, 12, 16, 16, 16, 2]


def test_ramp_starts_at_its_start_and_ends_at_the_full_batch() -> None:
    phase = ramped(start=4, over=100, full=16)
    assert batch_sequences(phase, 0, 4) == 4
    assert batch_sequences(phase, 99, 4) < 16
    assert batch_sequences(phase, 100, 4) == 16


@pytest.mark.parametrize(("rows", "unit"), [(32, 4), (33, 4), (3, 2), (16, 16), (17, 1)])
def test_steps_without_a_ramp_equal_iterating(rows: int, unit: int) -> None:
    phase = replace(PHASE, tokens=rows * 64, global_batch_tokens=16 * 64)
    sizes = steps_of(phase, unit)
    assert steps_in(phase, unit) == len(sizes)
    assert all(size == 16 for size in sizes[:-1])
    assert sum(sizes) - rows < unit


def test_a_phases_tokens_are_rounded_up_to_rows() -> None:
    assert phase_sequences(replace(PHASE, tokens=65)) == 2
    assert phase_sequences(replace(PHASE, tokens=64)) == 1


def test_carry_over_says_what_changes_and_what_is_kept() -> None:
    phases = tiny().plan.phases
    rows = {row.item: row for row in carry_over(phases["short"], phases["long"])}
    for item in ("weights", "Muon momentum", "AdamW moments and step count", "mixture"):
        assert rows[item].fate == "kept", item
    assert rows["balancing biases, their moments and step count"].fate == "kept"
    assert rows["learning-rate schedule"].fate == "reset"
    assert rows["data cursor"].fate == "reset"
    assert rows["context tokens"].fate == "changed"
    assert rows["context tokens"].detail == "64 -> 128"
    assert rows["context parallel"].detail == "1 -> 2"
    assert rows["RoPE base"].detail == "10000.0 -> 100000.0"
    assert rows["learning-rate scale"].fate == "kept"


def test_edges_show_the_degrees_of_the_launch() -> None:
    config = tiny()
    config = replace(config, parallel=replace(config.parallel, context_parallel_fit=True))
    for ranks, degrees in ((1, [1, 1]), (2, [1, 2])):
        phases = as_launched(PlanRequest(config, ranks))
        assert [phase.context_parallel for phase in phases.values()] == degrees
        assert list(phases) == list(config.plan.phases)
