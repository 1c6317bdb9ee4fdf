"""What a run expects of itself, what it does not start with, and how it is shown afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.tiny import tiny
from zaya_train.config.check import problems
from zaya_train.config.errors import ConfigError
from zaya_train.main import compose, main
from zaya_train.planning.calibration import file_of, keep
from zaya_train.planning.case import Case
from zaya_train.planning.components import GB
from zaya_train.planning.expected import check_memory, expectation, known_device
from zaya_train.planning.memory import forecast, least_bytes
from zaya_train.tools.plan_against import against_forecast, cells, forecasts
from zaya_train.tools.plan_calibrate import PROBES, case_of, fit

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.config.schema import TrainConfig

PEAK_GB = max(forecast(Case(tiny(), name, 2)).peak.bytes for name in tiny().plan.phases) / GB


def limited(memory_gb: float | None, **runtime: Any) -> TrainConfig:
    config = tiny()
    return replace(config, runtime=replace(config.runtime, memory_gb=memory_gb, **runtime))


def test_devices_are_known_by_the_names_torch_gives_them() -> None:
    assert known_device("AMD Instinct MI300X") == "MI300X"
    assert known_device("NVIDIA H200") == "H200"
    assert known_device("NVIDIA H100 80GB HBM3") == "H100 80GB HBM3"
    assert known_device("NVIDIA H200 NVL") is None
    # A partition of one.
    assert known_device("AMD Instinct MI300X", 304) == "MI300X"
    assert known_device("AMD Instinct MI300X", 38) is None
    assert known_device("NVIDIA GeForce RTX 4090") is None and known_device("AMD EPYC") is None


def test_memory_is_always_expected_and_time_where_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = Case(tiny(), "long", 2)
    fields = expectation(case, "a CPU", 2, None)
    assert fields["expected_peak_bytes"] == forecast(case).peak.bytes
    assert (
        fields["expected_step_seconds"] is None
        and "no calibration of a CPU" in fields["expected_by"]
    )
    known = expectation(case, "AMD Instinct MI300X", 8, None)
    assert known["expected_step_seconds"] > 0 and "data sheet of MI300X" in known["expected_by"]
    cases = [case_of(case.config, probe, 2) for probe in PROBES]
    keep(case.config, fit(cases, PROBES, [1.0] * len(PROBES), "a CPU"))
    calibrated = expectation(case, "a CPU", 2, 10.0)
    assert calibrated["expected_step_seconds"] > 0
    file_of(case.config, "a CPU", 2).write_text("{")
    assert "not a calibration" in expectation(case, "a CPU", 2, None)["expected_by"]


def test_a_launch_that_cannot_fit_is_refused_with_what_would() -> None:
    check_memory(limited(None), 2, None, "")
    check_memory(limited(PEAK_GB / 0.89), 2, None, "")
    with pytest.raises(ConfigError, match=r"90% of runtime.memory_gb=.*launches anyway"):
        check_memory(limited(PEAK_GB / 0.91), 2, None, "")
    with pytest.raises(ConfigError, match=r"90% of the 0.0 GB of a card; .*"):
        check_memory(limited(None), 2, PEAK_GB / 0.91, "a card")
    # The configuration's figure counts, not the card's.
    check_memory(limited(PEAK_GB / 0.89), 2, 1e-6, "a card")


def test_a_named_key_launches_anyway() -> None:
    said = check_memory(limited(1e-6, memory_check="warn"), 2, None, "")
    assert said.startswith("launched although phase")
    assert check_memory(limited(PEAK_GB / 0.89, memory_check="warn"), 2, None, "") == ""


@pytest.mark.parametrize("name", ["triton", "reference", "of_another_version"])
def test_other_kernels_are_not_refused_by_what_eager_ones_keep(name: Any) -> None:
    least = max(least_bytes(Case(tiny(), phase, 2)) for phase in tiny().plan.phases) / GB
    assert 0.1 * PEAK_GB < least < 0.9 * PEAK_GB
    for memory_gb in (least / 0.89, least / 0.91):
        config = limited(memory_gb)
        fused = replace(config, kernels=replace(config.kernels, cca=name))
        if memory_gb * 0.9 > least:
            said = check_memory(fused, 2, None, "")
            assert f"not refused because of kernels.cca={name}: phase" in said
        else:
            # What no kernel changes is too much by itself.
            with pytest.raises(ConfigError, match=rf"kernels.cca={name} keeps, .* GB at least"):
                check_memory(fused, 2, None, "")


def test_kernels_that_keep_nothing_excuse_nothing() -> None:
    config = limited(PEAK_GB / 0.91)
    muon = replace(config, kernels=replace(config.kernels, newton_schulz="triton"))
    with pytest.raises(ConfigError, match="exceeds"):
        check_memory(muon, 2, None, "")


def test_plan_judges_as_train_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--ranks", "2", "recipe=smoke_cpu", "runtime.memory_gb=0.01"]
    assert main(words) == 2
    assert "90% of runtime.memory_gb=0.01" in capsys.readouterr().err
    assert main([*words[:1], "--device", "H200", *words[1:]]) == 2
    assert "90% of runtime.memory_gb=0.01" in capsys.readouterr().err
    assert main([*words, "runtime.memory_check=warn"]) == 0
    assert "warning: launched although phase" in capsys.readouterr().out
    assert main([*words[:1], "--memory-gb", "100", *words[1:]]) == 0


def test_options_of_a_device_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "recipe=smoke_cpu", "--ranks", "2"]
    for option in ("--preflight", "--inside-gb-per-second", "--between-gb-per-second"):
        assert main([*words, option, "8"]) == 2
        assert f"{option}: needs a --device" in capsys.readouterr().err
    assert main([*words, "--node-ranks", "8"]) == 2
    assert main([*words, "--node-ranks", "8", "--device", "H200"]) == 0


def test_kernels_that_are_counted_are_refused() -> None:
    config = limited(1e-6)
    kernels = replace(config.kernels, attention="sdpa", newton_schulz="gram")
    with pytest.raises(ConfigError, match="exceeds"):
        check_memory(replace(config, kernels=kernels), 2, None, "")


def test_only_the_phase_of_this_job_is_judged() -> None:
    config = limited(1e-6)
    config = replace(config, run=replace(config.run, only_phase="short"))
    with pytest.raises(ConfigError, match="phase short") as refused:
        check_memory(config, 2, None, "")
    assert "phase long" not in str(refused.value) and "of long" not in str(refused.value)


def test_submit_refuses_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    words = ["submit", "recipe=zaya1_8b", "nodes=128", f"run.dir={run_dir}"]
    assert main([*words, "runtime.memory_gb=80", "--dry-run"]) == 2
    told = capsys.readouterr().err
    assert "90% of runtime.memory_gb=80" in told and "parallel.recompute=selective" in told
    assert not run_dir.exists()
    assert main([*words, "runtime.memory_gb=192", "--dry-run"]) == 0


def test_the_limit_is_a_positive_number() -> None:
    config = compose(["recipe=smoke_cpu", "runtime.memory_gb=-1"])
    assert any("runtime.memory_gb: -1" in problem for problem in problems(config, 2))


def rows(expected: float | None) -> list[dict[str, Any]]:
    begin = {"kind": "phase", "event": "begin", "name": "long", "step": 0}
    begin |= {"expected_step_seconds": expected, "expected_peak_bytes": 2 * GB, "expected_by": "us"}
    steps = [
        {"kind": "step", "phase": "long", "step_seconds": seconds, "memory_bytes": memory * GB}
        for seconds, memory in ((9.0, 1), (9.0, 1), (9.0, 1), (2.0, 1), (3.0, 3), (2.5, 2))
    ]
    return [begin, *steps]


def test_forecast_and_measured_stand_side_by_side() -> None:
    (found,) = forecasts(rows(2.0))
    # Without the first three steps; the fullest step's memory.
    assert (found.seconds, found.bytes) == (2.5, 3 * GB)
    assert cells(found) == ("2 s", "2.5 s", "+25%", "2.00 GB", "3.00 GB")
    assert against_forecast(rows(2.0), "long").startswith(
        "step 2 s, measured 2.5 s +25%; peak 2.00"
    )
    assert cells(forecasts(rows(None))[0])[0] == "unknown"
    assert against_forecast(rows(2.0)[1:], "long") == ""
