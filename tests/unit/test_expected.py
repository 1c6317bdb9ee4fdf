"""What a run expects of itself, what it does not start with, and how it is shown afterwards."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.tiny import tiny
from zaya_train.config.check import problems
from zaya_train.config.errors import ConfigError
from zaya_train.main import compose, main
from zaya_train.model.flops import train_flops_per_token
from zaya_train.planning.calibration import file_of, keep
from zaya_train.planning.case import Case, cases_of
from zaya_train.planning.components import GB, in_gb
from zaya_train.planning.expected import (
    check_memory,
    expectation,
    known_device,
    slow_steps,
)
from zaya_train.planning.machine import machine_of
from zaya_train.planning.memory import forecast, least_bytes
from zaya_train.planning.time import step_time
from zaya_train.tools import tail
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


def test_the_expectation_is_the_forecast_of_this_launch() -> None:
    """Of its fullest moment, its documents, its nodes, its part of a device."""
    case = Case(compose(["recipe=zaya1_8b"]), "sft", 16)
    own = expectation(case, "AMD Instinct MI300X", 4, 1000.0, 304)
    machine = machine_of("MI300X", case.config.precision, 4)
    assert own["expected_step_seconds"] == step_time(case, machine, 1000.0).seconds
    assert own["expected_peak_bytes"] == max(m.bytes for m in forecast(case).moments)
    assert own["expected_batch_tokens"] == case.phase.global_batch_tokens
    part = expectation(case, "AMD Instinct MI300X", 4, 1000.0, 38)
    assert part["expected_step_seconds"] is None and "no data sheet" in part["expected_by"]


def test_the_largest_floor_of_all_phases_counts() -> None:
    config = compose(["recipe=zaya1_8b", "kernels.cca=triton"])
    floors = [least_bytes(Case(config, name, 1024)) / GB for name in config.plan.phases]
    assert min(floors) < 0.99 * max(floors)
    for memory_gb in (0.99 * max(floors) / 0.9, 1.01 * max(floors) / 0.9):
        limit = replace(config, runtime=replace(config.runtime, memory_gb=memory_gb))
        if memory_gb * 0.9 > max(floors):
            assert "not refused" in check_memory(limit, 1024, 8, None, "")
        else:
            with pytest.raises(ConfigError, match="GB at least"):
                check_memory(limit, 1024, 8, None, "")


def test_a_launch_that_cannot_fit_is_refused_with_what_would() -> None:
    check_memory(limited(None), 2, 8, None, "")
    check_memory(limited(PEAK_GB / 0.89), 2, 8, None, "")
    with pytest.raises(ConfigError, match=r"90% of runtime.memory_gb=.*launches anyway"):
        check_memory(limited(PEAK_GB / 0.91), 2, 8, None, "")
    with pytest.raises(ConfigError, match=r"90% of the 0.000\d+ GB of a card; "):
        check_memory(limited(None), 2, 8, PEAK_GB / 0.91, "a card")
    # Changes are compared by the card's own rates, where they are known.
    for name, rates in (("a card", "MI300X"), ("NVIDIA H200", "H200")):
        with pytest.raises(ConfigError, match=rf"% time by forecast for {rates}\)"):
            check_memory(limited(None), 2, 8, PEAK_GB / 0.91, name)
    # The configuration's figure counts, not the card's.
    check_memory(limited(PEAK_GB / 0.89), 2, 8, 1e-6, "a card")


@pytest.mark.parametrize("known", ["AMD Instinct MI300X", ""])
def test_changes_are_judged_by_the_links_of_the_launchs_own_nodes(known: str) -> None:
    """Of sixteen ranks, on nodes of 4 most exchange between nodes, on nodes of 8 half: there
    gathering weights again costs more than making activations again, here less."""
    words = ["recipe=zaya1_8b", "kernels=eager", "parallel.shard=16", "runtime.memory_gb=102"]
    config = compose(words)
    for node_ranks, change in (
        (4, r"parallel\.recompute=full"),
        (8, r"parallel\.reshard_after_forward=true parallel\.recompute=selective"),
    ):
        with pytest.raises(ConfigError, match=rf"that fits: {change} \("):
            check_memory(config, 16, node_ranks, None, known)


def test_a_submission_knows_the_ranks_of_its_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    of_four = ["tasks_per_node=4", "gpus_per_node=4"]
    words = ["recipe=zaya1_8b", "kernels=eager", "parallel.shard=16", "runtime.memory_gb=102"]
    assert main(["submit", *words, "nodes=4", *of_four, "--dry-run"]) == 2
    assert "that fits: parallel.recompute=full (" in capsys.readouterr().err


def test_a_named_key_launches_anyway() -> None:
    said = check_memory(limited(1e-6, memory_check="warn"), 2, 8, None, "")
    assert said.startswith("launched although phase")
    assert check_memory(limited(PEAK_GB / 0.89, memory_check="warn"), 2, 8, None, "") == ""


def floor_of(case: Case) -> list[int]:
    """What no kernel changes, by hand: the residual stream, the norm, Muon."""
    moments = {moment.name: moment for moment in forecast(case).moments}
    model, tokens = case.model, case.tokens
    parts = moments["loss"].components
    held = ("master weights", "optimizer state", "gathered weights", "full gradients", "gradients")
    stream = model.num_layers * 2 * 4 * model.hidden_size * tokens
    return [
        sum(parts.get(name, 0) for name in held) + stream,
        moments["norm"].bytes,
        moments["Muon"].bytes,
    ]


@pytest.mark.parametrize(
    ("words", "ranks", "phase", "largest"),
    [
        (["recipe=zaya1_8b"], 1024, "sft", 0),
        (["recipe=zaya1_8b_1gpu", "model.num_layers=1"], 1, "pretrain_1", 1),
        (["recipe=smoke_cpu", "parallel.shard=1"], 8, "pretrain_1", 2),
    ],
)
def test_the_floor_is_what_no_kernel_changes(
    words: list[str], ranks: int, phase: str, largest: int
) -> None:
    case = Case(compose(words), phase, ranks)
    floor = floor_of(case)
    assert floor.index(max(floor)) == largest
    assert least_bytes(case) == max(floor)


@pytest.mark.parametrize("name", ["triton", "reference", "of_another_version"])
def test_other_kernels_are_not_refused_by_what_eager_ones_keep(name: Any) -> None:
    least = max(least_bytes(Case(tiny(), phase, 2)) for phase in tiny().plan.phases) / GB
    assert 0.1 * PEAK_GB < least < 0.9 * PEAK_GB
    for memory_gb in (least / 0.89, least / 0.91):
        config = limited(memory_gb)
        fused = replace(config, kernels=replace(config.kernels, cca=name))
        if memory_gb * 0.9 > least:
            said = check_memory(fused, 2, 8, None, "")
            assert f"not refused because of kernels.cca={name}: phase" in said
        else:
            # What no kernel changes is too much by itself.
            with pytest.raises(ConfigError, match=rf"kernels.cca={name} keeps, .* GB at least"):
                check_memory(fused, 2, 8, None, "")


def test_kernels_that_keep_nothing_excuse_nothing() -> None:
    config = limited(PEAK_GB / 0.91)
    muon = replace(config, kernels=replace(config.kernels, newton_schulz="triton"))
    with pytest.raises(ConfigError, match="exceeds"):
        check_memory(muon, 2, 8, None, "")


def test_plan_judges_as_train_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--ranks", "2", "recipe=smoke_cpu", "runtime.memory_gb=0.01"]
    assert main(words) == 2
    assert "90% of runtime.memory_gb=0.01" in capsys.readouterr().err
    assert main([*words[:1], "--device", "H200", *words[1:]]) == 2
    assert "90% of runtime.memory_gb=0.01" in capsys.readouterr().err
    assert main([*words[:1], "--device", "H200", "--memory-gb", "0.12", *words[1:]]) == 2
    assert "time by forecast for H200" in capsys.readouterr().err
    assert main([*words, "runtime.memory_check=warn"]) == 0
    assert "warning: launched although phase" in capsys.readouterr().out
    assert main([*words[:1], "--memory-gb", "100", *words[1:]]) == 0
    peak = in_gb(max(forecast(case).peak.bytes for case in cases_of(compose(words[3:]), 2)))
    said = f"fits: peak {peak} GB (phase sft) of 90.0 GB, 90% of --memory-gb 100\n"
    assert said in capsys.readouterr().out
    assert main([*words[:1], "--memory-gb", "100", *words[1:], "kernels.cca=native"]) == 0
    assert f"{said[:-1]}; counted as of eager kernels, not of native" in capsys.readouterr().out
    assert main(words[:-1]) == 0
    assert "fits:" not in capsys.readouterr().out


def test_a_rehearsed_plan_says_that_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--ranks", "2", "recipe=smoke_cpu", "runtime.memory_gb=1", "--rehearse"]
    assert main([*words, "--phase", "pretrain_1"]) == 0
    assert "(phase pretrain_1) of 0.9 GB, 90% of runtime.memory_gb=1" in capsys.readouterr().out


def test_options_of_a_device_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "recipe=smoke_cpu", "--ranks", "2"]
    for option in ("--preflight", "--inside-gb-per-second", "--between-gb-per-second"):
        assert main([*words, option, "8"]) == 2
        assert f"{option}: needs a --device" in capsys.readouterr().err
    assert main([*words, "--node-ranks", "8"]) == 2
    assert main([*words, "--node-ranks", "8", "--device", "H200"]) == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "H200", "--node-ranks", "0"], "--node-ranks 0: must be positive"),
        (["--document-tokens", "0"], "--document-tokens 0: must be positive"),
        (["--phase", "nothing"], "plan.phases: no phase nothing"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *options, "recipe=smoke_cpu", "--ranks", "2"]) == 2
    assert said in capsys.readouterr().err


def test_what_a_preflight_file_lacks_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "preflight.json"
    path.write_text(json.dumps({"curves": [], "measured": [], "device": "NVIDIA H200"}))
    words = ["plan", "--device", "H200", "--preflight", str(path), "recipe=smoke_cpu"]
    assert main([*words, "--ranks", "2"]) == 0
    shown = capsys.readouterr().out
    assert "by the data sheet: no matrix product measured" in shown
    assert "by the data sheet: no usable all_reduce curve: node" in shown


def test_kernels_that_are_counted_are_refused() -> None:
    config = limited(PEAK_GB / 0.91)
    kernels = replace(config.kernels, attention="sdpa", newton_schulz="gram")
    with pytest.raises(ConfigError, match="exceeds"):
        check_memory(replace(config, kernels=kernels), 2, 8, None, "")


def test_only_the_phase_of_this_job_is_judged() -> None:
    config = limited(1e-6)
    config = replace(config, run=replace(config.run, only_phase="short"))
    with pytest.raises(ConfigError, match="phase short") as refused:
        check_memory(config, 2, 8, None, "")
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


def begin(expected: float | None, attempt: int = 1) -> dict[str, Any]:
    row = {"kind": "phase", "event": "begin", "name": "long", "step": 0, "attempt": attempt}
    row |= {"expected_step_seconds": expected, "expected_peak_bytes": 2 * GB, "expected_by": "us"}
    return row | {"expected_batch_tokens": 1024}


def step(seconds: float, memory: int = 1, attempt: int = 1, tokens: int = 1024) -> dict[str, Any]:
    return {
        "kind": "step",
        "phase": "long",
        "attempt": attempt,
        "step_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "memory_bytes": memory * GB,
        "applied": True,
    }


def rows(expected: float | None) -> list[dict[str, Any]]:
    timed = ((9.0, 1), (9.0, 1), (9.0, 1), (2.0, 1), (3.1, 3), (2.5, 2))
    return [begin(expected), *(step(seconds, memory) for seconds, memory in timed)]


def test_forecast_and_measured_stand_side_by_side() -> None:
    (found,) = forecasts(rows(2.0))
    # Without the first three steps; the fullest step's memory.
    assert (found.seconds, found.bytes) == (2.5, 3 * GB)
    assert cells(found) == ("2 s", "2.5 s", "+25%", "2.00 GB", "3.00 GB")
    assert against_forecast(rows(2.0), "long").startswith(
        "step 2 s, measured 2.5 s +25%; peak 2.00"
    )
    on_cpu = [{"kind": "start", "device": "cpu"}, *rows(2.0)]
    assert against_forecast(on_cpu, "long").endswith(
        "3.00 GB with torch and all of its process; us"
    )
    assert against_forecast(rows(2.0), "long").endswith("measured 3.00 GB; us")
    assert cells(forecasts(rows(None))[0])[0] == "unknown"
    assert against_forecast(rows(2.0)[1:], "long") == ""
    fullest = step(1.0) | {"memory_bytes_ranks": [1 * GB, 5 * GB]}
    assert forecasts([*rows(2.0), fullest])[0].bytes == 5 * GB
    other = step(7.0, memory=9) | {"phase": "short"}
    assert forecasts([*rows(2.0), other])[0] == found


def test_attempts_on_other_ranks_have_forecasts_of_their_own() -> None:
    again = [*rows(2.0), begin(2.0, 2), *(step(s, attempt=2) for s in (9.0, 9.0, 9.0, 4.0))]
    # The second attempt's first steps are cold too.
    (found,) = forecasts(again)
    assert found.seconds == 2.8
    moved = [*again, begin(8.0, 3)]
    assert [one.expected_seconds for one in forecasts(moved)] == [2.0, 8.0]
    assert against_forecast(moved, "long").startswith("step 8 s, measured not yet; peak")
    moved += [step(8.4, memory=7, attempt=3)]
    assert [one.seconds for one in forecasts(moved)] == [2.8, 8.4]
    assert [one.bytes for one in forecasts(moved)] == [3 * GB, 7 * GB]
    assert against_forecast(moved, "long").startswith("step 8 s, measured 8.4 s +5%")
    # Back on the ranks of the first.
    assert against_forecast([*moved, begin(2.0, 4)], "long").startswith("step 2 s, measured 2.8")


def test_only_steps_of_a_full_batch_stand_beside_its_forecast() -> None:
    ramp = [begin(2.0), *(step(0.5, tokens=256) for _ in range(8))]
    assert forecasts(ramp)[0].seconds is None and forecasts(ramp)[0].bytes == GB
    # Tokens a second times seconds are a little less than the tokens were.
    rounded = next(n / 100 for n in range(1, 999) if 1024 / (n / 100) * (n / 100) < 1024)
    assert forecasts([*ramp, step(rounded)])[0].seconds == rounded
    skipped = step(0.1) | {"applied": False}
    (found,) = forecasts([*ramp, step(2.2), skipped, step(0.3, tokens=512)])
    assert found.seconds == 2.2
    # Runs of before there was the field.
    old = [{k: v for k, v in row.items() if k != "expected_batch_tokens"} for row in ramp]
    assert forecasts(old)[0].seconds == 0.5


def test_a_long_run_keeps_its_forecast_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tail, "MAX_ROWS", 4)
    path = tmp_path / "metrics.jsonl"
    since = {"kind": "eval", "step": 9, "phase": "long", "losses": {}, "attempt": 1}
    lines = [json.dumps({"wall_time": 0.0, **row}) + "\n" for row in (begin(2.0), *[since] * 6)]
    path.write_text("".join(lines))
    kept = tail.Tail(path).read()
    assert len(kept) == 5 and against_forecast(kept, "long")


def test_steps_that_take_minutes_are_told_before_the_first() -> None:
    config = compose(["recipe=zaya1_300m"])
    assert slow_steps(config, 1, 1e15) == ""
    said = slow_steps(config, 2, 1e11)
    flops = train_flops_per_token(config.model, 1) * max(
        phase.global_batch_tokens for phase in config.plan.phases.values()
    )
    assert f"a step takes some {flops / 2e11 / 60:,.0f} minutes or more on 2 such devices" in said
    only = replace(config, run=replace(config.run, only_phase="pretrain_1"))
    assert "phase pretrain_1: " in slow_steps(only, 1, 1e11)


def test_what_is_below_a_gigabyte_is_not_said_to_be_nothing() -> None:
    assert [in_gb(count) for count in (55.24e9, 1e9, 28_900_000)] == ["55.2", "1.0", "0.0289"]
    with pytest.raises(ConfigError, match=r"a peak of 0\.000\d+ GB exceeds 9e-05 GB, 90% of"):
        check_memory(limited(1e-4), 2, 8, None, "")
