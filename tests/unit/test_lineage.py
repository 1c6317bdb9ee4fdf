"""A checkpoint's past and the configurations that may continue it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.tiny import tiny
from zaya_train.config.schema import PlanConfig
from zaya_train.phases.lineage import changes, lengthened, lineage

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig


CORPORA = {"problems": "aa11", "b": "bb22", "a": "dd44"}


def stored(config: TrainConfig, index: int) -> dict[str, Any]:
    """As a checkpoint gives it back."""
    result: dict[str, Any] = json.loads(json.dumps(lineage(config, index, CORPORA)))
    return result


def with_phases(config: TrainConfig, **phases: Any) -> TrainConfig:
    return replace(config, plan=PlanConfig(phases=phases))


def test_an_unchanged_configuration_continues() -> None:
    config = tiny({})
    for index in (-1, 0, 1):
        assert changes(stored(config, index), config, CORPORA) == []


def test_the_seed_is_part_of_the_past() -> None:
    assert changes(stored(tiny({}), -1), tiny({"run.seed": 7}), CORPORA) == ["run.seed: 3 -> 7"]


@pytest.mark.parametrize("key", ["context_tokens", "rope_base", "global_batch_tokens", "mixture"])
def test_a_phase_under_way_keeps_what_its_order_depends_on(key: str) -> None:
    config = tiny({"data.sources.a": {"path": "a"}})
    name, phase = next(iter(config.plan.phases.items()))
    other: Any = {"a": 1.0} if key == "mixture" else getattr(phase, key) * 2
    values: dict[str, Any] = {key: other}
    edited = with_phases(config, **(config.plan.phases | {name: replace(phase, **values)}))
    lines = changes(stored(config, 0), edited, CORPORA)
    if key == "mixture":
        assert lines == [
            f"plan.phases.{name}.mixture.a: absent -> 1.0",
            f"plan.phases.{name}.mixture.problems: 1.0 -> absent",
        ]
    else:
        assert lines == [f"plan.phases.{name}.{key}: {other // 2} -> {other}"]


def test_a_phase_under_way_may_be_lengthened_and_one_behind_us_may_not() -> None:
    config = tiny({})
    name, phase = next(iter(config.plan.phases.items()))
    longer = replace(phase, tokens=phase.tokens * 2)
    edited = with_phases(config, **(config.plan.phases | {name: longer}))
    assert changes(stored(config, 0), edited, CORPORA) == []
    (line,) = changes(stored(config, 1), edited, CORPORA)
    assert line.startswith(f"plan.phases.{name}.tokens: ")


def test_what_lies_ahead_may_be_anything() -> None:
    config = tiny({})
    (first, phase), *_ = config.plan.phases.items()
    assert changes(stored(config, 0), with_phases(config, **{first: phase}), CORPORA) == []


def test_an_inserted_phase_is_named() -> None:
    config = tiny({})
    (first, phase), *_ = config.plan.phases.items()
    edited = with_phases(config, **({"before": phase} | config.plan.phases))
    (line,) = changes(stored(config, 0), edited, CORPORA)
    assert line == f"plan.phases: number 1 was {first}, now before"


def test_a_corpus_behind_the_checkpoint_must_hold_what_it_held() -> None:
    config = tiny({})
    (line,) = changes(stored(config, 0), config, {**CORPORA, "problems": "cc33"})
    assert "data.sources.problems" in line and "corpus/train" in line
    assert "sha256 aa11 -> cc33" in line


def test_only_sources_drawn_from_are_part_of_the_past() -> None:
    config = tiny({"data.sources.b": {"path": "b"}, "plan.phases.long.mixture": {"b": 1.0}})
    unused = tiny({"data.sources.b": {"path": "b"}, "plan.phases.short.mixture.b": 0.0})
    other = {**CORPORA, "b": "cc33"}
    assert stored(config, 0)["corpora"] == {"problems": "aa11"}
    assert stored(config, 1)["corpora"] == {"problems": "aa11", "b": "bb22"}
    assert stored(config, -1)["corpora"] == {}
    assert changes(stored(config, 0), config, other) == []
    assert changes(stored(unused, 1), unused, other) == []
    assert len(changes(stored(config, 1), config, other)) == 1


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("data.balance_rows", 8, 4),
        ("data.max_documents_per_row", 1024, 256),
        ("data.sources.problems.max_documents", None, 50),
    ],
)
@pytest.mark.parametrize("index", [0, 1])
def test_settings_of_rows_stay_what_they_were_once_a_phase_has_begun(
    key: str, old: int | None, new: int, index: int
) -> None:
    """Otherwise the rows left of an epoch would be taken for others, and documents come twice."""
    before = tiny({})
    assert changes(stored(before, index), tiny({key: new}), CORPORA) == [f"{key}: {old} -> {new}"]
    assert changes(stored(before, -1), tiny({key: new}), CORPORA) == []
    earlier = stored(before, index)
    del earlier["rows"]
    assert changes(earlier, tiny({key: new}), CORPORA) == []


def test_limits_of_sources_ahead_may_change() -> None:
    values = {"data.sources.b": {"path": "b"}, "plan.phases.long.mixture": {"b": 1.0}}
    config = tiny(values)
    limited = tiny({**values, "data.sources.b.max_documents": 9})
    assert changes(stored(config, 0), limited, CORPORA) == []
    assert len(changes(stored(config, 1), limited, CORPORA)) == 1


def test_a_source_no_longer_drawn_from_is_a_change_of_the_mixture() -> None:
    config = tiny({"data.sources.b": {"path": "b"}, "plan.phases.short.mixture.b": 1.0})
    (line,) = changes(stored(config, 0), tiny({}), CORPORA)
    assert line == "plan.phases.short.mixture.b: 1.0 -> absent"


def test_every_field_that_differs_is_told_by_its_full_key() -> None:
    before = stored(tiny({}), 0)
    key = "plan.phases.short.schedule"
    config = tiny({f"{key}.final_ratio": 0.5, f"{key}.decay_tokens": 0})
    assert changes(before, config, CORPORA) == [
        f"{key}.decay_tokens: 512 -> 0",
        f"{key}.final_ratio: 0.0 -> 0.5",
    ]
    ramp = {"plan.phases.short.batch_ramp": {"start_tokens": 64, "over_tokens": 256}}
    (line,) = changes(before, tiny(ramp), CORPORA)
    assert line.startswith("plan.phases.short.batch_ramp: None -> {")
    # A field of a later version, in phases of an earlier one.
    del before["phases"][0][1]["batch_ramp"]
    assert changes(before, tiny({}), CORPORA) == []


def test_a_phase_that_is_over_cannot_be_lengthened() -> None:
    phases = tiny({}).plan.phases
    name, phase = next(iter(phases.items()))
    rows = -(-phase.tokens // phase.context_tokens)
    assert lengthened((rows,), phases) == []
    longer = {**phases, name: replace(phase, tokens=phase.tokens + phase.context_tokens)}
    [line] = lengthened((rows,), longer)
    assert line.startswith(f"plan.phases.{name}.tokens: ")
    assert f"asks for {rows + 1} rows and the phase ended after {rows}" in line
    assert lengthened((), longer) == []
