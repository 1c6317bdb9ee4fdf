"""The two layouts of a `zaya` folder: native (40 layers) and legacy (80), and the way between."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zaya_train.config.errors import CheckpointError
from zaya_train.config.schema import ModelConfig
from zaya_train.hub import Form, convert, from_hf, to_hf
from zaya_train.hub.accounting import account, content_sha256
from zaya_train.hub.config import config_from_hf, config_to_hf
from zaya_train.hub.convert import RECEIPT, folder_layout, meta_model
from zaya_train.hub.names import LAYOUTS, layout_of_name, tensor_names

from ..helpers.legacy import legacy_logits
from ..helpers.models import TINY, VARIANTS, ZAYA1_8B, random_model, random_tokens

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from zaya_train.hub.names import Layout

torch.set_num_threads(1)
MODEL = replace(TINY, num_layers=2)

PUBLISHED: dict[str, Any] = {
    # Zyphra/ZAYA1-8B's config.json in the legacy layout (docs/decisions/0014).
    "activation_func": "swiglu", "add_bias_linear": False, "architectures": ["ZayaForCausalLM"],
    "attention_bias": False, "bos_token_id": 2, "cca": True, "dtype": "bfloat16",
    "eos_token_id": 106, "ffn_hidden_size": 4096, "gated_linear_unit": True, "hidden_size": 2048,
    "head_dim": 128, "kv_channels": 128, "lm_head_bias": False, "mamba_cache_dtype": "float32",
    "max_position_embeddings": 131072, "model_type": "zaya", "moe_router_topk": 1,
    "norm_epsilon": 1e-05, "normalization": "RMSNorm", "num_attention_heads": 8,
    "num_experts": 16, "num_hidden_layers": 80, "num_key_value_heads": 2, "num_query_groups": 2,
    "pad_token_id": 0, "partial_rotary_factor": 0.5, "residual_in_fp32": True,
    "rope_scaling": False, "rope_theta": 5000000, "scale_residual_merge": True,
    "sliding_window": None, "vocab_size": 262272, "zaya_mlp_expansion": 256,
    "zaya_use_eda": True, "zaya_use_mod": True,
}  # fmt: skip


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in meta_model(config).state_dict().items()}


def drawn(seed: int) -> ModelConfig:
    """Some configuration within the model's rules."""
    draw = random.Random(seed)
    kv_heads = draw.choice([1, 2, 3])
    return ModelConfig(
        vocab_size=draw.randrange(20, 90),
        num_layers=draw.randrange(1, 5),
        hidden_size=draw.randrange(8, 40),
        num_query_heads=kv_heads * draw.choice([1, 2, 4]),
        num_kv_heads=kv_heads,
        head_dim=draw.choice([4, 8, 12]),
        num_experts=draw.randrange(1, 7),
        expert_ffn_size=draw.randrange(4, 20),
        router_size=draw.randrange(4, 20),
        conv_depthwise_taps=draw.randrange(1, 4),
        conv_grouped_taps=draw.randrange(1, 4),
        rope_base=draw.choice([1e4, 1e6, 5e6]),
        rope_fraction=draw.choice([0.5, 1.0]),
        max_context_tokens=draw.choice([128, 4096]),
        norm_eps=draw.choice([1e-5, 1e-6]),
        init_std=draw.choice([0.02, 0.01]),
        skip_output="zero",
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the receipt, which also says what was cast."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != RECEIPT}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(6))
def test_native_to_legacy_and_back_is_bitwise(
    seed: int, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odd seeds in several files with an index, even ones in one."""
    if seed % 2:
        monkeypatch.setattr(convert, "_SHARD_BYTES", 5000)
    to_hf(random_model(drawn(seed), seed), tmp_path / "native", Form(dtype=dtype))
    first = from_hf(tmp_path / "native", dtype)
    to_hf(first, tmp_path / "legacy", Form(layout="legacy"))
    second = from_hf(tmp_path / "legacy", dtype)
    assert replace(second.config, skip_output="zero") == first.config == drawn(seed)
    to_hf(second, tmp_path / "again")
    to_hf(from_hf(tmp_path / "again", dtype), tmp_path / "and back", Form(layout="legacy"))
    assert contents(tmp_path / "native") == contents(tmp_path / "again")
    assert contents(tmp_path / "legacy") == contents(tmp_path / "and back")
    files = len(list((tmp_path / "legacy").glob("*.safetensors")))
    assert files > 2 if seed % 2 else files == 1
    assert (tmp_path / "legacy" / "model.safetensors.index.json").is_file() == bool(seed % 2)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_legacy_folder_computes_what_our_model_does(name: str, tmp_path: Path) -> None:
    """By a forward pass from its tensors that knows nothing of our names."""
    config = replace(VARIANTS[name], skip_output="identity")
    model = random_model(config, seed=len(name))
    with torch.no_grad():
        for label, buffer in model.named_buffers():
            if "balancing_bias" in label:
                # Near the middle of the probabilities, so that some tokens are skipped.
                buffer[-1] += 1.0
    to_hf(model, tmp_path / "legacy", Form(layout="legacy"))
    tensors = load_file(tmp_path / "legacy" / "model.safetensors")
    settings = json.loads((tmp_path / "legacy" / "config.json").read_text("utf-8"))
    tokens = random_tokens(config, 1, 23)
    with torch.no_grad():
        found = model.logits(tokens)[0]
    expected = legacy_logits(tensors, settings, tokens[0])
    assert float((found - expected).abs().max()) <= 2e-5
    assert float(expected.std()) > 0.05


def test_the_published_model_has_the_tensors_and_values_of_its_index() -> None:
    """model.safetensors.index.json of Zyphra/ZAYA1-8B: 2,483 tensors, 17,680,978,928 bytes, all
    bf16 (docs/decisions/0014)."""
    shapes = shapes_of(ZAYA1_8B)
    names = tensor_names(shapes, ZAYA1_8B, "legacy").values()
    theirs = [name for n in names for name in n.theirs]
    values = sum(len(n.theirs) * torch.Size(n.their_shape).numel() for n in names)
    assert (len(theirs), len(set(theirs)), 2 * values) == (2483, 2483, 17_680_978_928)
    layers = [[n for n in theirs if n.startswith(f"model.layers.{i}.")] for i in range(80)]
    assert [len(layer) for layer in layers] == [13, 46, *[15, 47] * 39]


def test_the_published_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    config = config_from_hf(tmp_path)
    assert config == replace(
        ZAYA1_8B, rope_base=5e6, max_context_tokens=131_072, skip_output="identity"
    )
    written = config_to_hf(config, "legacy")
    assert {key: written.get(key, PUBLISHED[key]) for key in PUBLISHED} == PUBLISHED


def test_the_head_count_of_earlier_files_is_read(tmp_path: Path) -> None:
    """There num_attention_heads is the count before compression, and gives the heads' width."""
    older = PUBLISHED | {"num_attention_heads": 16, "cca_num_q_heads": 8}
    for key in ("head_dim", "kv_channels"):
        del older[key]
    (tmp_path / "config.json").write_text(json.dumps(older), encoding="utf-8")
    config = config_from_hf(tmp_path)
    assert (config.num_query_heads, config.head_dim) == (8, 128)


@pytest.mark.parametrize("name", VARIANTS)
def test_legacy_configurations_come_back(name: str, tmp_path: Path) -> None:
    config = replace(VARIANTS[name], skip_output="identity")
    text = json.dumps(config_to_hf(config, "legacy"))
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    assert config_from_hf(tmp_path) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 79}, "num_hidden_layers: 79 is odd"),
        ({"ffn_hidden_size": 4095}, "ffn_hidden_size: 4095 is odd"),
        ({"ffn_hidden_size": "x"}, "ffn_hidden_size: expected int, got str"),
        ({"zaya_mlp_expansion": [0, 256]}, "zaya_mlp_expansion: expected int, got list"),
        ({"zaya_layers": ["a", 16]}, "zaya_layers: a value for every layer"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is .*, none is supported"),
        ({"swa_layers": [0, 4096]}, "swa_layers: sliding windows"),
        ({"num_query_groups": 4}, "num_query_groups is 4, num_key_value_heads 2"),
        ({"kv_channels": 64}, "kv_channels is 64, head_dim 128"),
        ({"zaya_use_mod": False}, "zaya_use_mod is False, only True"),
        ({"zaya_use_eda": False}, "zaya_use_eda is False, only True"),
        ({"normalization": "LayerNorm"}, "normalization is 'LayerNorm'"),
        ({"clamp_temp": True}, "clamp_temp is True"),
        ({"partial_rotary_factor": 0.3}, r"partial_rotary_factor: 0\.3 of head_dim 128"),
        ({"num_attention_heads": 5}, "num_attention_heads: 5 is not a multiple"),
        (
            {"moe_intermediate_size": 2048},
            "has moe_intermediate_size of the native layout and ffn_hidden_size of the legacy",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_legacy_configurations_this_model_lacks_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | changes), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"config\.json: .*{message}"):
        config_from_hf(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_tells_its_layout(layout: Layout, tmp_path: Path) -> None:
    to_hf(random_model(MODEL), tmp_path / "model", Form(layout=layout))
    assert folder_layout(tmp_path / "model") == layout
    receipt = json.loads((tmp_path / "model" / RECEIPT).read_text("utf-8"))
    assert receipt["layout"] == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_the_other_layout_are_named(layout: Layout, tmp_path: Path) -> None:
    for each in LAYOUTS:
        to_hf(random_model(MODEL), tmp_path / each, Form(layout=each))
    other = LAYOUTS[1 - LAYOUTS.index(layout)]
    settings = (tmp_path / other / "config.json").read_text("utf-8")
    (tmp_path / layout / "config.json").write_text(settings, encoding="utf-8")
    said = f"is of the {other} layout, but tensor model.* is one of the {layout} layout"
    with pytest.raises(CheckpointError, match=said):
        from_hf(tmp_path / layout)


def test_one_tensor_of_the_other_layout_is_named(tmp_path: Path) -> None:
    to_hf(random_model(MODEL), tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    name = "model.layers.3.zaya_block.router.router_mlp.4.weight"
    save_file(load_file(file) | {name: torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor {name} is one of the legacy layout"):
        from_hf(tmp_path / "model")


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    to_hf(random_model(MODEL), tmp_path / "model", Form(layout="legacy"))
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.3.zaya_block.experts.local_experts.2.linear_fc2.weight"
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        from_hf(tmp_path / "model")


def test_a_tensor_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    to_hf(random_model(MODEL), tmp_path / "model")
    norm = {"model.norm.weight": torch.ones(32)}
    save_file(norm, tmp_path / "model" / "more.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"more\.safetensors: holds model\.norm\.weight"):
        from_hf(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("model.embed_tokens.weight", None),
        ("model.layers.7.self_attn.o_proj.weight", None),
        ("model.layers.7.anything", None),
        ("model.norm.weight", "native"),
        ("model.layers.39.post_mlp_residual_scale.residual_bias", "native"),
        ("model.final_norm.weight", "legacy"),
        ("model.res_scale.residual_bias", "legacy"),
        ("model.layers.78.res_scale.residual_bias", "legacy"),
        ("model.layers.79.zaya_block.experts.local_experts.15.linear_fc1.weight", "legacy"),
    ],
)
def test_names_that_one_layout_alone_has(name: str, layout: Layout | None) -> None:
    assert layout_of_name(name) == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_accounted_for(layout: Layout, tmp_path: Path) -> None:
    model = random_model(MODEL)
    form = Form(layout=layout, dtype=torch.bfloat16)
    to_hf(model, tmp_path / "model", form)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    keys = json.loads((tmp_path / "model" / RECEIPT).read_text("utf-8"))["keys"]
    state = model.state_dict()
    assert {e["ours"]: e["sha256"] for e in keys["tensors"]} == {
        name: content_sha256(tensor) for name, tensor in state.items()
    }
    parts = {part["name"]: part for entry in keys["tensors"] for part in entry["theirs"]}
    assert {n: (p["sha256"], p["shape"], p["dtype"]) for n, p in parts.items()} == {
        n: (content_sha256(t), list(t.shape), str(t.dtype)[6:]) for n, t in stored.items()
    }
    values = sum(t.numel() for t in state.values())
    assert keys["totals"] == {
        "ours": len(state),
        "theirs": len(stored),
        "parameters": values - 10,
        "buffers": 10,
        "values": values,
        "bytes": 2 * values + 2 * 10,
    }
    changes = {entry["ours"]: entry["changes"] for entry in keys["tensors"]}
    split = ["split along its first dimension into 4"] if layout == "legacy" else []
    assert changes["layers.1.moe.experts.down"] == ["cast float32 to bfloat16", *split]
    assert changes["layers.1.moe.router.balancing_bias"] == []
    assert changes["layers.0.attention.conv_grouped"][1].startswith("reshape [")


def test_what_does_not_read_back_is_no_export(tmp_path: Path) -> None:
    names = list(tensor_names({"norm.weight": (3,)}, MODEL).values())
    file = tmp_path / "model.safetensors"
    save_file({"model.norm.weight": torch.ones(3)}, file)
    given = {"model.norm.weight": torch.tensor([1.0, 1.0, 1.0 + 2**-23])}
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight does not read back"):
        account(names, {"norm.weight": torch.ones(3)}, given, {"model.norm.weight": file})


def test_a_tensor_without_a_place_is_no_export(tmp_path: Path) -> None:
    names = list(tensor_names({"norm.weight": (3,)}, MODEL).values())
    file = tmp_path / "model.safetensors"
    stored: dict[str, Tensor] = {"model.norm.weight": torch.ones(3), "extra": torch.ones(1)}
    save_file(stored, file)
    with pytest.raises(CheckpointError, match="1 tensors of 3 values became 2 of 4"):
        account(names, {"norm.weight": torch.ones(3)}, stored, dict.fromkeys(stored, file))
