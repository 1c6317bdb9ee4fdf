"""What every configuration key decides: the numbers, how fast they come, or neither.

math: another value may give another loss curve. speed: the same sums in another order or place, so
the same curve to rounding, and for some keys (EXACT) to the bit. io: what is read from where,
written, shown and waited for; contents that are read are compared by their hashes, not by key.

Precisions are math: bf16 follows another curve than fp32, not the same one to fp32's rounding.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from zaya_train.config.build import to_dict
from zaya_train.config.diff import ABSENT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from zaya_train.config.schema import TrainConfig

Kind = Literal["math", "speed", "io"]

TAGS: dict[str, dict[Kind, str]] = {
    "run": {"math": "seed", "io": "name dir only_phase"},
    "model": {
        "math": "vocab_size num_layers hidden_size num_query_heads num_kv_heads head_dim "
        "num_experts expert_ffn_size router_size conv_depthwise_taps conv_grouped_taps "
        "rope_fraction norm_eps skip_class skip_output init_std",
        # A phase's own base is what trains; these two are written into exports.
        "io": "rope_base max_context_tokens",
    },
    "plan.phases.*": {
        "math": "tokens context_tokens rope_base global_batch_tokens mixture.* loss_on "
        "learning_rate_scale schedule.kind schedule.warmup_tokens schedule.decay_tokens "
        "schedule.final_ratio batch_ramp.start_tokens batch_ramp.over_tokens",
        "speed": "micro_batch_sequences context_parallel",
        "io": "exit_gate.validation_loss.* exit_gate.most_skip_rate exit_gate.least_load_entropy",
    },
    "data": {
        "math": "sources.*.max_documents max_documents_per_row balance_rows",
        "speed": "prefetch_batches",
        "io": "sources.*.path sources.*.max_epochs validation.*.path validation.*.max_epochs "
        "validation.*.max_documents validation_sequences plan_dir",
    },
    "optim": {"math": "clip_norm z_loss"},
    "optim.muon": {
        "math": "learning_rate momentum momentum_dtype nesterov weight_decay newton_schulz_steps "
        "newton_schulz_dtype newton_schulz_coefficients newton_schulz_schedule update_rms",
    },
    "optim.adamw": {"math": "learning_rate beta1 beta2 eps weight_decay"},
    "optim.balancing": {"math": "learning_rate beta1 beta2 eps skip_target"},
    "parallel": {
        "speed": "shard expert_parallel context_parallel_limit context_parallel_fit "
        "reshard_after_forward accumulation recompute context_chunks",
    },
    "precision": {"math": "compute_dtype reduce_dtype expert_dtype"},
    "kernels": {
        "speed": "cca attention norm_residual router moe_permute grouped_mlp "
        "grouped_mlp_recompute linear_cross_entropy newton_schulz",
    },
    "checkpoint": {
        "math": "initial_weights branch_from",
        "io": "every_steps keep_last keep_every_steps asynchronous retry_seconds allow_changed",
    },
    "guard": {"math": "sigma window_steps most_skipped at_limit most_roll_backs"},
    "supervisor": {
        "io": "hang_seconds slow_seconds stop_seconds same_step_failures backoff_seconds "
        "most_backoff_seconds straggler_factor status_seconds",
    },
    "logging": {
        "io": "every_steps eval_every_steps wandb wandb_project tensorboard progress trace_steps "
        "trace_first_step trace_tokens",
    },
    "runtime": {
        "speed": "device threads",
        "io": "init_timeout_seconds step_timeout_seconds memory_gb memory_check",
    },
}
"""Section -> tag -> its keys; `*` stands for a name of the user's (a phase, a source)."""

EXACT = frozenset({"data.prefetch_batches", "parallel.reshard_after_forward"})
"""Of the speed keys those that change no bit of a loss."""
AT_START = frozenset({"model.init_std", "checkpoint.initial_weights", "checkpoint.branch_from"})
"""Math keys that say where a run starts from, and nothing once it has checkpoints."""
NAMEABLE = "optim.* precision.* guard.* plan.phases.*: learning_rate_scale, schedule.*, rope_base"
"""What checkpoint.allow_changed may name, for people: of what a resume refuses to see changed, all
that decides neither the model nor which documents stand in which row, so that a run can go on
without repeating or losing any."""
_NAMEABLE_SECTIONS = frozenset({"optim", "precision", "guard"})
_NAMEABLE_OF_PHASES = frozenset({"learning_rate_scale", "schedule", "rope_base"})
PHASES = "plan.phases"
SOURCES = "data.sources"


@cache
def patterns() -> dict[str, Kind]:
    """Every dotted key, names of the user's as `*`, and its tag."""
    return {
        f"{section}.{key}": kind
        for section, tagged in TAGS.items()
        for kind, keys in tagged.items()
        for key in keys.split()
    }


def kind_of(key: str) -> Kind | None:
    """The tag of a dotted key; None for a key that this version does not have."""
    found = patterns().get(key)
    if found is not None:
        return found
    node: Any = _tree()
    for part in key.split("."):
        node = node.get(part, node.get("*")) if isinstance(node, dict) else None
    return node if isinstance(node, str) else None  # type: ignore[return-value]


def nameable(key: str) -> bool:
    """Whether checkpoint.allow_changed may name the dotted key (NAMEABLE)."""
    if kind_of(key) != "math":
        return False
    section, *rest = key.split(".")
    if section == "plan":
        return rest[2] in _NAMEABLE_OF_PHASES
    return section in _NAMEABLE_SECTIONS


@cache
def _tree() -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for pattern, kind in patterns().items():
        *parents, leaf = pattern.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = kind
    return tree


def leaves(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a configuration as nested dictionaries. A section that is null, such
    as a phase without batch_ramp, has none."""
    for name, value in values.items():
        key = f"{path}.{name}" if path else str(name)
        if isinstance(value, dict):
            yield from leaves(value, key)
        elif value is not None or kind_of(key):
            yield key, list(value) if isinstance(value, tuple) else value


def drawn(values: Mapping[str, Any]) -> set[str]:
    """Sources that the phases of a configuration as nested dictionaries draw from."""
    phases = values.get("plan", {}).get("phases", {}).values()
    return {name for phase in phases for name, weight in phase["mixture"].items() if weight > 0}


def of_source(key: str) -> str | None:
    """The source whose rows the dotted math key decides, if it is one of a source."""
    section, _, field = key.rpartition(".")
    parent, _, name = section.rpartition(".")
    return name if parent == SOURCES and kind_of(f"{SOURCES}.*.{field}") == "math" else None


def math_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Every math key of a configuration as nested dictionaries, with the order of its phases.
    What is said of a source that no phase draws from decides nothing."""
    unused = values.get("data", {}).get("sources", {}).keys() - drawn(values)
    found = {
        key: value
        for key, value in leaves(values)
        if kind_of(key) == "math" and of_source(key) not in unused
    }
    return {**found, PHASES: list(values.get("plan", {}).get("phases", {}))}


def math_hash(config: TrainConfig) -> str:
    """Short sha256 of the math keys: equal hashes, and data and code, mean equal curves."""
    text = json.dumps(math_values(to_dict(config)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def leaf_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) of every key, phases' order included, that differs."""
    before, now = dict(leaves(old)), dict(leaves(new))
    found = {
        key: (before.get(key, ABSENT), now.get(key, ABSENT))
        for key in [*now, *(key for key in before if key not in now)]
        if before.get(key, ABSENT) != now.get(key, ABSENT)
    }
    orders = [list(values.get("plan", {}).get("phases", {})) for values in (old, new)]
    if orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]):
        found[PHASES] = (orders[0], orders[1])
    return found
