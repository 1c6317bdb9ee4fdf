"""The rehearsal against its golden table, against hand arithmetic, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from tests.helpers import rehearsal_table
from tests.helpers.tiny import tiny
from zaya_train.config.derive import layout
from zaya_train.config.errors import ConfigError
from zaya_train.main import compose, main
from zaya_train.model.flops import model_size
from zaya_train.parallel.traffic import Traffic, Work
from zaya_train.planning.components import RESERVE
from zaya_train.tools.rehearsal import Rehearsal, rehearse_phases
from zaya_train.tools.rehearsal_table import RehearsalRequest, show_rehearsal

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig

DOCS = Path(__file__).parents[2] / "docs" / "memory.md"
GOLDEN: dict[str, Any] = json.loads(rehearsal_table.GOLDEN.read_text())
TOLERANCE = 0.01
CHECKED = {
    # The other launches take minutes; the command of tests.helpers.rehearsal_table checks them.
    "zaya1_8b": ("pretrain_1", "midtrain", "sft"),
    "zaya1_300m": ("pretrain_1",),
    "smoke_cpu": ("pretrain_1", "midtrain", "sft"),
}
GB = 10**9
SMALLER = ("model.num_layers=2", "model.vocab_size=32768")


def few_layers(*overrides: str) -> TrainConfig:
    """The 8B recipe with two of its layers and an eighth of its vocabulary: seconds each."""
    return compose(["recipe=zaya1_8b", *SMALLER, *overrides])


def one(config: TrainConfig, phase: str, ranks: int = 1024, busiest: float = 1.0) -> Rehearsal:
    return rehearse_phases(config, ranks, [phase], busiest)[phase]


@pytest.mark.slow
@pytest.mark.parametrize("launch", CHECKED)
def test_shipped_recipes_take_what_is_recorded(launch: str) -> None:
    for phase, rehearsal in rehearsal_table.measured(launch, CHECKED[launch]).items():
        found, expected = rehearsal_table.plain(rehearsal), GOLDEN[launch][phase]
        assert found["micro_batches"] == expected["micro_batches"]
        for key in ("peak_bytes", "components"):
            assert found[key] == pytest.approx(expected[key], rel=TOLERANCE, abs=1e5), phase
        assert found["flows"].keys() == expected["flows"].keys()
        for name, flow in expected["flows"].items():
            assert found["flows"][name] == pytest.approx(flow, rel=TOLERANCE), (phase, name)


def test_the_docs_show_the_golden_table() -> None:
    text = DOCS.read_text()
    assert rehearsal_table.memory_table(GOLDEN) in text
    assert rehearsal_table.traffic_table(GOLDEN["zaya1_8b"]) in text


def test_every_shipped_recipe_is_in_the_table_and_fits() -> None:
    folder = Path(__file__).parents[2] / "configs" / "recipe"
    assert {path.stem for path in folder.glob("*.yaml")} <= GOLDEN.keys()
    for launch in ("zaya1_8b", "zaya1_8b, one node"):
        for phase in GOLDEN[launch].values():
            assert max(phase["peak_bytes"].values()) < 0.9 * 192 * GB
    (phase,) = GOLDEN["zaya1_8b_1gpu"].values()
    assert max(phase["peak_bytes"].values()) < 0.9 * 140 * GB


def test_one_card_holds_the_published_model() -> None:
    """The recipe's state by hand: weights and their gradient in fp32, momentum in bf16, AdamW's two
    for the embedding."""
    config = compose(["recipe=zaya1_8b_1gpu"])
    published = compose(["recipe=zaya1_8b"])
    assert config.model == published.model
    (name,) = config.plan.phases
    phase, first = config.plan.phases[name], published.plan.phases[name]
    assert (phase.context_tokens, phase.rope_base) == (4096, first.rope_base)
    size = model_size(config.model)
    matrices = size.total - size.embedding
    found = GOLDEN["zaya1_8b_1gpu"][name]["components"]
    assert found["master weights"] == pytest.approx(4 * size.total, rel=0.001)
    assert found["full gradients"] == pytest.approx(4 * size.total, rel=0.001)
    state = 2 * matrices + 8 * size.embedding
    assert found["optimizer state"] == pytest.approx(state, rel=0.001)


def test_state_is_what_hand_arithmetic_says() -> None:
    found = one(few_layers(), "pretrain_1").peak.components
    size = model_size(few_layers().model)
    # Rank 0's shards are rounded up to whole rows: 0.1 % here.
    assert found["master weights"] == pytest.approx(size.total * 4 / 8, rel=2e-3)
    matrices = size.total - size.embedding
    moments = (2 * size.embedding + matrices) * 4 / 8
    assert found["optimizer state"] == pytest.approx(moments, rel=2e-3)
    assert found["gathered weights"] == pytest.approx(size.total * 2, rel=2e-3)
    assert found["full gradients"] == pytest.approx(size.total * 4, rel=2e-3)


@pytest.mark.parametrize(
    ("phase", "overrides"),
    [
        ("pretrain_1", ()),
        ("pretrain_1", ("parallel.accumulation=reduce_each", "parallel.expert_parallel=8")),
        ("pretrain_1", ("parallel.reshard_after_forward=true",)),
        ("midtrain", ("parallel.expert_parallel=2", "parallel.recompute=full")),
        ("sft", ("parallel.recompute=selective",)),
        ("sft", ("parallel.recompute=full", "parallel.expert_parallel=8")),
    ],
)
def test_traffic_is_what_the_arithmetic_says(phase: str, overrides: tuple[str, ...]) -> None:
    config = few_layers(*overrides)
    found = one(config, phase)
    degrees, row = layout(config.plan.phases[phase], config.parallel, 1024), found.local_tokens
    tokens = config.model.num_layers * found.micro_batches * row
    length = config.plan.phases[phase].context_tokens
    work = Work(found.micro_batches, 1, length, tokens, tokens)
    expected: dict[tuple[str, str], int] = {}
    for flow in Traffic(config.model, config.parallel, config.precision, degrees, work).flows():
        key = (flow.kind, flow.axis)
        expected[key] = expected.get(key, 0) + flow.bytes
    counted = {key: flow.bytes for key, flow in found.flows.items()}
    # Muon's exchange, which the arithmetic leaves to docs/muon.md.
    counted.pop(("all_to_all", "replicate"))
    counted.pop(("all_to_all", "fsdp"), None)
    assert counted == expected


def test_muon_copies_its_updates_to_every_replica() -> None:
    """tests/golden/muon_owners.json has what the fullest rank sends to others."""
    golden = json.loads((rehearsal_table.GOLDEN.parent / "muon_owners.json").read_text())[2]
    flow = GOLDEN["zaya1_8b"]["sft"]["flows"]["all_to_all over replicate"]
    assert flow["bytes"] * 127 / 128 == pytest.approx(golden["largest_replicate_bytes"], rel=0.01)


def test_settings_save_what_they_should() -> None:
    kept = one(few_layers(), "sft").peak.components
    selective = one(few_layers("parallel.recompute=selective"), "sft").peak.components
    full = one(few_layers("parallel.recompute=full"), "sft").peak.components
    assert full["activations"] < selective["activations"] < kept["activations"]
    each = one(few_layers("parallel.accumulation=reduce_each"), "pretrain_1").peak.components
    assert "full gradients" not in each
    freed = one(few_layers("parallel.reshard_after_forward=true"), "sft").peak.components
    # One layer and the embedding, of two.
    assert freed["gathered weights"] < 0.75 * kept["gathered weights"]


def test_a_busy_expert_costs_memory_on_its_ranks() -> None:
    config = few_layers("parallel.expert_parallel=8")
    even, busy = one(config, "sft"), one(config, "sft", busiest=4.0)
    # Rank 0 holds two experts of 16: 4 + 12 / 15 shares instead of 2.
    assert busy.peak.bytes > even.peak.bytes
    moved = {name: r.flows["all_to_all", "expert"].bytes for name, r in (("e", even), ("b", busy))}
    assert moved["b"] > 1.3 * moved["e"]


def test_phases_of_one_shape_are_rehearsed_once() -> None:
    found = rehearse_phases(few_layers(), 1024, ["pretrain_1", "pretrain_2"])
    assert list(found) == ["pretrain_1", "pretrain_2"]
    assert found["pretrain_2"].phase == "pretrain_2"
    assert found["pretrain_2"].peak == found["pretrain_1"].peak
    assert found["pretrain_2"].seconds == found["pretrain_1"].seconds


def test_a_rehearsal_refuses_by_its_own_peak() -> None:
    config = tiny()
    peak = rehearse_phases(config, 2, ["long"])["long"].peak.bytes
    for usable, fits in ((peak + 1, True), (peak - 1, False)):
        request = RehearsalRequest(config, 2, ("long",), usable / (1 - RESERVE) / GB)
        if fits:
            show_rehearsal(request, Console(quiet=True))
            continue
        with pytest.raises(ConfigError, match=r"phase long: a peak of .* exceeds"):
            show_rehearsal(request, Console(quiet=True))


def test_triton_kernels_are_refused_by_key(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recipe=smoke_cpu", "kernels.cca=triton", "kernels.attention=triton"]
    assert main(["plan", *words, "--ranks", "2", "--rehearse"]) == 2
    told = capsys.readouterr().err
    assert "add kernels.cca=eager" in told and "add kernels.attention=eager" in told


def test_grouped_mm_is_rehearsed_in_bf16_only(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "recipe=smoke_cpu", "kernels.grouped_mlp=grouped_mm"]
    options = ["--ranks", "1", "--rehearse", "--phase", "pretrain_1"]
    assert main([*words, "precision.compute_dtype=fp32", *options]) == 2
    assert "a rehearsal needs precision.compute_dtype=bf16" in capsys.readouterr().err
    assert main([*words, "precision.compute_dtype=bf16", *options]) == 0


def test_an_unknown_phase_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=smoke_cpu", "--rehearse", "--phase", "later"]) == 2
    assert "plan.phases: no phase later" in capsys.readouterr().err


def test_broken_rules_are_told_before_anything_is_rehearsed() -> None:
    config = few_layers()
    assert rehearse_phases(replace(config), 8, ["sft"])["sft"].micro_batches == 128
