"""precision.expert_dtype: what it is refused with, what knows of it, and that a model obeys it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from zaya_kernels.grouped_mlp import op

from tests.helpers.tiny import tiny
from zaya_train.config.check import check, problems
from zaya_train.config.derive import Layout
from zaya_train.config.errors import ConfigError
from zaya_train.config.kinds import kind_of, math_hash, nameable
from zaya_train.config.precision import PrecisionConfig
from zaya_train.config.schema import KernelsConfig
from zaya_train.main import compose, main
from zaya_train.parallel.apply import sharded_on_meta
from zaya_train.planning.case import Case
from zaya_train.planning.machine import machine_of
from zaya_train.planning.time import FP8_UNKNOWN, step_time
from zaya_train.runtime.device import check_kernels
from zaya_train.train.entry import changed_math

FP8 = {"precision.expert_dtype": "fp8", "precision.compute_dtype": "bf16"}
EMULATED = {**FP8, "kernels.grouped_mlp": "fp8_emulated"}
LIBRARY = {**FP8, "kernels.grouped_mlp": "transformer_engine"}
WIDE = {"model.hidden_size": 64, "model.expert_ffn_size": 32}
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (FP8, ["kernels.grouped_mlp=eager", "transformer_engine", "fp8_emulated"]),
        ({**FP8, "kernels.grouped_mlp": "grouped_mm"}, ["=grouped_mm multiplies in"]),
        ({"kernels.grouped_mlp": "fp8_emulated"}, ["needs precision.expert_dtype=fp8"]),
        (
            {"kernels.grouped_mlp": "fp8_emulated_fnuz"},
            ["kernels.grouped_mlp=fp8_emulated_fnuz: has fp8's arithmetic alone"],
        ),
        ({**EMULATED, "precision.compute_dtype": "fp32"}, ["compute_dtype=bf16, not fp32"]),
        ({**LIBRARY, **WIDE, "model.hidden_size": 40}, ["model.hidden_size 40", "multiple of 16"]),
        ({**LIBRARY, **WIDE, "model.expert_ffn_size": 24}, ["model.expert_ffn_size 24", "16"]),
        ({**EMULATED, "kernels.grouped_mlp_recompute": True}, ["it needs triton"]),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], expected: list[str]) -> None:
    lines = [line for line in problems(tiny(changes), 2) if "fp8" in line]
    assert len(lines) == 1, lines
    for part in expected:
        assert part in lines[0]


@pytest.mark.parametrize("changes", [EMULATED, {**LIBRARY, **WIDE}])
def test_what_can_be_is_not(changes: dict[str, Any]) -> None:
    check(tiny(changes), 2)


def test_it_decides_the_curve_and_a_run_may_change_it_if_it_says_so() -> None:
    key = "precision.expert_dtype"
    assert kind_of(key) == "math" and nameable(key)
    assert math_hash(tiny(FP8)) != math_hash(tiny({"precision.compute_dtype": "bf16"}))
    # Checkpoints of versions without the key were of its default.
    older = {"precision": {"compute_dtype": "bf16", "reduce_dtype": "fp32"}}
    assert changed_math(older, tiny(EMULATED))[key] == ("compute_dtype", "fp8")
    assert key not in changed_math(older, tiny({"precision.compute_dtype": "bf16"}))


def test_the_group_is_that_of_bf16_but_for_the_experts() -> None:
    config = compose(["recipe=zaya1_300m", "precision=fp8_experts"])
    assert config.precision == PrecisionConfig(expert_dtype="fp8")
    with pytest.raises(ConfigError, match="needs transformer_engine, or slowly"):
        check(config, 1)


def device(arch: str | None, capability: tuple[int, int]) -> SimpleNamespace:
    return SimpleNamespace(name="a GPU", gcnArchName=arch, major=capability[0], minor=capability[1])


Patch = pytest.MonkeyPatch


def here(monkeypatch: Patch, arch: str | None, capability: tuple[int, int], found: str) -> None:
    monkeypatch.setattr("zaya_train.runtime.device.find_spec", lambda _: True)
    monkeypatch.setattr("zaya_train.runtime.device.version", lambda _: found)
    monkeypatch.setattr(torch.version, "hip", "7.2" if arch else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device(arch, capability))


KERNELS = KernelsConfig(grouped_mlp="transformer_engine")


@pytest.mark.parametrize(
    ("arch", "capability", "ok"),
    [
        ("gfx942:sramecc+:xnack-", (9, 4), True),
        ("gfx950", (9, 5), True),
        ("gfx90a:sramecc+:xnack-", (9, 0), False),
        ("gfx1100", (11, 0), False),
        (None, (9, 0), True),
        (None, (8, 9), True),
        (None, (8, 0), False),
        (None, (10, 0), True),
    ],
)
def test_gpus_without_fp8_are_refused(
    arch: str | None, capability: tuple[int, int], ok: bool, monkeypatch: Patch
) -> None:
    here(monkeypatch, arch, capability, "2.4.0+abc")
    if ok:
        check_kernels(KERNELS, PrecisionConfig(expert_dtype="fp8"), GPU)
        return
    found = arch or "compute capability 8.0"
    with pytest.raises(ConfigError, match=r"expert_dtype=fp8: a GPU \(" + found.split("+")[0]):
        check_kernels(KERNELS, PrecisionConfig(expert_dtype="fp8"), GPU)
    # In bf16 it is another matter.
    check_kernels(KERNELS, PrecisionConfig(), GPU)


@pytest.mark.parametrize(("found", "ok"), [("2.2.0", False), ("2.3.0", True), ("2.10.1", True)])
def test_libraries_that_only_know_delayed_scaling_are_refused(
    found: str, ok: bool, monkeypatch: Patch
) -> None:
    here(monkeypatch, None, (9, 0), found)
    if ok:
        check_kernels(KERNELS, PrecisionConfig(expert_dtype="fp8"), GPU)
    else:
        with pytest.raises(ConfigError, match=r"transformer_engine 2\.2\.0 cannot .* needs 2\.3"):
            check_kernels(KERNELS, PrecisionConfig(expert_dtype="fp8"), GPU)
        check_kernels(KERNELS, PrecisionConfig(), GPU)


def test_the_doctor_refuses_it_and_names_the_check(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=smoke_cpu", "precision=fp8_experts", "kernels.grouped_mlp=fp8_emulated"]
    assert main(["doctor", *words]) == 2
    told = capsys.readouterr().err
    assert "precision.expert_dtype=compute_dtype kernels.grouped_mlp=eager" in told
    assert "zaya parity" in told


def test_a_forecast_says_that_it_does_not_know_the_rate_of_fp8() -> None:
    words = ["recipe=zaya1_8b", "kernels.grouped_mlp=transformer_engine"]
    sources, seconds = [], []
    for precision in ("bf16", "fp8_experts"):
        config = compose([*words, f"precision={precision}"])
        machine = machine_of("MI300X", config.precision)
        time = step_time(Case(config, "pretrain_1", 1024), machine, 4096)
        sources.append({term.name: term.source for term in time.terms})
        seconds.append(time.seconds)
    assert seconds[0] == seconds[1]
    assert sources[1] == {**sources[0], "products": sources[0]["products"] + FP8_UNKNOWN}


@pytest.mark.parametrize("fp8", [False, True])
def test_a_models_experts_are_told(fp8: bool, monkeypatch: Patch) -> None:
    """Through the one way that every run builds its model."""
    told: list[bool] = []

    def experts(*arguments: Any, fp8: bool, **_: Any) -> torch.Tensor:
        told.append(fp8)
        return torch.zeros_like(arguments[0])

    monkeypatch.setattr("zaya_train.model.moe.grouped_mlp", experts)
    monkeypatch.setattr("zaya_train.parallel.apply.shard", lambda *_: None)
    monkeypatch.setattr("zaya_train.parallel.apply.register_fsdp_forward_method", lambda *_: None)
    config = tiny(EMULATED if fp8 else {})
    mesh: Any = SimpleNamespace(sparse=None, layout=Layout(1, 1, 1, 1))
    model = sharded_on_meta(config, config.model, mesh, torch.device("cpu"))
    layer = next(m for m in model.modules() if type(m).__name__ == "Experts")
    layer(torch.zeros(3, config.model.hidden_size), torch.tensor([3, 0, 0]))
    assert told == [fp8]


def test_names_of_back_ends_are_those_that_there_are() -> None:
    hint = get_type_hints(KernelsConfig)["grouped_mlp"]
    assert set(get_args(hint)) == {*op.BACKENDS, *op.FP8_BACKENDS}
