"""The one table that names every tensor on both sides, in both layouts of the format.

native: transformers' `zaya`, a layer holds its attention and its MoE block. legacy: Zyphra's
original, where they are layers of their own (2i and 2i + 1) and a residual scaling belongs to the
layer that it comes before; experts are tensors of their own (docs/decisions/0014). Reshapes and
splits are lossless.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

from zaya_train.config.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_train.config.schema import ModelConfig

Layout = Literal["native", "legacy"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_NATIVE = {
    "embedding": "model.embed_tokens.weight",
    "embedding_scale": "model.input_hidden_states_scale",
    "embedding_bias": "model.input_hidden_states_bias",
    "norm.weight": "model.norm.weight",
    "attention_norm.weight": "{layer}.input_layernorm.weight",
    "attention.q_proj": "{layer}.self_attn.qkv_proj.q_proj.weight",
    "attention.k_proj": "{layer}.self_attn.qkv_proj.k_proj.weight",
    "attention.v_now_proj": "{layer}.self_attn.qkv_proj.v_proj_current.weight",
    "attention.v_delayed_proj": "{layer}.self_attn.qkv_proj.v_proj_delayed.weight",
    "attention.conv_depthwise": "{layer}.self_attn.qkv_proj.conv_qk_depthwise.weight",
    "attention.conv_depthwise_bias": "{layer}.self_attn.qkv_proj.conv_qk_depthwise.bias",
    "attention.conv_grouped": "{layer}.self_attn.qkv_proj.conv_qk_grouped.weight",
    "attention.conv_grouped_bias": "{layer}.self_attn.qkv_proj.conv_qk_grouped.bias",
    "attention.temperature": "{layer}.self_attn.qk_norm.temp",
    "attention.out_proj": "{layer}.self_attn.o_proj.weight",
    "attention_residual.stream_scale": "{layer}.post_attention_residual_scale.residual_scale",
    "attention_residual.stream_bias": "{layer}.post_attention_residual_scale.residual_bias",
    "attention_residual.branch_scale": "{layer}.post_attention_residual_scale.hidden_states_scale",
    "attention_residual.branch_bias": "{layer}.post_attention_residual_scale.hidden_states_bias",
    "moe_norm.weight": "{layer}.post_attention_layernorm.weight",
    "moe.router.down": "{layer}.mlp.gate.down_proj.weight",
    "moe.router.down_bias": "{layer}.mlp.gate.down_proj.bias",
    "moe.router.depth_scale": "{layer}.mlp.gate.router_states_scale",
    "moe.router.norm": "{layer}.mlp.gate.router_mlp.norm.weight",
    "moe.router.fc1": "{layer}.mlp.gate.router_mlp.fc1.weight",
    "moe.router.fc1_bias": "{layer}.mlp.gate.router_mlp.fc1.bias",
    "moe.router.fc2": "{layer}.mlp.gate.router_mlp.fc2.weight",
    "moe.router.fc2_bias": "{layer}.mlp.gate.router_mlp.fc2.bias",
    "moe.router.out": "{layer}.mlp.gate.router_mlp.out_proj.weight",
    "moe.router.balancing_bias": "{layer}.mlp.gate.balancing_biases",
    "moe.experts.gate_up": "{layer}.mlp.experts.gate_up_proj",
    "moe.experts.down": "{layer}.mlp.experts.down_proj",
    "moe_residual.stream_scale": "{layer}.post_mlp_residual_scale.residual_scale",
    "moe_residual.stream_bias": "{layer}.post_mlp_residual_scale.residual_bias",
    "moe_residual.branch_scale": "{layer}.post_mlp_residual_scale.hidden_states_scale",
    "moe_residual.branch_bias": "{layer}.post_mlp_residual_scale.hidden_states_bias",
}
"""Our name, without its layer -> theirs."""

_LEGACY = {
    "embedding": "model.embed_tokens.weight",
    "embedding_scale": "model.layers.0.res_scale.hidden_states_scale",
    "embedding_bias": "model.layers.0.res_scale.hidden_states_bias",
    "norm.weight": "model.final_norm.weight",
    "attention_norm.weight": "{attention}.input_norm.weight",
    "attention.q_proj": "{attention}.self_attn.qkv.linear_q.weight",
    "attention.k_proj": "{attention}.self_attn.qkv.linear_k.weight",
    "attention.v_now_proj": "{attention}.self_attn.qkv.val_proj1.weight",
    "attention.v_delayed_proj": "{attention}.self_attn.qkv.val_proj2.weight",
    "attention.conv_depthwise": "{attention}.self_attn.qkv.conv_qk.0.weight",
    "attention.conv_depthwise_bias": "{attention}.self_attn.qkv.conv_qk.0.bias",
    "attention.conv_grouped": "{attention}.self_attn.qkv.conv_qk.1.weight",
    "attention.conv_grouped_bias": "{attention}.self_attn.qkv.conv_qk.1.bias",
    "attention.temperature": "{attention}.self_attn.qkv.temp",
    "attention.out_proj": "{attention}.self_attn.o_proj.weight",
    "attention_residual.stream_scale": "{moe}.res_scale.residual_scale",
    "attention_residual.stream_bias": "{moe}.res_scale.residual_bias",
    "attention_residual.branch_scale": "{moe}.res_scale.hidden_states_scale",
    "attention_residual.branch_bias": "{moe}.res_scale.hidden_states_bias",
    "moe_norm.weight": "{moe}.input_norm.weight",
    "moe.router.down": "{moe}.zaya_block.router.down_proj.weight",
    "moe.router.down_bias": "{moe}.zaya_block.router.down_proj.bias",
    "moe.router.depth_scale": "{moe}.zaya_block.router.router_states_scale",
    "moe.router.norm": "{moe}.zaya_block.router.rmsnorm_eda.weight",
    "moe.router.fc1": "{moe}.zaya_block.router.router_mlp.0.weight",
    "moe.router.fc1_bias": "{moe}.zaya_block.router.router_mlp.0.bias",
    "moe.router.fc2": "{moe}.zaya_block.router.router_mlp.2.weight",
    "moe.router.fc2_bias": "{moe}.zaya_block.router.router_mlp.2.bias",
    "moe.router.out": "{moe}.zaya_block.router.router_mlp.4.weight",
    "moe.router.balancing_bias": "{moe}.zaya_block.router.balancing_biases",
    "moe.experts.gate_up": "{moe}.zaya_block.experts.local_experts.{expert}.linear_fc1.weight",
    "moe.experts.down": "{moe}.zaya_block.experts.local_experts.{expert}.linear_fc2.weight",
    "moe_residual.stream_scale": "{next}.res_scale.residual_scale",
    "moe_residual.stream_bias": "{next}.res_scale.residual_bias",
    "moe_residual.branch_scale": "{next}.res_scale.hidden_states_scale",
    "moe_residual.branch_bias": "{next}.res_scale.hidden_states_bias",
}
"""`next` is the attention layer that follows; after the last one the model itself."""

_TABLES = {"native": _NATIVE, "legacy": _LEGACY}


@dataclass(frozen=True)
class TensorName:
    """One tensor of ours under both names and in both shapes."""

    ours: str
    theirs: tuple[str, ...]
    """One name, or one for each index of the first dimension."""
    our_shape: tuple[int, ...]
    their_shape: tuple[int, ...]
    """Of each of theirs."""


def _their_shape(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """Conv1d weights are [out, in / groups, taps] in transformers."""
    heads = config.num_query_heads + config.num_kv_heads
    channels = heads * config.head_dim
    if name.endswith("attention.conv_depthwise"):
        return (channels, 1, config.conv_depthwise_taps)
    if name.endswith("attention.conv_grouped"):
        return (channels, config.head_dim, config.conv_grouped_taps)
    return shape


def tensor_names(
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig, layout: Layout = "native"
) -> dict[str, TensorName]:
    """Our name -> both names and shapes, for every tensor in `shapes` (our names).

    CheckpointError names a tensor that the table does not know: nothing is exported by guess.
    """
    table = {}
    for ours, shape in shapes.items():
        layer, leaf = _parts(ours)
        pattern = _TABLES[layout].get(leaf)
        if pattern is None or ("{" in pattern) != (layer is not None):
            raise CheckpointError(f"tensor {ours} has no name in the {layout} `zaya` layout")
        places = _places(layer or 0, config.num_layers)
        if "{expert}" in pattern:
            names = tuple(pattern.format(**places, expert=e) for e in range(shape[0]))
            table[ours] = TensorName(ours, names, shape, shape[1:])
        else:
            theirs = _their_shape(ours, shape, config)
            table[ours] = TensorName(ours, (pattern.format(**places),), shape, theirs)
    return table


def _parts(ours: str) -> tuple[int | None, str]:
    """The layer in our name of a tensor, None without one, and the rest."""
    found = re.fullmatch(r"layers\.(\d+)\.(.+)", ours)
    return (int(found[1]), found[2]) if found else (None, ours)


def _places(layer: int, num_layers: int) -> dict[str, str]:
    """What stands for the layer in the patterns of either table."""
    following = f"model.layers.{2 * layer + 2}" if layer + 1 < num_layers else "model"
    return {
        "layer": f"model.layers.{layer}",
        "attention": f"model.layers.{2 * layer}",
        "moe": f"model.layers.{2 * layer + 1}",
        "next": following,
    }


def layout_of_name(theirs: str) -> Layout | None:
    """The layout that alone has such a name; None for names of both or of neither."""
    shape = _without_numbers(theirs)
    found = [layout for layout in LAYOUTS if shape in _name_shapes(layout)]
    return found[0] if len(found) == 1 else None


@cache
def _name_shapes(layout: Layout) -> frozenset[str]:
    """Every name of a layout with # for its numbers, the last layer's among them."""
    places = [_places(1, 1), _places(1, 3)]
    return frozenset(
        _without_numbers(pattern.format(**place, expert=0))
        for pattern in _TABLES[layout].values()
        for place in places
    )


def _without_numbers(name: str) -> str:
    return re.sub(r"\b\d+\b", "#", name)


def check_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> None:
    """Every expected tensor present in its shape and nothing besides, else CheckpointError naming
    the first few offenders."""
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} is {list(found[name])}, should be {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = []
    for label, names in (("missing", missing), ("unexpected", surplus), ("shape", shapes)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            problems.append(f"{label}: {', '.join(names[:3])}{more}")
    if problems:
        raise CheckpointError("tensors do not match the model: " + "; ".join(problems))
