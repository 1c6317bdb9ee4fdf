"""A whole run in miniature, as plain dictionaries that tests change key by key."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from zaya_train.config.build import build
from zaya_train.config.schema import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL: dict[str, Any] = {
    "vocab_size": 264,
    "num_layers": 2,
    "hidden_size": 16,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "num_experts": 3,
    "expert_ffn_size": 8,
    "router_size": 8,
    "max_context_tokens": 256,
}

PHASE: dict[str, Any] = {
    "tokens": 8 * 4 * 64,
    "context_tokens": 64,
    "rope_base": 1e4,
    "global_batch_tokens": 4 * 64,
    "mixture": {"problems": 1.0},
    "schedule": {"kind": "wsd", "warmup_tokens": 256, "decay_tokens": 512},
}

RUN: dict[str, Any] = {
    "run": {"name": "tiny", "dir": "run", "seed": 3},
    "model": MODEL,
    "plan": {
        "phases": {
            "short": PHASE,
            "long": {
                **PHASE,
                "tokens": 5 * 2 * 128,
                "context_tokens": 128,
                "rope_base": 1e5,
                "global_batch_tokens": 2 * 128,
                "context_parallel": 2,
                "schedule": {"kind": "cosine"},
            },
        }
    },
    "data": {
        "sources": {"problems": {"path": "corpus/train"}},
        "validation": {"problems": {"path": "corpus/heldout"}},
        "validation_sequences": 3,
    },
    "optim": {
        "muon": {"learning_rate": 0.02, "newton_schulz_dtype": "fp32"},
        "adamw": {"learning_rate": 0.01, "weight_decay": 0.1},
        "balancing": {"learning_rate": 0.01},
    },
    "precision": {"compute_dtype": "fp32"},
    "checkpoint": {"every_steps": 3, "retry_seconds": 0.3},
    "logging": {
        "eval_every_steps": 4,
        "wandb": "disabled",
        "tensorboard": False,
        "progress": False,
    },
    "runtime": {"device": "cpu", "threads": 1},
}

DELETED = object()
"""Value of a change that takes the key away."""


def changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested dictionaries with dotted keys set (or DELETED)."""
    result = deepcopy(dict(values))
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is DELETED:
            del node[leaf]
        else:
            node[leaf] = value
    return result


def tiny(changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """The typed miniature run with dotted keys changed; two ranks, or one with
    `parallel.context_parallel_limit` 1."""
    return build(TrainConfig, changed(RUN, changes or {}))
