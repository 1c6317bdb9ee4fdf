"""Calibrations: what fitting recovers, and for what a kept one holds."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.helpers.tiny import tiny
from zaya_train.config.errors import ConfigError
from zaya_train.planning import calibration
from zaya_train.planning.calibration import PARTS, calibrated_time, features, file_of, keep, load
from zaya_train.planning.case import Case
from zaya_train.tools.plan_calibrate import PROBES, case_of, fit

if TYPE_CHECKING:
    from pathlib import Path

TRUE = {"step": 0.05, "micro_batch": 0.02, "token": 1e-4, "pair": 2e-7, "context": 5e-5}


def test_a_calibration_recovers_what_steps_were_made_of() -> None:
    config = tiny()
    cases = [case_of(config, probe, 2) for probe in PROBES]
    seconds = [
        sum(
            TRUE[part] * count
            for part, count in zip(PARTS, features(case, probe.document_tokens), strict=True)
        )
        for case, probe in zip(cases, PROBES, strict=True)
    ]
    found = fit(cases, PROBES, seconds, "a CPU")
    for part, value in TRUE.items():
        assert getattr(found, part) == pytest.approx(value, rel=1e-3), part
    assert found.largest_error < 1e-6
    case = Case(config, "long", 2)
    assert calibrated_time(case, found, 40).seconds == pytest.approx(
        sum(TRUE[p] * n for p, n in zip(PARTS, features(case, 40), strict=True))
    )


def test_no_part_of_a_calibration_is_negative() -> None:
    cases = [case_of(tiny(), probe, 2) for probe in PROBES]
    found = fit(cases, PROBES, [0.3, 0.2, 0.5, 0.3, 0.2, 0.4, 0.1], "a CPU")
    assert all(getattr(found, part) >= 0 for part in PARTS)


def test_a_calibration_is_kept_by_what_it_holds_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config = tiny()
    assert load(config, "a CPU", 2) is None
    cases = [case_of(config, probe, 2) for probe in PROBES]
    found = fit(cases, PROBES, [1.0] * len(PROBES), "a CPU")
    keep(config, found)
    assert load(config, "a CPU", 2) == found
    wider = replace(config, model=replace(config.model, hidden_size=2 * config.model.hidden_size))
    assert load(wider, "a CPU", 2) is None and load(config, "a CPU", 4) is None
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "another")
        assert load(config, "a CPU", 2) is None
    with monkeypatch.context() as patch:
        patch.setattr(calibration, "code_hash", lambda: "of other sources")
        assert load(config, "a CPU", 2) is None
    file_of(config, "a CPU", 2).write_text("{}")
    with pytest.raises(ConfigError, match="not a calibration"):
        load(config, "a CPU", 2)


@pytest.mark.parametrize(
    "change",
    [
        {"model.num_query_heads": 8},
        {"precision.compute_dtype": "bf16"},
        {"kernels.attention": "sdpa"},
        {"parallel.recompute": "full"},
        {"optim.muon.newton_schulz_dtype": "bf16"},
        {"runtime.threads": 3},
    ],
)
def test_what_changes_a_steps_seconds_has_a_calibration_of_its_own(change: dict[str, Any]) -> None:
    assert file_of(tiny(change), "a CPU", 2) != file_of(tiny(), "a CPU", 2)


def test_what_changes_no_seconds_shares_one() -> None:
    own = file_of(tiny(), "a CPU", 2)
    assert file_of(tiny(), "another CPU", 2) != own and file_of(tiny(), "a CPU", 4) != own
    for change in (
        {"model.rope_base": 5e4},
        {"parallel.context_parallel_limit": 1},
        {"run.seed": 3},
    ):
        assert file_of(tiny(change), "a CPU", 2) == own, change


@pytest.mark.parametrize("text", ["{", "[]", '{"device": "a CPU"}', "\x00"])
def test_a_file_that_is_no_calibration_is_named(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = file_of(tiny(), "a CPU", 2)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(ConfigError, match="makes it again"):
        load(tiny(), "a CPU", 2)


def test_tokens_under_context_parallelism_are_counted_apart() -> None:
    case = Case(tiny(), "long", 2)
    assert case.layout.context == 2
    assert features(case, 40)[-1] == case.micro_batches * case.tokens
    assert features(Case(tiny(), "short", 2), 40)[-1] == 0
