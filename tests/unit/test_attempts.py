"""Configurations compared and kept, attempt by attempt."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.tiny import tiny
from zaya_train.config.build import to_dict
from zaya_train.config.diff import differences, model_differences
from zaya_train.config.errors import ConfigError
from zaya_train.train.attempts import newest_config, read_config, record_attempt

if TYPE_CHECKING:
    from pathlib import Path


def values(changes: dict[str, Any] | None = None) -> dict[str, Any]:
    return to_dict(tiny(changes))


def test_equal_configurations_do_not_differ() -> None:
    assert differences(values(), values()) == {}


def test_changed_added_and_removed_keys_are_named_with_both_values() -> None:
    old = values({"data.sources.old": {"path": "o"}})
    new = values({"optim.muon.learning_rate": 0.5, "data.sources.new": {"path": "n"}})
    assert differences(old, new) == {
        "optim.muon.learning_rate": (0.02, 0.5),
        "data.sources.new": ("absent", new["data"]["sources"]["new"]),
        "data.sources.old": (old["data"]["sources"]["old"], "absent"),
    }


def test_none_is_a_value() -> None:
    assert differences({"a": None}, {"a": 0}) == {"a": (None, 0)}
    assert differences({"a": {"b": 1}}, {"a": None}) == {"a": ({"b": 1}, None)}


def test_the_order_of_phases_counts() -> None:
    old = values()
    phases = old["plan"]["phases"]
    new = {**old, "plan": {"phases": {"long": phases["long"], "short": phases["short"]}}}
    assert differences(old, new) == {"plan.phases": (["short", "long"], ["long", "short"])}


def test_every_attempts_configuration_is_kept(tmp_path: Path) -> None:
    first, second = values(), values({"optim.clip_norm": 2.0})
    assert record_attempt(tmp_path, 1, first) == {}
    assert record_attempt(tmp_path, 2, second) == {"optim.clip_norm": (1.0, 2.0)}
    assert record_attempt(tmp_path, 3, second) == {}
    assert json.loads((tmp_path / "config.json").read_text()) == second
    kept = sorted((tmp_path / "configs").iterdir())
    assert [path.name for path in kept] == [f"attempt-{n:04d}.json" for n in (1, 2, 3)]
    assert [json.loads(path.read_text()) for path in kept] == [first, second, second]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_what_is_no_configuration_is_set_aside(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"config\.json: not .*; move it away"):
        read_config(tmp_path / "config.json")
    assert newest_config(tmp_path) == {}
    assert record_attempt(tmp_path, 2, values()) == {}
    assert (tmp_path / "config.json.bad").read_text() == content
    assert "config.json.bad" in caplog.text
    assert newest_config(tmp_path) == json.loads(json.dumps(values()))


def test_two_stages_of_one_model_and_two_models() -> None:
    # A manifest sorts its keys.
    model = dict(sorted(values()["model"].items()))
    stage = values()["model"] | {"rope_base": 77.0, "max_context_tokens": 999, "init_std": 0.5}
    assert model_differences(model, stage) == []
    other = stage | {"norm_eps": 1e-6, "skip_output": "zero"}
    assert model_differences(model, other) == [
        "norm_eps is 1e-05 there, 1e-06 here",
        "skip_output is identity there, zero here",
    ]
    told = model_differences(model, other, frozenset({"skip_output"}))
    assert told == ["norm_eps is 1e-05 there, 1e-06 here"]
