from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.tiny import RUN, changed
from zaya_train.config.build import build
from zaya_train.config.errors import ConfigError, DataError
from zaya_train.config.schema import TrainConfig
from zaya_train.data.corpus import MANIFEST, read_manifest
from zaya_train.data.survey import MANY_PASSES, say_passes, survey
from zaya_train.tools.plan_sources import source_lines

from .builders import CorpusFactory, problem, problems

if TYPE_CHECKING:
    from pathlib import Path


def config(path: Path, **changes: Any) -> TrainConfig:
    values = changed(RUN, {"data.sources.problems.path": str(path), "data.validation": {}})
    made = build(TrainConfig, values)
    source = replace(made.data.sources["problems"], **changes)
    return replace(made, data=replace(made.data, sources={"problems": source}))


def test_passes_over_a_source_add_up_over_phases(corpora: CorpusFactory) -> None:
    path = corpora.chat("c", problems(40, longest=30))
    passes = survey(config(path))
    assert passes["problems"] > 1
    survey(config(path, max_epochs=passes["problems"] + 0.01))
    with pytest.raises(ConfigError, match=r"sources.problems.max_epochs: the plan makes"):
        survey(config(path, max_epochs=passes["problems"] - 0.01))


def test_a_later_phase_without_a_row_is_found_at_the_start(corpora: CorpusFactory) -> None:
    path = corpora.chat("c", [problem("", answer="x" * 100)])
    with pytest.raises(DataError, match="no row at context_tokens=64"):
        survey(config(path))


@pytest.mark.parametrize("key", ["max_epochs", "max_documents"])
def test_settings_must_be_positive(corpora: CorpusFactory, key: str) -> None:
    path = corpora.chat("c", problems(5, longest=5))
    with pytest.raises(ConfigError, match=f"sources.problems.{key}: 0 must be positive"):
        survey(config(path, **{key: 0}))


def test_a_plan_estimates_passes_and_names_what_is_not_there(
    corpora: CorpusFactory, tmp_path: Path
) -> None:
    path = corpora.chat("c", problems(40, longest=30))
    planned = sum(phase.tokens for phase in config(path).plan.phases.values())
    made = planned / read_manifest(path).tokens
    lines = source_lines(config(path))
    assert lines[0] == f"passes over each source, by tokens: problems {made:,.2f}"
    # The tiny rows are padded by an eighth.
    assert made / survey(config(path))["problems"] == pytest.approx(1.15, abs=0.02)
    assert [line.startswith("warning: source problems is read") for line in lines[1:]] == [True] * (
        made > MANY_PASSES
    )
    absent = source_lines(config(tmp_path / "no corpus"))
    told = "sources without a readable corpus on this machine: problems"
    assert absent == [f"{told} ({tmp_path / 'no corpus'})"]
    (path / MANIFEST).write_text("{")
    assert source_lines(config(path)) == [f"{told} ({path})"]


def test_passes_are_said_and_many_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    say_passes({"web": 0.5, "code": 4.01, "math": 4.0})
    said, *warned = [record.getMessage() for record in caplog.records]
    assert said.endswith("in the whole plan: code 4.01, math 4.00, web 0.50")
    assert len(warned) == 1 and warned[0].startswith("source code is too small for this plan: 4.0 ")
    assert "data.sources.code.max_epochs=4" in warned[0]
