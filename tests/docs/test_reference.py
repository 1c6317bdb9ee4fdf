"""The configuration page is what the dataclasses say now, and the table of published choices names
keys that exist with the values that the recipe has."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, make_dataclass
from typing import Any, Literal

import pytest

from tests.helpers import config_reference, rooms_diagram
from tests.helpers.config_reference import PAGE, Key, field_docs, page, sections, shown, values_of
from tests.helpers.paths import REPOSITORY
from tests.unit.test_import_direction import ALLOWED
from zaya_train.config.cluster import SubmitConfig
from zaya_train.config.kinds import patterns
from zaya_train.config.schema import TrainConfig

PUBLISHED = REPOSITORY / "docs" / "reference" / "published.md"
_ROW = re.compile(r"\| (?P<source>[^|]+) \| [^|]+ \| `(?P<key>[\w.]+)` \| `(?P<value>[^`]+)` \|")
NAMES_SAY_IT = frozenset(
    {"plan.phases.NAME.exit_gate", "supervisor.most_backoff_seconds", "logging.wandb"}
    | {"logging.wandb_project", "logging.tensorboard", "optim.adamw.learning_rate"}
    | {f"optim.muon.{name}" for name in ("momentum", "nesterov", "newton_schulz_steps")}
    | {f"optim.{name}" for name in ("balancing.learning_rate", "adamw.beta1", "adamw.beta2")}
    | {f"optim.{name}" for name in ("adamw.eps", "balancing.eps", "balancing.beta1")}
    | {"optim.balancing.beta2", "kernels.linear_cross_entropy", "kernels.newton_schulz"}
    | {f"kernels.{name}" for name in ("cca", "attention", "norm_residual", "router", "grouped_mlp")}
    | {"nodes", "cpus_per_task", "time_limit_minutes", "partition", "account", "qos", "constraint"}
    | {"environment.NAME.value", "jobs.NAME.nodes", "jobs.NAME.time_limit_minutes"}
    | {"jobs.NAME.expert_parallel", "jobs.NAME.accumulation", "jobs.NAME.recompute"}
    | {"jobs.NAME.reshard_after_forward"}
)
"""Keys without a help of their own; every new one has a help."""


def test_the_page_is_what_the_code_says() -> None:
    assert PAGE.read_text() == page(), "run: python -m tests.helpers.config_reference"


def keys() -> list[Key]:
    return [key for cls in (TrainConfig, SubmitConfig) for s in sections(cls) for key in s.keys]


def test_every_tagged_key_is_on_the_page() -> None:
    named = {key.key.replace("NAME", "*") for key in keys() if key.tag}
    assert named == {pattern.removesuffix(".*") for pattern in patterns()}


def test_every_key_has_a_help_or_a_name_that_says_it() -> None:
    assert {key.key for key in keys() if not key.meaning} <= NAMES_SAY_IT


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a dataclass may hold."""

    choice: Literal["a", "b"] = "a"
    """One of
    two."""
    count: int
    names: dict[str, float] = field(default_factory=dict)
    """By name."""
    limit: int | None = None


def test_facts_are_taken_from_the_fields() -> None:
    (section,) = sections(Sample)
    assert section.meaning == "What a dataclass may hold."
    assert [(key.kind, key.default, key.meaning) for key in section.keys] == [
        ("`a` or `b`", "a", "One of two."),
        ("integer", "", ""),
        ("number by name", "{}", "By name."),
        ("integer or `null`", "null", ""),
    ]
    assert field_docs(Sample) == {"choice": "One of two.", "names": "By name."}


def test_a_new_key_changes_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    bases = (TrainConfig,)
    more: Any = make_dataclass("More", [("extra", int, 3)], bases=bases, frozen=True, kw_only=True)
    monkeypatch.setattr(config_reference, "field_docs", lambda cls: {})
    assert "extra" in {key.key for section in sections(more) for key in section.keys}


def published(text: str) -> dict[str, str]:
    """Key -> value of the page's tables."""
    return {row["key"]: row["value"] for row in _ROW.finditer(text)}


def test_every_row_of_the_tables_of_keys_is_read() -> None:
    tables = PUBLISHED.read_text().partition("## Keys")[2].partition("## Code")[0]
    lines = [line for line in tables.splitlines() if line.startswith("|")]
    rows = [line for line in lines if not line.startswith(("| source", "|---"))]
    assert len(rows) > 60 and [row for row in rows if not _ROW.fullmatch(row)] == []


def wrong(text: str) -> list[str]:
    """Keys of a page that the recipe does not have, or has another value for."""
    values = {key: shown(value) for key, value in values_of("zaya1_8b").items()}
    return [
        f"{key}: {value}, and the recipe has {values.get(key, 'no such key')}"
        for key, value in published(text).items()
        if values.get(key) != value
    ]


def test_published_choices_are_keys_with_these_values() -> None:
    assert wrong(PUBLISHED.read_text()) == []


def test_every_key_of_shape_and_length_is_in_the_table() -> None:
    ends = (".tokens", ".context_tokens", ".rope_base", ".context_parallel")
    mixed = ("plan.phases.midtrain.mixture.", "plan.phases.sft.mixture.")
    asked = {
        key
        for key in values_of("zaya1_8b")
        if key.startswith(("model.", *mixed)) or (key.startswith("plan.") and key.endswith(ends))
    }
    assert asked - published(PUBLISHED.read_text()).keys() == set()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `model.num_layers` | `40` |", "| `model.num_layers` | `80` |"),
        ("`model.num_layers`", "`model.layers`"),
        ("`plan.phases.sft.rope_base` | `5_000_000`", "`plan.phases.sft.rope_base` | `1_000_000`"),
    ],
)
def test_a_planted_choice_is_found(old: str, new: str) -> None:
    text = PUBLISHED.read_text()
    assert old in text and len(wrong(text.replace(old, new))) == 1


def test_the_picture_of_rooms_is_the_import_tests_table() -> None:
    assert rooms_diagram.PICTURE.read_text() == rooms_diagram.drawing(), (
        "run: python -m tests.helpers.rooms_diagram"
    )


def test_a_new_arrow_or_room_changes_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    before = rooms_diagram.drawing()
    monkeypatch.setitem(ALLOWED, "attic", {"config"})
    assert "attic" in rooms_diagram.drawing()
    monkeypatch.delitem(ALLOWED, "attic")
    monkeypatch.setitem(ALLOWED, "phases", {"config", "data"})
    assert ("phases", "data") in rooms_diagram.arrows() and rooms_diagram.drawing() != before


def test_every_room_is_on_the_page_of_the_architecture() -> None:
    table = (REPOSITORY / "docs" / "architecture.md").read_text()
    assert [room for room in rooms_diagram.rooms() if f"`{room}`" not in table] == []
