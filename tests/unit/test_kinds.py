"""Every key has a tag, and the math hash follows the math keys alone."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import pytest

from tests.helpers.tiny import DELETED, tiny
from zaya_train.config.build import build, to_dict
from zaya_train.config.check import problems
from zaya_train.config.kinds import (
    AT_START,
    EXACT,
    TAGS,
    kind_of,
    leaf_differences,
    leaves,
    math_hash,
    math_values,
    patterns,
)
from zaya_train.config.schema import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Iterator


def keys_of(cls: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted leaf of a configuration class, names of the user's as `*`."""
    options = [arg for arg in get_args(cls) if arg is not type(None)]
    inner = options[0] if type(None) in get_args(cls) else cls
    if get_origin(inner) is dict:
        yield from keys_of(get_args(inner)[1], f"{prefix}.*")
    elif dataclasses.is_dataclass(inner):
        for name, hint in get_type_hints(inner).items():
            yield from keys_of(hint, f"{prefix}.{name}".lstrip("."))
    else:
        yield prefix


def test_every_key_has_exactly_one_tag_and_every_tag_a_key() -> None:
    tagged = [
        f"{section}.{key}"
        for section, kinds in TAGS.items()
        for keys in kinds.values()
        for key in keys.split()
    ]
    assert sorted(tagged) == sorted(keys_of(TrainConfig))


def test_exceptions_are_of_the_kind_they_are_exceptions_of() -> None:
    assert {kind_of(key) for key in EXACT} == {"speed"}
    assert {kind_of(key) for key in AT_START} == {"math"}


def test_names_of_the_users_are_wildcards() -> None:
    assert kind_of("plan.phases.any name.schedule.kind") == "math"
    assert kind_of("plan.phases.x.mixture.web") == "math"
    assert kind_of("plan.phases.x.micro_batch_sequences") == "speed"
    assert kind_of("data.sources.web.path") == "io"
    assert kind_of("plan.phases.x.schedule") is None
    assert kind_of("optim.muon.beta7") is None
    assert set(patterns().values()) == {"math", "speed", "io"}


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"run.dir": "elsewhere"}, True),
        ({"kernels.attention": "reference"}, True),
        ({"plan.phases.long.context_parallel": 1}, True),
        ({"data.sources.problems.path": "moved"}, True),
        ({"run.seed": 4}, False),
        ({"optim.muon.learning_rate": 0.03}, False),
        ({"plan.phases.short.mixture.problems": 2.0}, False),
        ({"plan.phases.short.batch_ramp": {"start_tokens": 64, "over_tokens": 256}}, False),
        ({"plan.phases.long": DELETED}, False),
        ({"precision.compute_dtype": "bf16"}, False),
    ],
)
def test_the_math_hash_follows_math_keys_alone(changes: dict[str, Any], same: bool) -> None:
    assert (math_hash(tiny(changes)) == math_hash(tiny())) is same


def test_another_order_of_the_phases_is_other_math() -> None:
    values = to_dict(tiny())
    phases = dict(reversed(values["plan"]["phases"].items()))
    turned = build(TrainConfig, {**values, "plan": {"phases": phases}})
    assert math_hash(turned) != math_hash(tiny())
    assert leaf_differences(values, to_dict(turned)) == {
        "plan.phases": (["short", "long"], ["long", "short"])
    }


def test_a_section_that_is_null_has_no_leaves_and_a_value_that_is_null_is_one() -> None:
    found = dict(leaves(to_dict(tiny())))
    assert found["optim.balancing.skip_target"] is None
    assert not [key for key in found if "batch_ramp" in key]
    ramp = {"plan.phases.short.batch_ramp": {"start_tokens": 64, "over_tokens": 256}}
    assert leaf_differences(to_dict(tiny()), to_dict(tiny(ramp))) == {
        "plan.phases.short.batch_ramp.start_tokens": ("absent", 64),
        "plan.phases.short.batch_ramp.over_tokens": ("absent", 256),
    }


def test_math_values_survive_json() -> None:
    values = to_dict(tiny({"checkpoint.allow_changed": ["run.seed"]}))
    assert leaf_differences(values, json.loads(json.dumps(values))) == {}
    assert math_values(json.loads(json.dumps(values))) == math_values(values)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("optim.muon.learning_rate", None),
        ("plan.phases.short.schedule.final_ratio", None),
        ("optim.muon.learning_rat", "unknown key; did you mean optim.muon.learning_rate?"),
        ("optim.muon", "unknown key"),
        ("plan.phases.gone.learning_rate_scale", "this configuration has no such entry"),
        ("kernels.cca", "is of kind speed, which may always change"),
        ("run.dir", "is of kind io, which may always change"),
        ("plan.phases.long.rope_base", None),
        ("precision.compute_dtype", None),
        ("guard.sigma", None),
        ("run.seed", "cannot be named; what can: optim.*"),
        ("plan.phases.short.global_batch_tokens", "cannot be named"),
        ("plan.phases.short.mixture.problems", "cannot be named"),
        ("data.balance_rows", "cannot be named"),
        ("model.num_layers", "cannot be named"),
        ("checkpoint.branch_from", "cannot be named"),
        ("plan.phases", "unknown key"),
    ],
)
def test_only_math_keys_that_are_there_can_be_allowed(key: str, told: str | None) -> None:
    found = list(problems(tiny({"checkpoint.allow_changed": [key]}), 2))
    assert len(found) == int(told is not None)
    assert all(key in line and str(told) in line for line in found), found
