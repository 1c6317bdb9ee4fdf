"""What `zaya export-hf` leaves besides the model, and which exports it refuses."""

from __future__ import annotations

import io
import json
import weakref
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from zaya_train.config.errors import CheckpointError, ConfigError, DataError, NumericsError
from zaya_train.data.prepare import PrepareRequest, prepare
from zaya_train.data.tokenizer import MARKERS, load_tokenizer
from zaya_train.hub import Form, from_hf, names, to_hf
from zaya_train.hub.convert import RECEIPT
from zaya_train.run import CHECKPOINTS, TOKENIZER
from zaya_train.runtime.files import file_sha256
from zaya_train.tools import export_check
from zaya_train.tools.export_agreement import Comparison, problems
from zaya_train.tools.export_passes import Pass, _reader, _require_loaded, their_pass, twin_of
from zaya_train.tools.export_receipt import PAGE, Origin, complete, read_receipt, rope_section
from zaya_train.tools.export_tokenizer import tokenizer_section
from zaya_train.tools.export_tokens import random_tokens
from zaya_train.tools.transfer import ExportRequest, Verification, export_hf, trained_tensors
from zaya_train.train.manifest import read as read_manifest

from ..helpers.models import TINY, random_model
from ..helpers.saved_run import made_record, save_run

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from zaya_train.hub.names import Layout
    from zaya_train.model import ZayaModel

torch.set_num_threads(1)
MODEL = replace(TINY, num_layers=2, vocab_size=264, skip_output="identity")
FEW = Verification(tokens=80)


def with_skip_bias(model: ZayaModel, bias: float) -> ZayaModel:
    """The model with one skip bias in all layers."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            assert name.endswith("balancing_bias")
            buffer[-1] = bias
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose skip bias is the initial one."""
    model = with_skip_bias(random_model(MODEL), -1.0)
    return save_run(tmp_path_factory.mktemp("receipt") / "run", model)


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that sends some tokens to the skip class."""
    model = with_skip_bias(random_model(MODEL), 0.05)
    return save_run(tmp_path_factory.mktemp("skipping") / "run", model)


def export(source: Path, output: Path, **asked: Any) -> str:
    """Export and give back what was printed, as one line."""
    console = Console(file=io.StringIO(), record=True)
    export_hf(ExportRequest(source, output, **({"verify": FEW} | asked)), console)
    return " ".join(console.export_text().split())


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_a_receipt_says_what_was_exported(layout: Layout, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    printed = export(run, out, layout=layout)
    receipt = read_receipt(out)
    manifest = run / CHECKPOINTS / "step-00000001" / "MANIFEST.json"
    assert receipt["layout"] == layout
    assert receipt["run"] == {
        "run": "run",
        "checkpoint": "step-00000001",
        "manifest_sha256": file_sha256(manifest),
        "step": 1,
        "phase": "short",
        "finished": None,
        "phase_share": None,
        "phases_not_begun": [],
        "tokens": 640,
        "supervised_tokens": 600,
        "math_hash": "0123abcd",
        "config_hash": read_manifest(manifest.parent).record.config_hash,
        "corpora": {"problems": "c0ffee"},
        "trained_with": {"torch": "2.x"},
    }
    assert receipt["model"] == asdict(MODEL)
    assert receipt["versions"]["transformers"] == "5.23.0"
    result = receipt["agreement"]["fp32"]
    assert (result["tokens"], result["documents"]) == (80, 1)
    assert 0 < result["logits"]["p50"] <= result["logits"]["largest"] < 1e-5
    assert result["loss"]["ours"] == pytest.approx(result["loss"]["theirs"], rel=1e-6)
    assert [layer["layer"] for layer in result["layers"]] == [0, 1]
    assert receipt["check"]["source"] == "random tokens, seed 0"
    found = {path.name for path in out.iterdir()}
    assert set(receipt["files"]) == found - {RECEIPT} and PAGE in found
    assert all(file_sha256(out / name) == e["sha256"] for name, e in receipt["files"].items())
    assert "agrees with transformers on 80 tokens (random tokens, seed 0)" in printed
    page = (out / PAGE).read_text("utf-8")
    for text in (
        "step 1 in phase short, 640 tokens seen",
        "0123abcd",
        "| base | 10,000 | 10,000 |",
    ):
        assert text in page
    assert ("split along its first dimension into 4" in page) == (layout == "legacy")


def test_what_was_not_compared_says_so(run: Path, tmp_path: Path) -> None:
    printed = export(run, tmp_path / "out", verify=None)
    receipt = read_receipt(tmp_path / "out")
    assert receipt["agreement"] == {"verified": False, "reason": "--no-verify"}
    assert receipt["skip"] == receipt["agreement"] and receipt["check"] is None
    assert "not verified (--no-verify)" in printed
    page = (tmp_path / "out" / PAGE).read_text("utf-8")
    assert page.count("ot verified (--no-verify)") == 2
    assert receipt["keys"]["totals"]["theirs"] == len(receipt["keys"]["tensors"]) > 50


def test_a_cast_and_the_stored_type_are_measured(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", dtype="bf16")
    agreement = read_receipt(tmp_path / "out")["agreement"]
    assert agreement["fp32"]["logits"]["largest"] < 1e-5
    assert agreement["stored_dtype"]["dtype"] == "bfloat16"
    # Rounding to 8 bits shows; arithmetic in fp32 from rounded weights does not.
    assert agreement["stored_dtype"]["largest"] > 1e-4 and agreement["cast"]["largest"] > 1e-4
    page = (tmp_path / "out" / PAGE).read_text("utf-8")
    assert "| bf16, as stored |" in page and "The cast itself: loss" in page


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_a_wrong_table_of_names_is_no_export(
    layout: Layout, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written and read back by the same wrong table, all hashes are right; only the computation
    tells. An earlier export stays."""
    out = tmp_path / "out"
    export(run, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    table = names._TABLES["native"]
    one, two = "attention_residual.branch_scale", "moe_residual.branch_scale"
    swapped = {one: table[two], two: table[one]}
    monkeypatch.setitem(names._TABLES, "native", table | swapped)
    with pytest.raises(NumericsError, match=r"transformers computes something else .* layer 0"):
        export(run, out, layout=layout)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    with pytest.raises(NumericsError):
        export(run, tmp_path / "new", layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def corpus(folder: Path, tokenizer: str = "bytes") -> Path:
    """Three short documents."""
    source = folder / "texts.jsonl"
    texts = ["one two three", "x", "four five six seven"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    request = PrepareRequest(input=str(source), output=folder / "corpus", tokenizer=tokenizer)
    prepare(request, Console(quiet=True))
    return folder / "corpus" / "train"


def test_tokens_come_from_the_corpus_that_is_named(run: Path, tmp_path: Path) -> None:
    data = corpus(tmp_path)
    export(run, tmp_path / "out", verify=Verification(tokens=24, data=data))
    kept = read_receipt(tmp_path / "out")["check"]
    assert kept["source"] == "corpus corpus/train, first documents"
    texts = [load_tokenizer("bytes").decode(ids) for ids in kept["documents"]]
    assert texts == ["one two three<|end|>", "x<|end|>", "four fiv"]


def test_tokens_come_from_the_text_that_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a text of one's own")
    asked = Verification(tokens=10, data=tmp_path / "notes.txt")
    printed = export(run, tmp_path / "out", verify=asked)
    assert "on 10 tokens (text notes.txt, its beginning)" in printed


def test_tokens_that_cannot_be_had_are_refused_first(run: Path, tmp_path: Path) -> None:
    larger = load_tokenizer("bytes")
    larger.backend.add_special_tokens(["<|extra|>"])
    larger.save(tmp_path / "larger")
    other = corpus(tmp_path, str(tmp_path / "larger"))
    (tmp_path / "empty.txt").write_text("")
    cases: list[tuple[Verification, type[Exception], str]] = [
        (Verification(tokens=1), ConfigError, "--verify-tokens 1: at least 2"),
        (Verification(data=other), DataError, "made with another tokenizer"),
        (Verification(data=tmp_path / "none.txt"), DataError, r"none\.txt: cannot be read"),
        (Verification(data=tmp_path / "empty.txt"), DataError, "no document of two tokens"),
    ]
    for asked, kind, said in cases:
        with pytest.raises(kind, match=said):
            export(run, tmp_path / "out", verify=asked)
    assert not (tmp_path / "out").exists()


def test_skips_that_the_target_computes_otherwise_are_measured(
    skipping: Path, tmp_path: Path
) -> None:
    printed = export(skipping, tmp_path / "out")
    receipt = read_receipt(tmp_path / "out")
    skip, ids = receipt["skip"], torch.tensor(receipt["check"]["documents"])
    model = from_hf(tmp_path / "out")
    assert (skip["trained"], skip["target"], skip["verdict"]) == ("identity", "zero", "differs")
    choices: list[Tensor] = []
    layers: Any = model.layers
    for layer in layers:
        layer.moe.router.register_forward_hook(lambda m, given, out: choices.append(out.choice))
    with torch.no_grad():
        zero = model.logits(ids)
    taken = torch.stack(choices)[:, 0] == MODEL.num_experts
    assert skip["skipped_by_layer"] == taken.sum(1).tolist() and 0 < taken.sum() < taken.numel()
    first = int(taken.any(0).nonzero()[0])
    assert skip["touched_tokens"] == ids.numel() - first and skip["touched_documents"] == [0]
    for layer in layers:
        layer.moe.config = replace(MODEL, skip_output="identity")
    with torch.no_grad():
        identity = model.logits(ids)
    gap = float((identity - zero).abs().max() / identity.std(-1).mean())
    assert skip["difference"]["logits_largest"] == pytest.approx(gap, rel=1e-4)
    assert skip["difference"]["loss_identity"] != skip["difference"]["loss_zero"]
    assert max(skip["closest_by_layer"]) > 0
    assert "trained with identity, the native layout's code gives zero: " in printed
    # A trained skip bias is lost when transformers loads the folder.
    reset = skip["biases_reset_by_transformers"]
    assert reset["layers"] == [0, 1] and reset["choices_changed"] >= int(taken.sum())
    assert skip["loading"] == "lost"
    warning = "LOST ON LOAD: transformers 5.23.0 sets the skip class's balancing bias to -1"
    assert f"warning: {warning}" in printed
    assert "expert choices equal, once the skip class's biases are put back" in printed
    assert warning in (tmp_path / "out" / PAGE).read_text("utf-8")


def test_skips_that_the_target_computes_alike_are_no_difference(
    skipping: Path, run: Path, tmp_path: Path
) -> None:
    printed = export(skipping, tmp_path / "legacy", layout="legacy")
    assert "skip class: identity in training and in the legacy layout" in printed
    skip = read_receipt(tmp_path / "legacy")["skip"]
    # transformers never loads that layout.
    assert skip["verdict"] == "same" and "loading" not in skip
    assert "LOST" not in printed + (tmp_path / "legacy" / PAGE).read_text("utf-8")
    printed = export(run, tmp_path / "native")
    skip = read_receipt(tmp_path / "native")["skip"]
    assert (skip["verdict"], skip["skipped_by_layer"]) == ("unused", [0, 0])
    assert skip["biases_reset_by_transformers"] == {"layers": [], "to": -1.0, "choices_changed": 0}
    assert skip["loading"] == "kept" and "LOST" not in printed
    assert "no token of 80 took it (closest: -" in printed


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        ({"rope_base": 5e6}, r"RoPE base 10000, but phase short was trained with 5e\+06"),
        ({"context_tokens": 512}, "max_position_embeddings 256, but phase short .* of 512"),
    ],
)
def test_a_phase_that_the_folder_contradicts_is_refused(
    phase: dict[str, float], said: str, tmp_path: Path
) -> None:
    model = random_model(MODEL)
    to_hf(model, tmp_path / "out")
    made = made_record(model)
    rows = [["short", made.lineage["phases"][0][1] | phase]]
    with pytest.raises(CheckpointError, match=said):
        rope_section(tmp_path / "out", replace(made, lineage={"phases": rows}))


def test_the_rotated_fraction_is_compared(tmp_path: Path) -> None:
    model = random_model(MODEL)
    to_hf(model, tmp_path / "out")
    made = made_record(model)
    with pytest.raises(CheckpointError, match=r"RoPE fraction 0\.5, but .* with 1"):
        rope_section(tmp_path / "out", replace(made, model=made.model | {"rope_fraction": 1.0}))


def test_the_phase_is_found_where_it_had_not_begun(tmp_path: Path) -> None:
    """A checkpoint of its first moment has the phases before it as its past."""
    model = random_model(MODEL)
    to_hf(model, tmp_path / "out")
    row = made_record(model, context_tokens=128).lineage["phases"][0][1]
    identity = {"config": {"plan": {"phases": {"short": row}}}}
    made = replace(made_record(model), lineage={"phases": []}, identity=identity)
    section = rope_section(tmp_path / "out", made)
    assert section["trained"]["context_tokens"] == 128
    unknown = rope_section(tmp_path / "out", replace(made, identity={}))
    assert unknown["trained"] == {"base": 1e4, "fraction": 0.5, "context_tokens": None}


def model_folder(folder: Path, tokenizer: Path) -> Path:
    to_hf(random_model(MODEL), folder, Form(tokenizer=tokenizer))
    return folder


def test_the_tokenizer_is_that_of_the_run(run: Path, tmp_path: Path) -> None:
    section = tokenizer_section(
        model_folder(tmp_path / "out", run / TOKENIZER), run / TOKENIZER, "native"
    )
    assert {token: section["special_tokens"][token] for token in MARKERS} == {
        token: index for index, token in enumerate(MARKERS)
    }
    assert section["special_tokens"]["eos"] == 1 and section["template"]["kind"] == "shipped"
    assert section["template"]["example"].startswith("<|user|>What is 98 + 57?<|end|><|assistant|>")


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), encoding="utf-8")


def test_a_tokenizer_that_says_something_else_is_refused(run: Path, tmp_path: Path) -> None:
    source = run / TOKENIZER
    out = model_folder(tmp_path / "out", source)
    edit(out / "config.json", eos_token_id=2)
    with pytest.raises(CheckpointError, match="eos_token_id is 2, the tokenizer's is 1"):
        tokenizer_section(out, source, "native")
    edit(out / "config.json", eos_token_id=1)
    edit(out / "tokenizer_config.json", chat_template="{{ messages }}")
    with pytest.raises(CheckpointError, match="another chat template than"):
        tokenizer_section(out, source, "native")
    # Two ids exchanged: every text comes out as another.
    text = (source / "tokenizer.json").read_text("utf-8")
    vocabulary = json.loads(text)
    ids = vocabulary["model"]["vocab"]
    ids["e"], ids["t"] = ids["t"], ids["e"]
    (out / "tokenizer.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    with pytest.raises(CheckpointError, match="transformers encodes 'The quick brown fox"):
        tokenizer_section(out, source, "native")


def test_a_tokenizer_that_decodes_otherwise_is_refused(run: Path, tmp_path: Path) -> None:
    out = model_folder(tmp_path / "out", run / TOKENIZER)
    edit(out / "tokenizer.json", decoder={"type": "Fuse"})
    with pytest.raises(CheckpointError, match="transformers decodes 'The quick brown fox"):
        tokenizer_section(out, run / TOKENIZER, "native")


def test_a_folder_that_holds_other_values_than_were_trained_is_refused(
    run: Path, tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "out", run / TOKENIZER)
    checkpoint = run / CHECKPOINTS / "step-00000001"
    tensors = trained_tensors(checkpoint) | {"norm.weight": torch.zeros(MODEL.hidden_size)}
    record = read_manifest(checkpoint).record
    origin = Origin(
        checkpoint=checkpoint,
        record=record,
        config=MODEL,
        tensors=tensors,
        form=Form(tokenizer=run / TOKENIZER),
        tokens=random_tokens(16, MODEL.vocab_size, 256),
    )
    with pytest.raises(CheckpointError, match="is not read back as it was trained"):
        complete(folder, origin)


def test_a_template_of_the_tokenizer_s_own_is_rendered_on_both_sides(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.save(tmp_path / "own")
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}\n{{ m.content }}{{ eos_token }}\n"
        "{% endfor %}"
    )
    edit(tmp_path / "own" / "tokenizer_config.json", chat_template=template)
    section = tokenizer_section(
        model_folder(tmp_path / "out", tmp_path / "own"), tmp_path / "own", "native"
    )
    assert section["template"]["kind"] == "the tokenizer's own"
    assert section["template"]["example"].startswith("<|user|>\nWhat is 98 + 57?<|end|>\n")


def passes(logits: Tensor, choices: list[list[int]], gap: float = 0.0) -> Pass:
    """A pass of two experts, of which the first scores higher by `gap`, and a skip class."""
    scores = torch.tensor([0.4 + gap, 0.4, -0.8]).expand(logits.shape[0], 3)
    made = [torch.tensor(layer) for layer in choices]
    stream = torch.ones(logits.shape[0], 3)
    return Pass(logits, made, [scores] * len(made), [stream] * len(made))


def compared(ours: Pass, theirs: Pass) -> dict[str, Any]:
    comparison = Comparison()
    comparison.add(torch.zeros(len(ours.logits), dtype=torch.int64), ours, theirs)
    return comparison.result()


def test_a_choice_that_is_a_tie_is_no_problem() -> None:
    logits = torch.randn(4, 5)
    ours = passes(logits, [[0, 0, 1, 0], [0, 0, 1, 0]])
    result = compared(ours, passes(logits, [[0, 0, 0, 0], [0, 0, 0, 1]]))
    assert problems(result) == []
    assert [layer["differing"] for layer in result["layers"]] == [1, 2]
    assert result["equal_choices"] == 5 / 8


@pytest.mark.parametrize("gap", [2e-3, 1e-5])
def test_a_choice_that_is_no_tie_is_a_problem(gap: float) -> None:
    """Also where the router hardly prefers any expert: the margin is all that it prefers by."""
    logits = torch.randn(3, 5)
    ours, theirs = passes(logits, [[0, 1, 0]]), passes(logits, [[0, 0, 0]], gap=gap)
    (said,) = problems(compared(ours, theirs))
    assert said.startswith("layer 0 sends 1 tokens to other experts, by margins of up to ")


def test_a_figure_that_is_no_number_is_a_problem() -> None:
    logits = torch.randn(3, 5)
    result = compared(passes(logits, [[0, 0, 0]]), passes(logits, [[0, 0, 0]]))
    result["logits"]["largest"] = result["layers"][0]["largest_margin"] = float("nan")
    assert len(problems(result)) == 2


def test_routers_that_hardly_prefer_are_judged_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near-ties in every layer, and a table that exchanges two of the router's matrices."""
    model = with_skip_bias(random_model(MODEL), -1.0)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("router.out"):
                tensor.mul_(1e-4)
            if name.endswith("balancing_bias"):
                tensor[:-1] = 0
    source = save_run(tmp_path / "run", model)
    export(source, tmp_path / "right")
    table = names._TABLES["native"]
    one, two = "moe.router.fc1", "moe.router.fc2"
    swapped = {one: table[two], two: table[one]}
    monkeypatch.setitem(names._TABLES, "native", table | swapped)
    with pytest.raises(NumericsError, match=r"layer 0 sends .* to other experts"):
        export(source, tmp_path / "wrong")


def test_logits_beyond_the_tolerance_are_a_problem() -> None:
    logits = torch.randn(3, 5)
    ours, theirs = passes(logits, [[0, 0, 0]]), passes(logits + 1e-2, [[0, 0, 0]])
    (said,) = problems(compared(ours, theirs))
    assert said.startswith("logits differ by 0.0")
    assert problems(compared(ours, passes(logits + 1e-6, [[0, 0, 0]]))) == []


@pytest.mark.parametrize("side", ["our model", "the other model"])
def test_values_that_are_not_finite_are_no_agreement(side: str) -> None:
    good, bad = torch.randn(2, 5), torch.full((2, 5), float("nan"))
    one, two = (bad, good) if side == "our model" else (good, bad)
    with pytest.raises(NumericsError, match=f"{side} computes logits that are not finite"):
        compared(passes(one, [[0, 0]]), passes(two, [[0, 0]]))


def test_an_export_is_no_tokenizer_s_receipt(run: Path, tmp_path: Path) -> None:
    """A model's folder as tokenizer: its receipt and page do not go along."""
    export(run, tmp_path / "first")
    to_hf(random_model(MODEL), tmp_path / "second", Form(tokenizer=tmp_path / "first"))
    assert not (tmp_path / "second" / PAGE).exists()
    assert set(read_receipt(tmp_path / "second")) == {"format", "layout", "keys"}
    stored = load_file(tmp_path / "second" / "model.safetensors")
    assert len(stored) == read_receipt(tmp_path / "second")["keys"]["totals"]["theirs"]


def test_what_transformers_holds_is_compared_with_the_file(tmp_path: Path) -> None:
    to_hf(random_model(MODEL), tmp_path / "model")
    twin, _ = twin_of(tmp_path / "model", "native", torch.float32, {})
    stored, read = _reader(tmp_path / "model", "native", {})
    _require_loaded(tmp_path, twin, stored, read)
    with pytest.raises(CheckpointError, match=r"differ in tensor model\.more"):
        _require_loaded(tmp_path, twin, {*stored, "model.more"}, read)
    with torch.no_grad():
        twin.model.norm.weight[0] += 2**-20
    with pytest.raises(CheckpointError, match=r"holds other values in model\.norm\.weight"):
        _require_loaded(tmp_path, twin, stored, read)


def test_tokens_go_to_the_experts_that_are_given(tmp_path: Path) -> None:
    to_hf(random_model(MODEL), tmp_path / "model")
    twin, _ = twin_of(tmp_path / "model", "native", torch.float32, {})
    ids = torch.arange(9)
    free = their_pass(twin, ids)
    assert torch.equal(their_pass(twin, ids, free.choices).logits, free.logits)
    others = [(choice + 1) % MODEL.num_experts for choice in free.choices]
    assert not torch.allclose(their_pass(twin, ids, others).logits, free.logits, atol=1e-4)


@pytest.mark.parametrize("layout", names.LAYOUTS)
def test_two_models_are_never_held_at_once(
    layout: Layout, skipping: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published ones have 35 GB each: what is compared are passes."""
    made: list[weakref.ref[Any]] = []
    held: list[int] = []

    def counted(build: Any) -> Any:
        def built(*given: Any) -> Any:
            held.append(sum(one() is not None for one in made))
            result = build(*given)
            made.append(weakref.ref(result[0] if isinstance(result, tuple) else result))
            return result

        return built

    for name in ("model_of", "twin_of"):
        monkeypatch.setattr(export_check, name, counted(getattr(export_check, name)))
    export(skipping, tmp_path / "out", dtype="bf16", layout=layout)
    # Ours; theirs in fp32; ours with skipped tokens' other output; theirs in bf16; ours uncast.
    assert held == [0] * 5
