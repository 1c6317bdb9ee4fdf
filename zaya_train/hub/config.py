"""Model configuration to and from a `zaya` config.json of either layout."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from zaya_train.config.build import build, to_dict
from zaya_train.config.check import model_problems
from zaya_train.config.diff import model_differences
from zaya_train.config.errors import CheckpointError, ConfigError
from zaya_train.config.schema import ModelConfig
from zaya_train.hub.dialect import Dialect
from zaya_train.hub.legacy_config import LEGACY

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from zaya_train.hub.names import Layout

_SAME = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_query_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_experts",
    "expert_ffn_size": "moe_intermediate_size",
    "router_size": "router_hidden_size",
    "conv_depthwise_taps": "cca_time0",
    "conv_grouped_taps": "cca_time1",
    "max_context_tokens": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "init_std": "initializer_range",
}

_PLACES = {
    "rope_base": "rope_parameters.hybrid.rope_theta",
    "rope_fraction": "rope_parameters.hybrid.partial_rotary_factor",
}

_DEFAULTS = {
    # transformers.ZayaConfig's defaults, for files that leave keys out.
    "vocab_size": 262_272,
    "hidden_size": 2048,
    "num_hidden_layers": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_experts": 16,
    "moe_intermediate_size": 2048,
    "router_hidden_size": 256,
    "cca_time0": 2,
    "cca_time1": 2,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
}

_FIXED = {
    # Variants of the `zaya` class that ZAYA1 does not use and this model does not have.
    "attention_bias": False,
    "lm_head_bias": False,
    "tie_word_embeddings": True,
    "num_experts_per_tok": 1,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
}


_UNSAID = frozenset({"skip_output"})
"""The format does not say what a skipped token receives."""


def require_same_model(folder: Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    """CheckpointError naming each field in which the folder's model is not the configured one."""
    differing = model_differences(to_dict(theirs), to_dict(ours), _UNSAID)
    if differing:
        raise CheckpointError(f"{folder}: of another model: {', '.join(differing)}")


def _write(config: ModelConfig) -> dict[str, Any]:
    rope = {
        "rope_type": "default",
        "rope_theta": config.rope_base,
        "partial_rotary_factor": config.rope_fraction,
    }
    return {
        "layer_types": ["hybrid"] * config.num_layers,
        "rope_parameters": {"hybrid": rope},
        "use_cache": True,
    }


def _read_rest(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "hybrid" for kind in kinds):
        raise CheckpointError(f"{path}: layer_types is {kinds!r}, only 'hybrid' is supported")
    base, fraction = _rope(path, raw.get("rope_parameters"))
    return {"rope_base": base, "rope_fraction": fraction}


NATIVE = Dialect(
    marks=("moe_intermediate_size", "rms_norm_eps", "router_hidden_size", "rope_parameters"),
    same=_SAME,
    places=_PLACES,
    fixed=_FIXED,
    defaults=_DEFAULTS,
    write=_write,
    read=_read_rest,
    # What merged transformers computes for a skipped token.
    skip_output="zero",
)
DIALECTS: dict[Layout, Dialect] = {"native": NATIVE, "legacy": LEGACY}


def config_to_hf(config: ModelConfig, layout: Layout = "native") -> dict[str, Any]:
    """Contents of config.json; CheckpointError where the format cannot express the model."""
    if not config.skip_class:
        raise CheckpointError(
            "model.skip_class=false cannot be exported: `zaya` always scores "
            f"{config.num_experts} + 1 classes and the extra logit would enter the softmax"
        )
    dialect = DIALECTS[layout]
    result: dict[str, Any] = {
        theirs: getattr(config, ours) for ours, theirs in dialect.same.items()
    }
    named = {"architectures": ["ZayaForCausalLM"], "model_type": "zaya"}
    return result | dict(dialect.fixed) | named | dialect.write(config)


def config_from_hf(folder: Path) -> ModelConfig:
    """ModelConfig of a `zaya` folder of either layout.

    Raises:
        CheckpointError: no such file, no `zaya` model, or a key of a wrong type, with a value that
            cannot be, or that this model cannot honour; names file and key.
    """
    path = folder / "config.json"
    raw = read_config(folder)
    dialect = DIALECTS[config_layout(path, raw)]
    for key, value in dialect.fixed.items():
        if raw.get(key, value) != value:
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}, only {value!r} is supported")
    values = {ours: raw.get(key, dialect.defaults[key]) for ours, key in dialect.same.items()}
    values |= dialect.read(path, raw)
    values["skip_output"] = dialect.skip_output
    try:
        config = build(ModelConfig, values, "model")
    except ConfigError as error:
        raise CheckpointError(f"{path}: {_in_their_terms(str(error), dialect)}") from error
    for problem in model_problems(config):
        raise CheckpointError(f"{path}: {_in_their_terms(problem, dialect)}")
    return config


def config_layout(path: Path, raw: Mapping[str, Any]) -> Layout:
    """The layout that a config.json's keys belong to; native where no key tells.

    CheckpointError names a key of each where there are keys of both.
    """
    marks = {
        layout: next((key for key in dialect.marks if key in raw), None)
        for layout, dialect in DIALECTS.items()
    }
    if marks["native"] and marks["legacy"]:
        raise CheckpointError(
            f"{path}: has {marks['native']} of the native layout and {marks['legacy']} of the "
            "legacy one; a folder must be of one of them"
        )
    return "legacy" if marks["legacy"] else "native"


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of a `zaya` folder's config.json; CheckpointError where it is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a Hugging Face `zaya` folder")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(raw).__name__}")
    if raw.get("model_type") != "zaya":
        raise CheckpointError(f"{path}: model_type is {raw.get('model_type')!r}, expected 'zaya'")
    return raw


def _in_their_terms(message: str, dialect: Dialect) -> str:
    """A message about `model.KEY` with the keys of config.json."""
    theirs = {**dialect.same, **dialect.places}
    return re.sub(r"model\.(\w+)", lambda found: theirs.get(found[1], found[0]), message)


def _rope(path: Path, parameters: object) -> tuple[object, object]:
    """(base, rotated fraction) as they stand there, with transformers' defaults for what is left
    out."""
    if parameters is None:
        return 5_000_000.0, 0.5
    rope = parameters.get("hybrid") if isinstance(parameters, dict) else None
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        raise CheckpointError(f"{path}: rope_parameters has no rope_theta under 'hybrid'")
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise CheckpointError(f"{path}: rope_type {kind!r}, only 'default' is supported")
    return rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)
