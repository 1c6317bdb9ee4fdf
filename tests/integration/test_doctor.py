"""zaya doctor: a healthy configuration passes; every kind of planted fault is found and named."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from zaya_kernels.attention import op as attention_op
from zaya_kernels.grouped_mlp import op as grouped_mlp_op
from zaya_kernels.norm_residual import op as norm_op

from tests.helpers.tiny import tiny
from zaya_train.main import main
from zaya_train.model import layout as layout_module
from zaya_train.parallel.experts import AllToAllDispatcher
from zaya_train.parallel.fsdp import Reduction
from zaya_train.parallel.sequence import SharedRows
from zaya_train.tools import doctor_kernels
from zaya_train.tools.doctor import DoctorRequest, Findings, _layout_table, doctor
from zaya_train.tools.doctor_kernels import compare_kernels
from zaya_train.tools.doctor_layouts import SERIAL, certify, trials_of
from zaya_train.tools.doctor_leaks import probe
from zaya_train.tools.doctor_ranks import RanksFailed, on_ranks
from zaya_train.tools.doctor_subject import Context, Trial, contexts_of, shrunk

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from zaya_train.config.schema import TrainConfig
    from zaya_train.model.interfaces import Pending, Route

SHORT = Context(("short",), 32, 1e4, 1)
LONG = Context(("long",), 64, 1e5, 2)


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """Of four experts; shrunk."""
    return shrunk(tiny({"model.num_experts": 4}))


def sick(config: TrainConfig, context: Context, trial: Trial) -> str:
    """The worst tensor of a trial that must fail."""
    (verdict,) = certify(config, context, [trial])
    assert not verdict.ok
    return verdict.worst


def test_a_healthy_configuration_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    receipt = tmp_path / "receipt.json"
    config = tiny({"parallel.expert_parallel": 2, "model.num_experts": 4})
    code = doctor(DoctorRequest(config, ranks=2, receipt=receipt), Console(width=200))
    shown, found = capsys.readouterr().out, json.loads(receipt.read_text())
    assert code == 0 and "FAILED" not in shown
    assert found["passed"] and found["culprits"] == []
    assert {(leak["layout"], leak["what"]) for leak in found["leaks"]} >= {
        ("one process", "documents"),
        ("context over 2", "causality"),
        ("context over 2", "gradients"),
    }
    names = {trial["trial"] for trial in found["layouts"]}
    assert {"replicas and shards", "experts over 2", "recompute full", "your settings"} <= names
    assert {"accumulation reduce_each", "context over 2"} <= names
    for trial in found["layouts"]:
        assert trial["errors"].keys() == {"loss", "gradients", "weights", "biases"}
        assert max(trial["errors"].values()) < 1e-5
    # Something was compared: rounding differs somewhere.
    assert any(max(trial["errors"].values()) > 0 for trial in found["layouts"])
    assert {kernel["op"].split()[0] for kernel in found["kernels"]} == {
        "cca",
        "attention",
        "norm_residual",
        "router",
        "grouped_mlp",
        "moe_permute",
        "linear_cross_entropy",
        "newton_schulz",
    }
    assert found["versions"]["torch"] == torch.__version__


def test_a_failed_check_gives_exit_code_1_and_a_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor_kernels, "SLACK", 0.0)
    monkeypatch.setitem(doctor_kernels.FLOOR, "fp32", 0.0)
    monkeypatch.setattr("zaya_train.tools.doctor_leaks.probe", lambda *_: [])
    monkeypatch.setattr("zaya_train.tools.doctor_layouts.certify", lambda *_: [])
    assert doctor(DoctorRequest(tiny(), ranks=2), Console(width=200)) == 1
    assert "FAILED kernels attention=eager: " in capsys.readouterr().out


def test_libraries_that_are_there_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's place is taken by the reference, and by one with a wrong result."""
    monkeypatch.setattr(doctor_kernels, "GPU", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        doctor_kernels, "find_spec", lambda name: name in ("flash_attn", "transformer_engine")
    )
    usual, experts = attention_op.BACKENDS["reference"], grouped_mlp_op.BACKENDS["reference"]
    monkeypatch.setitem(attention_op.BACKENDS, "flash_attn", usual)
    monkeypatch.setitem(grouped_mlp_op.BACKENDS, "transformer_engine", lambda *x: 1.1 * experts(*x))
    found = {(k.op, k.backend): k for k in compare_kernels(tiny())}
    assert found["attention", "flash_attn"].ok and ("attention", "aiter") not in found
    assert found["attention", "flash_attn"].limit >= doctor_kernels.FLOOR["bf16"]
    assert not found["grouped_mlp", "transformer_engine"].ok
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor_kernels.libraries_here() == []


def test_a_dispatcher_that_drops_a_row(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = AllToAllDispatcher.start_combine

    def drop(self: AllToAllDispatcher, rows: Tensor, route: Route) -> Pending:
        keep = torch.ones(rows.shape[0], 1)
        keep[:1] = 0
        return inner(self, rows * keep, route)

    monkeypatch.setattr(AllToAllDispatcher, "start_combine", drop)
    assert "gradients" in sick(config, SHORT, Trial("", shard=2, expert=2, micro_rows=1))


def test_a_halo_of_the_wrong_chunk(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = SharedRows.halo

    def wrong(self: SharedRows, x: Tensor, rows: int) -> Tensor:
        return inner(self, x, rows).flip(1)

    monkeypatch.setattr(SharedRows, "halo", wrong)
    trial = Trial("context", context=2, micro_rows=1)
    assert sick(config, LONG, trial)
    leaks = {leak.what: leak for leak in probe(config, LONG, trial)}
    assert not leaks["causality"].ok
    assert "layers.0.attention" in leaks["causality"].culprit


def test_gradients_of_another_group(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = Reduction.prepare

    def forget(self: Reduction, model: Any, last: bool) -> None:
        inner(self, model, last)
        if hasattr(model, "set_requires_all_reduce"):
            model.set_requires_all_reduce(False)

    monkeypatch.setattr(Reduction, "prepare", forget)
    assert "gradients" in sick(config, SHORT, Trial("", replicate=2, micro_rows=1))


def test_an_attention_plan_that_leaks_across_documents(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = layout_module.row_segments

    def one_document(spans: Any, *rest: Any) -> Any:
        return inner([(0, spans[-1][1])], *rest)

    monkeypatch.setattr(layout_module, "row_segments", one_document)
    leaks = {leak.what: leak for leak in probe(config, SHORT, SERIAL)}
    assert not leaks["documents"].ok and not leaks["gradients"].ok
    assert leaks["causality"].ok
    assert "document 0" in leaks["documents"].culprit
    assert "layers.0.attention" in leaks["documents"].culprit
    assert "gradient of" in leaks["gradients"].culprit


def test_positions_that_ignore_documents(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The convolutions and the delayed value look at positions alone.
    monkeypatch.setattr(layout_module, "_row_positions", lambda _, tokens: torch.arange(tokens))
    leaks = {leak.what: leak for leak in probe(config, SHORT, SERIAL)}
    assert not leaks["documents"].ok
    assert "layers.0.attention" in leaks["documents"].culprit


def test_a_router_that_looks_ahead(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = norm_op.NORM_BACKENDS["eager"]

    def ahead(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        mixed = x + 0.1 * x.roll(-1, dims=1) if x.dim() == 3 else x
        return inner(mixed, weight, eps)

    monkeypatch.setitem(norm_op.NORM_BACKENDS, "eager", ahead)
    leaks = {leak.what: leak for leak in probe(config, SHORT, SERIAL)}
    assert not leaks["causality"].ok
    (kernel,) = [k for k in compare_kernels(config) if k.op == "norm_residual (norm)"]
    assert not kernel.ok


@pytest.mark.parametrize("op", ["cca", "attention", "grouped_mlp", "linear_cross_entropy"])
def test_a_back_end_that_is_a_little_wrong(
    op: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = __import__(f"zaya_kernels.{op}.op", fromlist=["op"])
    inner = module.BACKENDS["eager"]

    def wrong(*arguments: Any) -> Any:
        out = inner(*arguments)
        return tuple(x * 1.001 for x in out) if isinstance(out, tuple) else out * 1.001

    monkeypatch.setitem(module.BACKENDS, "eager", wrong)
    assert [k.op for k in compare_kernels(config) if not k.ok] == [op]


def test_a_rank_that_raises_is_named(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: AllToAllDispatcher, *_: Any) -> Tensor:
        raise ValueError("no rows today")

    monkeypatch.setattr(AllToAllDispatcher, "start_dispatch", refuse)
    good = Trial("good", shard=2, micro_rows=1)
    bad = Trial("bad", shard=2, expert=2, micro_rows=1)
    verdicts = {v.trial.name: v for v in certify(config, SHORT, [good, bad])}
    assert verdicts["good"].ok and not verdicts["bad"].ok
    assert "no rows today" in verdicts["bad"].worst


def test_a_rank_that_dies_ends_the_others() -> None:
    with pytest.raises(RanksFailed, match="rank 1 of 2"):
        on_ranks(_die, 2)


def _die() -> None:
    if torch.distributed.get_rank() == 1:
        raise SystemExit(3)
    signal.pause()  # a collective would fail, and this rank might end first


def test_shrinking_keeps_what_is_the_users() -> None:
    config = tiny({"model.num_query_heads": 8, "model.conv_depthwise_taps": 3})
    config = replace(
        config, model=replace(config.model, head_dim=128, hidden_size=2048, vocab_size=50000)
    )
    small = shrunk(config).model
    assert (small.head_dim, small.hidden_size, small.vocab_size) == (8, 16, 61)
    assert (small.num_query_heads, small.num_kv_heads) == (8, 2)
    assert small.conv_depthwise_taps == 3
    assert shrunk(config).kernels == config.kernels
    assert [c.row_tokens for c in contexts_of(config)] == [32, 64]


def test_layouts_cover_every_axis(config: TrainConfig) -> None:
    trials = [*trials_of(config, SHORT, 4), *trials_of(config, LONG, 4)]
    assert {t.expert for t in trials} == {1, 2, 4}
    assert {t.context for t in trials} == {1, 2}
    assert {t.recompute for t in trials} == {"none", "selective", "full"}
    assert len({t.accumulation for t in trials}) == 3
    assert {t.reshard for t in trials} == {False, True}
    assert {t.layout.world for t in trials} == {4}
    three = replace(config, model=replace(config.model, num_experts=3))
    assert {t.expert for t in trials_of(three, SHORT, 4)} == {1}


def test_settings_that_the_ranks_cannot_form_are_reported() -> None:
    user = tiny({"model.num_experts": 12, "parallel.expert_parallel": 3, "parallel.shard": 24})
    config = shrunk(user)
    *others, own = trials_of(config, SHORT, 4)
    assert own.impossible == "3 does not divide 12 experts and a group of 4 ranks"
    assert not any(trial.impossible for trial in others)
    (verdict,) = certify(config, SHORT, [own])
    found = Findings([], [verdict], [], 0.0)
    assert found.culprits() == [] and not verdict.ok
    console = Console(width=200)
    with console.capture() as shown:
        console.print(_layout_table(found.verdicts))
    assert "your settings" in shown.get() and "not possible" in shown.get()


@pytest.mark.parametrize(("shard", "degrees"), [(0, (1, 4)), (2, (2, 2)), (8, (1, 4))])
def test_your_settings_have_your_shards(shard: int, degrees: tuple[int, int]) -> None:
    own = trials_of(shrunk(tiny({"parallel.shard": shard})), SHORT, 4)[-1]
    assert (own.replicate, own.shard) == degrees and not own.impossible


def test_triton_kernels_are_refused_by_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "recipe=smoke_cpu", "kernels.norm_residual=triton"]) == 2
    assert "add kernels.norm_residual=eager" in capsys.readouterr().err


def test_bad_ranks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "recipe=smoke_cpu", "--ranks", "3"]) == 2
    assert "--ranks: 3" in capsys.readouterr().err
