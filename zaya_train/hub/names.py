"""The one table that names every tensor on both sides.

Ours on the left, transformers' `zaya` on the right; `{i}` is the layer. Reshapes are lossless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zaya_train.config.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_train.config.schema import ModelConfig

_GLOBAL = {
    "embedding": "model.embed_tokens.weight",
    "embedding_scale": "model.input_hidden_states_scale",
    "embedding_bias": "model.input_hidden_states_bias",
    "norm.weight": "model.norm.weight",
}

_LAYER = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention.q_proj": "self_attn.qkv_proj.q_proj.weight",
    "attention.k_proj": "self_attn.qkv_proj.k_proj.weight",
    "attention.v_now_proj": "self_attn.qkv_proj.v_proj_current.weight",
    "attention.v_delayed_proj": "self_attn.qkv_proj.v_proj_delayed.weight",
    "attention.conv_depthwise": "self_attn.qkv_proj.conv_qk_depthwise.weight",
    "attention.conv_depthwise_bias": "self_attn.qkv_proj.conv_qk_depthwise.bias",
    "attention.conv_grouped": "self_attn.qkv_proj.conv_qk_grouped.weight",
    "attention.conv_grouped_bias": "self_attn.qkv_proj.conv_qk_grouped.bias",
    "attention.temperature": "self_attn.qk_norm.temp",
    "attention.out_proj": "self_attn.o_proj.weight",
    "attention_residual.stream_scale": "post_attention_residual_scale.residual_scale",
    "attention_residual.stream_bias": "post_attention_residual_scale.residual_bias",
    "attention_residual.branch_scale": "post_attention_residual_scale.hidden_states_scale",
    "attention_residual.branch_bias": "post_attention_residual_scale.hidden_states_bias",
    "moe_norm.weight": "post_attention_layernorm.weight",
    "moe.router.down": "mlp.gate.down_proj.weight",
    "moe.router.down_bias": "mlp.gate.down_proj.bias",
    "moe.router.depth_scale": "mlp.gate.router_states_scale",
    "moe.router.norm": "mlp.gate.router_mlp.norm.weight",
    "moe.router.fc1": "mlp.gate.router_mlp.fc1.weight",
    "moe.router.fc1_bias": "mlp.gate.router_mlp.fc1.bias",
    "moe.router.fc2": "mlp.gate.router_mlp.fc2.weight",
    "moe.router.fc2_bias": "mlp.gate.router_mlp.fc2.bias",
    "moe.router.out": "mlp.gate.router_mlp.out_proj.weight",
    "moe.router.balancing_bias": "mlp.gate.balancing_biases",
    "moe.experts.gate_up": "mlp.experts.gate_up_proj",
    "moe.experts.down": "mlp.experts.down_proj",
    "moe_residual.stream_scale": "post_mlp_residual_scale.residual_scale",
    "moe_residual.stream_bias": "post_mlp_residual_scale.residual_bias",
    "moe_residual.branch_scale": "post_mlp_residual_scale.hidden_states_scale",
    "moe_residual.branch_bias": "post_mlp_residual_scale.hidden_states_bias",
}


@dataclass(frozen=True)
class TensorName:
    """One tensor under both names and in both shapes."""

    ours: str
    theirs: str
    our_shape: tuple[int, ...]
    their_shape: tuple[int, ...]


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
    shapes: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> dict[str, TensorName]:
    """Our name -> both names and shapes, for every tensor in `shapes` (our names).

    CheckpointError names a tensor that the table does not know: nothing is exported by guess.
    """
    table = {}
    for ours, shape in shapes.items():
        theirs = _GLOBAL.get(ours)
        if theirs is None and ours.startswith("layers."):
            _, layer, leaf = ours.split(".", 2)
            if leaf in _LAYER:
                theirs = f"model.layers.{layer}.{_LAYER[leaf]}"
        if theirs is None:
            raise CheckpointError(f"tensor {ours} has no name in transformers' `zaya`")
        table[ours] = TensorName(ours, theirs, shape, _their_shape(ours, shape, config))
    return table


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
