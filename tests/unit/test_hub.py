"""Refusals and bookkeeping of the Hugging Face conversion; parity is in tests/integration."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zaya_train.config.errors import CheckpointError, StorageError
from zaya_train.hub import Form, convert, from_hf, to_hf, write_hf
from zaya_train.hub.config import config_from_hf, config_to_hf
from zaya_train.hub.convert import RECEIPT
from zaya_train.runtime.files import write_json

from ..helpers.models import TINY, VARIANTS, random_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

torch.set_num_threads(1)
MODEL = replace(TINY, num_layers=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported model."""
    to_hf(random_model(MODEL), tmp_path / "model")
    return tmp_path / "model"


def tamper(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


EXPERTS = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERTS), f"missing: {EXPERTS}"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected: extra"),
        (
            lambda t: t.update({EXPERTS: t[EXPERTS][:-1].contiguous()}),
            rf"shape: {EXPERTS} is \[3, 32, 24\], should be \[4, 32, 24\]",
        ),
        (
            lambda t: t.update({EXPERTS: t[EXPERTS].transpose(1, 2).contiguous()}),
            rf"shape: {EXPERTS} is \[4, 24, 32\], should be \[4, 32, 24\]",
        ),
        (
            lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(32)}),
            r"unexpected: model\.layers\.2\.input_layernorm\.weight",
        ),
        (lambda t: t.clear(), r"missing: .* and \d+ more"),
        (
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
            "lm_head.weight differs from the embedding",
        ),
    ],
    ids=["missing", "surplus", "short", "transposed", "layer", "empty", "untied"],
)
def test_every_tensor_is_accounted_for_on_import(
    folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tamper(folder, change)
    with pytest.raises(CheckpointError, match=message):
        from_hf(folder)


def test_a_stored_head_that_repeats_the_embedding_is_read(folder: Path) -> None:
    tamper(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(from_hf(folder).embedding, random_model(MODEL).embedding)


@pytest.mark.parametrize("keep", [0, 5, 2000])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors file"):
        from_hf(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("moe.experts.down"), r"missing: layers\.0\.moe\.experts\.down"),
        (lambda s: s.update({"moe.extra": torch.zeros(1)}), r"layers\.0\.moe\.extra has no name"),
        (
            lambda s: s.update({"moe.experts.down": s["moe.experts.down"][:2]}),
            r"layers\.0\.moe\.experts\.down is \[2, 32",
        ),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_every_tensor_is_accounted_for_on_export(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = dict(random_model(MODEL).state_dict())
    first = {k.removeprefix("layers.0."): v for k, v in state.items() if k.startswith("layers.0.")}
    rest = {k: v for k, v in state.items() if not k.startswith("layers.0.")}
    change(first)
    tensors = rest | {f"layers.0.{name}": value for name, value in first.items()}
    with pytest.raises(CheckpointError, match=message):
        write_hf(tensors, MODEL, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True, only False is supported"),
        ({"lm_head_bias": True}, "lm_head_bias is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"num_experts_per_tok": 2}, "num_experts_per_tok is 2"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"layer_types": ["hybrid", "hybrid_sliding"]}, "layer_types .*hybrid_sliding"),
        ({"model_type": "llama"}, "model_type is 'llama', expected 'zaya'"),
        ({"rope_parameters": {"hybrid": {"rope_type": "yarn", "rope_theta": 1e4}}}, "'yarn'"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "no rope_theta under 'hybrid'"),
        ({"rope_parameters": {"hybrid": {"rope_type": "default"}}}, "no rope_theta under 'hybrid'"),
        ({"rope_parameters": ["hybrid"]}, "no rope_theta under 'hybrid'"),
        ({"layer_types": 7}, "layer_types is 7"),
        ({"layer_types": [["hybrid"]]}, "layer_types is"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_configurations_this_model_lacks_are_refused(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    configure(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        from_hf(folder)


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"hybrid": {"rope_theta": 1e4, **values}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": "x"}, "num_hidden_layers: expected int, got str 'x'"),
        ({"num_hidden_layers": None}, "num_hidden_layers: expected int, got NoneType"),
        ({"num_experts": True}, "num_experts: expected int, got bool"),
        ({"hidden_size": 32.0}, "hidden_size: expected int, got float"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps: expected float, got str"),
        (rope(rope_theta="x"), r"rope_parameters\.hybrid\.rope_theta: expected float, got str"),
        (
            rope(partial_rotary_factor=[]),
            "partial_rotary_factor: expected float, got list",
        ),
        (
            {"num_attention_heads": 5},
            "num_attention_heads: 5 is not a multiple of num_key_value_heads 2",
        ),
        ({"num_hidden_layers": 0}, "num_hidden_layers: 0 must be positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan must be positive and finite"),
        (rope(partial_rotary_factor=0.3), r"partial_rotary_factor: 0\.3 of head_dim 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_types_and_impossible_values_name_file_and_key(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    configure(folder, **changes)
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        config_from_hf(folder)


@pytest.mark.parametrize("content", ["[]", "7", "null"])
def test_a_config_that_is_no_object_is_refused(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: a JSON object is expected, found"):
        config_from_hf(folder)


def test_without_a_skip_class_nothing_is_exported(tmp_path: Path) -> None:
    model = random_model(replace(MODEL, skip_class=False))
    with pytest.raises(CheckpointError, match=r"model\.skip_class=false cannot be exported"):
        to_hf(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_folders_without_a_model_are_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        from_hf(tmp_path / "nowhere")
    (folder / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        from_hf(folder)


def test_a_folder_without_tensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        from_hf(folder)


@pytest.mark.parametrize("name", VARIANTS)
def test_configurations_come_back(name: str, tmp_path: Path) -> None:
    config = VARIANTS[name]
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)), encoding="utf-8")
    assert config_from_hf(tmp_path) == config


def test_keys_left_out_mean_transformers_defaults(tmp_path: Path) -> None:
    """As in a config.json written from ZayaConfig's defaults by hand: only the type is needed."""
    (tmp_path / "config.json").write_text('{"model_type": "zaya"}', encoding="utf-8")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.ZayaConfig()
    ours = config_from_hf(tmp_path)
    exported = config_to_hf(ours)
    rope = exported.pop("rope_parameters")["hybrid"]
    assert rope == theirs.rope_parameters["hybrid"]
    skipped = ("architectures", "model_type")
    assert {k: getattr(theirs, k) for k in exported if k not in skipped} == {
        k: v for k, v in exported.items() if k not in skipped
    }


def test_rotation_without_a_fraction_is_whole(folder: Path) -> None:
    """transformers' default once rope_parameters are given."""
    configure(folder, rope_parameters={"hybrid": {"rope_type": "default", "rope_theta": 5e4}})
    config = config_from_hf(folder)
    assert (config.rope_base, config.rope_fraction) == (5e4, 1.0)


def test_shards_hold_every_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "_SHARD_BYTES", 20_000)
    model = random_model(MODEL)
    to_hf(model, tmp_path / "model")
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text("utf-8"))
    stored = {key: file.name for file in files for key in load_file(file)}
    assert index["weight_map"] == stored
    again = from_hf(tmp_path / "model").state_dict()
    assert all(torch.equal(value, again[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_balancing_biases_stay_fp32(folder: Path, dtype: torch.dtype) -> None:
    model = from_hf(folder, dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    assert all(p.requires_grad for p in model.parameters())


def test_an_earlier_export_is_replaced(folder: Path) -> None:
    other = random_model(MODEL, seed=1)
    to_hf(other, folder)
    assert torch.equal(from_hf(folder).embedding, other.embedding)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_folder_with_a_config_of_its_own_is_left_alone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match="exists and is not an export of ours"):
        to_hf(random_model(MODEL), run)
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.json"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_export_is_left_alone(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "model"
    keepsake = target / "notes.txt" if kind == "folder" else target
    keepsake.parent.mkdir(exist_ok=True)
    keepsake.write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match="exists and is not an export of ours"):
        to_hf(random_model(MODEL), target)
    assert keepsake.read_text(encoding="utf-8") == "mine"


def test_an_export_with_files_added_by_hand_is_left_alone(folder: Path) -> None:
    receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    written = [path.name for path in folder.iterdir() if path.name != RECEIPT]
    write_json(folder / RECEIPT, receipt | {"files": {key: {} for key in written}})
    (folder / "mine").mkdir()
    (folder / "mine" / "card.md").write_text("mine", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"holds mine/card\.md, .* \(1 such files\)"):
        to_hf(random_model(MODEL, seed=1), folder)
    assert torch.equal(from_hf(folder).embedding, random_model(MODEL).embedding)
    shutil.rmtree(folder / "mine")
    to_hf(random_model(MODEL, seed=1), folder)
    assert torch.equal(from_hf(folder).embedding, random_model(MODEL, seed=1).embedding)


def test_a_failing_export_leaves_the_earlier_one(folder: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(StorageError, match=r"model\.safetensors: .*File too large"):
            to_hf(random_model(MODEL, seed=1), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(from_hf(folder).embedding, random_model(MODEL).embedding)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failing_rename_puts_the_earlier_export_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = type(folder).rename

    def rename(self: Path, target: Path) -> Path:
        if self.name.startswith(".tmp-") and not self.name.endswith(".old"):
            raise OSError(5, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(type(folder), "rename", rename)
    with pytest.raises(StorageError, match="Input/output error"):
        to_hf(random_model(MODEL, seed=1), folder)
    assert torch.equal(from_hf(folder).embedding, random_model(MODEL).embedding)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_tokenizer_folder_does_not_overwrite_the_model(folder: Path, tmp_path: Path) -> None:
    """An exported model's own folder serves as tokenizer for the next."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<e>": 1}, "a"))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<e>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    other = random_model(replace(MODEL, rope_base=77.0), seed=1)
    to_hf(other, tmp_path / "other", Form(tokenizer=folder))
    again = from_hf(tmp_path / "other")
    assert torch.equal(again.embedding, other.embedding) and again.config.rope_base == 77.0
    content = json.loads((tmp_path / "other" / "config.json").read_text("utf-8"))
    assert (content["eos_token_id"], content["pad_token_id"]) == (1, None)
    assert (tmp_path / "other" / "tokenizer.json").is_file()
