"""A checkpoint's past and the configurations that may continue it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.tiny import tiny
from zaya_train.config.schema import PlanConfig
from zaya_train.phases.lineage import changes, lineage

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig


def stored(config: TrainConfig, index: int) -> dict[str, Any]:
    """As a checkpoint gives it back."""
    result: dict[str, Any] = json.loads(json.dumps(lineage(config, index)))
    return result


def with_phases(config: TrainConfig, **phases: Any) -> TrainConfig:
    return replace(config, plan=PlanConfig(phases=phases))


def test_an_unchanged_configuration_continues() -> None:
    config = tiny({})
    for index in (-1, 0, 1):
        assert changes(stored(config, index), config) == []


def test_the_seed_is_part_of_the_past() -> None:
    assert changes(stored(tiny({}), -1), tiny({"run.seed": 7})) == ["run.seed: 3 -> 7"]


@pytest.mark.parametrize("key", ["context_tokens", "rope_base", "global_batch_tokens", "mixture"])
def test_a_phase_under_way_keeps_what_its_order_depends_on(key: str) -> None:
    config = tiny({})
    name, phase = next(iter(config.plan.phases.items()))
    other: Any = {"a": 1.0} if key == "mixture" else getattr(phase, key) * 2
    values: dict[str, Any] = {key: other}
    edited = with_phases(config, **(config.plan.phases | {name: replace(phase, **values)}))
    (line,) = changes(stored(config, 0), edited)
    assert line.startswith(f"plan.phases.{name}.{key}: ") and line.endswith(f"-> {other}")


def test_a_phase_under_way_may_be_lengthened_and_one_behind_us_may_not() -> None:
    config = tiny({})
    name, phase = next(iter(config.plan.phases.items()))
    longer = replace(phase, tokens=phase.tokens * 2)
    edited = with_phases(config, **(config.plan.phases | {name: longer}))
    assert changes(stored(config, 0), edited) == []
    (line,) = changes(stored(config, 1), edited)
    assert line.startswith(f"plan.phases.{name}.tokens: ")


def test_what_lies_ahead_may_be_anything() -> None:
    config = tiny({})
    (first, phase), *_ = config.plan.phases.items()
    assert changes(stored(config, 0), with_phases(config, **{first: phase})) == []


def test_an_inserted_phase_is_named() -> None:
    config = tiny({})
    (first, phase), *_ = config.plan.phases.items()
    edited = with_phases(config, **({"before": phase} | config.plan.phases))
    assert changes(stored(config, 0), edited) == [f"plan.phases: number 1 was {first}, now before"]
