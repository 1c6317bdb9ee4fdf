"""config.json of Zyphra's original layout: attention and MoE blocks counted as layers of their own.

Keys as in the published ZAYA1-8B file and in Zyphra's fork of transformers; where from:
docs/decisions/0014.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import CheckpointError
from zaya_train.hub.dialect import Dialect

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from zaya_train.config.schema import ModelConfig

_SAME = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_query_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "num_experts": "num_experts",
    "router_size": "zaya_mlp_expansion",
    "conv_depthwise_taps": "cca_time0",
    "conv_grouped_taps": "cca_time1",
    "max_context_tokens": "max_position_embeddings",
    "norm_eps": "norm_epsilon",
    "rope_base": "rope_theta",
    "rope_fraction": "partial_rotary_factor",
    "init_std": "initializer_range",
}

_PLACES = {
    "num_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "expert_ffn_size": "ffn_hidden_size",
}

_DEFAULTS = {
    # Of the fork's ZayaConfig, with the head count as later files give it.
    "vocab_size": 262_272,
    "hidden_size": 2048,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 16,
    "zaya_mlp_expansion": 256,
    "cca_time0": 2,
    "cca_time1": 2,
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.02,
}

_FIXED = {
    "activation_func": "swiglu",
    "add_bias_linear": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "cca": True,
    "clamp_temp": False,
    "gated_linear_unit": True,
    "lm_head_bias": False,
    "moe_router_topk": 1,
    "normalization": "RMSNorm",
    "scale_residual_merge": True,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "zaya_use_eda": True,
    "zaya_use_mod": True,
}

_PER_LAYER = ("zaya_layers", "ffn_hidden_size_list", "num_query_groups_list", "smoe_layers")
"""Keys of the oldest files, which give a value for every layer."""


def _write(config: ModelConfig) -> dict[str, Any]:
    return {
        "num_hidden_layers": 2 * config.num_layers,
        "num_query_groups": config.num_kv_heads,
        "head_dim": config.head_dim,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": 2 * config.expert_ffn_size,
        "residual_in_fp32": True,
        "rope_scaling": False,
        "use_cache": True,
    }


def _read(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    for key in _PER_LAYER:
        if raw.get(key) is not None:
            raise CheckpointError(
                f"{path}: {key}: a value for every layer, as the oldest files have; only one for "
                "all is supported"
            )
    if raw.get("rope_scaling"):
        raise CheckpointError(f"{path}: rope_scaling is {raw['rope_scaling']!r}, none is supported")
    if any(raw.get("swa_layers") or ()):
        raise CheckpointError(f"{path}: swa_layers: sliding windows are not supported")
    for older, newer in (("num_query_groups", "num_key_value_heads"), ("kv_channels", "head_dim")):
        value = raw.get(older)
        if value is not None and value != raw.get(newer, value):
            raise CheckpointError(
                f"{path}: {older} is {value!r}, {newer} {raw[newer]!r}; they must be equal"
            )
    values = {
        "num_layers": _half(path, raw, "num_hidden_layers", 80),
        "expert_ffn_size": _half(path, raw, "ffn_hidden_size", 4096),
        "head_dim": raw.get("head_dim", raw.get("kv_channels", 128)),
    }
    if raw.get("cca_num_q_heads") is not None:
        # Before head_dim was written, num_attention_heads was the count without compression.
        values["num_query_heads"] = raw["cca_num_q_heads"]
        values["head_dim"] = raw.get("head_dim", raw.get("kv_channels", _uncompressed(raw)))
    return values


def _half(path: Path, raw: Mapping[str, Any], key: str, default: int) -> object:
    """A count that the file gives twice over; what is no number goes to the typed check."""
    value = raw.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if value % 2:
        raise CheckpointError(f"{path}: {key}: {value} is odd; the legacy layout counts in pairs")
    return value // 2


def _uncompressed(raw: Mapping[str, Any]) -> object:
    heads, hidden = raw.get("num_attention_heads", 16), raw.get("hidden_size", 2048)
    whole = isinstance(heads, int) and isinstance(hidden, int) and heads > 0
    return hidden // heads if whole else heads


LEGACY = Dialect(
    marks=("ffn_hidden_size", "norm_epsilon", "zaya_mlp_expansion"),
    same=_SAME,
    places=_PLACES,
    fixed=_FIXED,
    defaults=_DEFAULTS,
    write=_write,
    read=_read,
    # The original code hands a skipped token its own normalised input.
    skip_output="identity",
)
