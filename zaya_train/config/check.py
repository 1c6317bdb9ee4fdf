"""Rules that span keys, checked before anything is allocated.

Every message gives the keys, the rule and the numbers.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from zaya_train.config.build import to_dict
from zaya_train.config.derive import context_degree, layout
from zaya_train.config.errors import ConfigError
from zaya_train.config.kernel_rules import kernel_problems
from zaya_train.config.kinds import NAMEABLE, kind_of, math_values, nameable
from zaya_train.config.newton_schulz import newton_schulz_problems
from zaya_train.config.suggest import unknown_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from zaya_train.config.faults import GuardConfig, SupervisorConfig
    from zaya_train.config.schema import (
        BalancingConfig,
        ModelConfig,
        OptimConfig,
        ParallelConfig,
        PhaseConfig,
        TrainConfig,
    )


def check(config: TrainConfig, world: int) -> None:
    """Raise ConfigError with the first broken rule for a run on `world` ranks."""
    for problem in problems(config, world):
        raise ConfigError(problem)


def check_all(config: TrainConfig, world: int, besides: Iterable[str] = ()) -> None:
    """Raise ConfigError with every broken rule for a run on `world` ranks, and those `besides`."""
    refuse([*problems(config, world), *besides])


def refuse(broken: Iterable[str]) -> None:
    """Raise ConfigError with all of them, if there are any."""
    if said := "; ".join(broken):
        raise ConfigError(said)


def problems(config: TrainConfig, world: int) -> Iterator[str]:
    """Every broken rule, one line each."""
    yield from model_problems(config.model)
    yield from _optim(config.optim)
    yield from _skip_target(config)
    yield from _settings(config)
    yield from kernel_problems(config.kernels, config.model, config.precision)
    yield from _parallel(config.parallel, config.model, world)
    if not config.plan.phases:
        yield "plan.phases: a plan needs at least one phase"
    only = config.run.only_phase
    if only is not None and only not in config.plan.phases:
        yield f"run.only_phase: {only} is not one of {', '.join(config.plan.phases)}"
    previous: tuple[str, PhaseConfig] | None = None
    for name, phase in config.plan.phases.items():
        key = f"plan.phases.{name}"
        yield from _phase(key, phase)
        yield from _phase_fits_model(key, phase, config.model)
        if only in (None, name):
            yield from _phase_fits_ranks(key, phase, config, world)
        yield from _mixture(key, phase, config)
        yield from _gate(key, phase, config)
        if previous and phase.context_tokens < previous[1].context_tokens:
            yield (
                f"{key}.context_tokens: {phase.context_tokens} is shorter than the "
                f"{previous[1].context_tokens} of phase {previous[0]} before it; contexts grow"
            )
        previous = (name, phase)


def _positive(prefix: str, config: object, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        value = getattr(config, name)
        # NaN fails every comparison, so the rule is stated as what must hold.
        if not 0 < value < math.inf:
            yield f"{prefix}.{name}: {value} must be positive{_finite(value)}"


def _not_negative(key: str, value: float) -> Iterator[str]:
    if not 0 <= value < math.inf:
        yield f"{key}: {value} must not be negative{_finite(value)}"


def _finite(value: float) -> str:
    return "" if math.isfinite(value) else " and finite"


def _unit(prefix: str, config: object, names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            yield f"{prefix}.{name}: {value} must lie in [0, 1)"


def model_problems(model: ModelConfig) -> Iterator[str]:
    """Every rule that a model's shape breaks, one line each; keys are written `model.KEY`."""
    yield from _positive(
        "model",
        model,
        (
            "vocab_size", "num_layers", "hidden_size", "num_query_heads", "num_kv_heads",
            "head_dim", "num_experts", "expert_ffn_size", "router_size", "conv_depthwise_taps",
            "conv_grouped_taps", "rope_base", "max_context_tokens", "norm_eps", "init_std",
        ),
    )  # fmt: skip
    if model.num_kv_heads > 0 and model.num_query_heads % model.num_kv_heads:
        yield (
            f"model.num_query_heads: {model.num_query_heads} is not a multiple of "
            f"model.num_kv_heads {model.num_kv_heads}"
        )
    if model.num_kv_heads * model.head_dim % 2:
        yield (
            f"model.num_kv_heads x model.head_dim: {model.num_kv_heads} x {model.head_dim} must be "
            "even, half the value channels come from the previous token"
        )
    rotated = model.head_dim * model.rope_fraction
    if not 0 < model.rope_fraction <= 1 or rotated != int(rotated) or int(rotated) % 2:
        yield (
            f"model.rope_fraction: {model.rope_fraction} of model.head_dim {model.head_dim} is "
            f"{rotated} channels; it must be a positive even number of them"
        )


def balancing_problems(gains: BalancingConfig) -> Iterator[str]:
    """Every rule that the controller's gains break by themselves, one line each."""
    prefix = "optim.balancing"
    yield from _positive(prefix, gains, ("learning_rate", "eps"))
    yield from _unit(prefix, gains, ("beta1", "beta2"))
    if gains.skip_target is not None and not 0 <= gains.skip_target < 1:
        yield f"{prefix}.skip_target: {gains.skip_target} must lie in [0, 1), or be null"


def _optim(optim: OptimConfig) -> Iterator[str]:
    yield from _positive("optim.muon", optim.muon, ("learning_rate", "newton_schulz_steps"))
    yield from newton_schulz_problems(optim.muon)
    yield from _positive("optim.muon", optim.muon, ("update_rms",))
    yield from _unit("optim.muon", optim.muon, ("momentum",))
    yield from _positive("optim.adamw", optim.adamw, ("learning_rate", "eps"))
    yield from _unit("optim.adamw", optim.adamw, ("beta1", "beta2"))
    yield from balancing_problems(optim.balancing)
    for key, value in (
        ("optim.muon.weight_decay", optim.muon.weight_decay),
        ("optim.adamw.weight_decay", optim.adamw.weight_decay),
        ("optim.clip_norm", optim.clip_norm),
        ("optim.z_loss", optim.z_loss),
    ):
        yield from _not_negative(key, value)


def _skip_target(config: TrainConfig) -> Iterator[str]:
    target = config.optim.balancing.skip_target
    if target is not None and not config.model.skip_class:
        yield f"optim.balancing.skip_target: {target}, but model.skip_class=false has no such class"


def _settings(config: TrainConfig) -> Iterator[str]:
    yield from _positive("checkpoint", config.checkpoint, ("every_steps",))
    if config.checkpoint.keep_last < 2:
        yield (
            f"checkpoint.keep_last: {config.checkpoint.keep_last}; at least 2, so that one good "
            "checkpoint remains while the next is being written"
        )
    every, kept = config.checkpoint.every_steps, config.checkpoint.keep_every_steps
    if every > 0 and kept > 0 and kept % every:
        yield (
            f"checkpoint.keep_every_steps: {kept} is no multiple of checkpoint.every_steps="
            f"{every}, so most of these steps have no checkpoint to keep"
        )
    yield from _positive(
        "logging", config.logging, ("every_steps", "trace_first_step", "trace_tokens")
    )
    for key, number in (
        ("logging.eval_every_steps", config.logging.eval_every_steps),
        ("logging.trace_steps", config.logging.trace_steps),
        ("run.seed", config.run.seed),
        ("checkpoint.retry_seconds", config.checkpoint.retry_seconds),
        ("checkpoint.keep_every_steps", config.checkpoint.keep_every_steps),
        ("runtime.threads", config.runtime.threads),
    ):
        yield from _not_negative(key, number)
    for key, text in (("run.name", config.run.name), ("run.dir", config.run.dir)):
        if not text:
            yield f"{key}: must not be empty"
    yield from _positive("data", config.data, ("validation_sequences", "max_documents_per_row"))
    yield from _not_negative("data.prefetch_batches", config.data.prefetch_batches)
    runtime = config.runtime
    yield from _positive("runtime", runtime, ("init_timeout_seconds", "step_timeout_seconds"))
    if runtime.memory_gb is not None:
        yield from _positive("runtime", runtime, ("memory_gb",))
    yield from _guard(config.guard)
    yield from _supervisor(config.supervisor)
    yield from _allowed(config)
    start = config.checkpoint
    if start.initial_weights and start.branch_from:
        yield (
            f"checkpoint.branch_from: {start.branch_from} brings its weights; set it or "
            f"checkpoint.initial_weights ({start.initial_weights}), not both"
        )


def _allowed(config: TrainConfig) -> Iterator[str]:
    known = math_values(to_dict(config))
    for key in config.checkpoint.allow_changed:
        kind = kind_of(key)
        if nameable(key) and key not in known:
            yield f"checkpoint.allow_changed: {key}: this configuration has no such entry"
        elif kind == "math" and not nameable(key):
            yield f"checkpoint.allow_changed: {key} cannot be named; what can: {NAMEABLE}"
        elif kind is None:
            yield f"checkpoint.allow_changed: {unknown_key(type(config), key)}"
        elif kind != "math":
            yield f"checkpoint.allow_changed: {key} is of kind {kind}, which may always change"


def _guard(guard: GuardConfig) -> Iterator[str]:
    yield from _not_negative("guard.sigma", guard.sigma)
    yield from _positive("guard", guard, ("most_skipped",))
    yield from _not_negative("guard.most_roll_backs", guard.most_roll_backs)
    if guard.window_steps < 4:
        yield f"guard.window_steps: {guard.window_steps}; at least 4, to have a deviation"


def _supervisor(supervisor: SupervisorConfig) -> Iterator[str]:
    yield from _positive(
        "supervisor",
        supervisor,
        ("hang_seconds", "slow_seconds", "stop_seconds", "same_step_failures", "status_seconds"),
    )
    for key in ("backoff_seconds", "most_backoff_seconds"):
        yield from _not_negative(f"supervisor.{key}", getattr(supervisor, key))
    if not 1 < supervisor.straggler_factor < math.inf:
        yield f"supervisor.straggler_factor: {supervisor.straggler_factor} must be above 1"


def _parallel(parallel: ParallelConfig, model: ModelConfig, world: int) -> Iterator[str]:
    yield from _not_negative("parallel.shard", parallel.shard)
    yield from _positive("parallel", parallel, ("expert_parallel",))
    yield from _not_negative("parallel.context_parallel_limit", parallel.context_parallel_limit)
    if parallel.shard > 0 and world % parallel.shard:
        yield f"parallel.shard: {parallel.shard} does not divide the {world} ranks of this launch"
    group, experts = parallel.shard or world, parallel.expert_parallel
    if experts > 0 and group > 0 and group % experts:
        yield (
            f"parallel.expert_parallel: {experts} does not divide the {group} ranks of an FSDP "
            f"group (world {world}, parallel.shard {parallel.shard})"
        )
    if experts > 0 and model.num_experts > 0 and model.num_experts % experts:
        yield (
            f"parallel.expert_parallel: {experts} does not divide the {model.num_experts} experts "
            "of model.num_experts"
        )


def _phase(key: str, phase: PhaseConfig) -> Iterator[str]:
    yield from _positive(
        key,
        phase,
        (
            "tokens", "context_tokens", "rope_base", "global_batch_tokens",
            "micro_batch_sequences", "context_parallel", "learning_rate_scale",
        ),
    )  # fmt: skip
    if phase.context_tokens > 0 and phase.global_batch_tokens % phase.context_tokens:
        yield (
            f"{key}.global_batch_tokens: {phase.global_batch_tokens} is not a multiple of "
            f"context_tokens {phase.context_tokens}"
        )
    schedule = phase.schedule
    yield from _not_negative(f"{key}.schedule.warmup_tokens", schedule.warmup_tokens)
    yield from _not_negative(f"{key}.schedule.decay_tokens", schedule.decay_tokens)
    if schedule.warmup_tokens + schedule.decay_tokens > phase.tokens:
        yield (
            f"{key}.schedule: warmup_tokens {schedule.warmup_tokens} + decay_tokens "
            f"{schedule.decay_tokens} exceed the phase's {phase.tokens} tokens"
        )
    if schedule.decay_tokens and schedule.kind != "wsd":
        yield f"{key}.schedule.decay_tokens: only kind wsd has one, kind is {schedule.kind}"
    if not 0 <= schedule.final_ratio <= 1:
        yield f"{key}.schedule.final_ratio: {schedule.final_ratio} must lie in [0, 1]"
    yield from _ramp(key, phase)


def _ramp(key: str, phase: PhaseConfig) -> Iterator[str]:
    ramp = phase.batch_ramp
    if ramp is None:
        return
    if ramp.start_tokens <= 0 or ramp.start_tokens > phase.global_batch_tokens:
        yield (
            f"{key}.batch_ramp.start_tokens: {ramp.start_tokens} must be positive and at most "
            f"global_batch_tokens {phase.global_batch_tokens}"
        )
    if not 0 < ramp.over_tokens <= phase.tokens:
        yield (
            f"{key}.batch_ramp.over_tokens: {ramp.over_tokens} must be positive and at most the "
            f"phase's {phase.tokens} tokens"
        )


def _phase_fits_model(key: str, phase: PhaseConfig, model: ModelConfig) -> Iterator[str]:
    if phase.context_tokens > model.max_context_tokens:
        yield (
            f"{key}.context_tokens: {phase.context_tokens} exceeds model.max_context_tokens "
            f"{model.max_context_tokens}"
        )


def _phase_fits_ranks(
    key: str, phase: PhaseConfig, config: TrainConfig, world: int
) -> Iterator[str]:
    parallel = config.parallel
    context = context_degree(phase, parallel, world)
    group = parallel.shard or world
    if min(context, group, phase.context_tokens, phase.micro_batch_sequences) <= 0:
        return  # said already
    if group % context:
        yield (
            f"{key}.context_parallel: {context} does not divide the {group} ranks of an FSDP group "
            f"(world {world}); parallel.context_parallel_limit or context_parallel_fit lower it"
        )
        return
    chunks = 2 * context if parallel.context_chunks == "head_tail" and context > 1 else context
    if phase.context_tokens % chunks:
        yield (
            f"{key}.context_tokens: {phase.context_tokens} does not divide into {chunks} chunks "
            f"for context_parallel {context} ({parallel.context_chunks})"
        )
    halo = config.model.conv_depthwise_taps + config.model.conv_grouped_taps - 2
    if context > 1 and phase.context_tokens // chunks < max(halo, 1):
        yield (
            f"{key}.context_tokens: {phase.context_tokens} in {chunks} chunks for context_parallel "
            f"{context} leaves {phase.context_tokens // chunks} tokens a chunk, fewer than the "
            f"{max(halo, 1)} that the convolutions reach back"
        )
    unit = layout(phase, parallel, world).data * phase.micro_batch_sequences
    sizes = {"global_batch_tokens": phase.global_batch_tokens}
    if phase.batch_ramp:
        sizes["batch_ramp.start_tokens"] = phase.batch_ramp.start_tokens
    for name, tokens in sizes.items():
        if unit > 0 and tokens % (unit * phase.context_tokens):
            yield (
                f"{key}.{name}: {tokens} is not a multiple of {unit * phase.context_tokens} = "
                f"{phase.context_tokens} tokens x {phase.micro_batch_sequences} rows a micro-batch"
                f" x {unit // phase.micro_batch_sequences} data ranks"
            )


def _mixture(key: str, phase: PhaseConfig, config: TrainConfig) -> Iterator[str]:
    if not any(weight > 0 for weight in phase.mixture.values()):
        yield f"{key}.mixture: weights {dict(phase.mixture)} sum to nothing"
    for name, weight in phase.mixture.items():
        if name not in config.data.sources:
            known = ", ".join(config.data.sources) or "none"
            yield f"{key}.mixture.{name}: no such source in data.sources (known: {known})"
        yield from _not_negative(f"{key}.mixture.{name}", weight)


def _gate(key: str, phase: PhaseConfig, config: TrainConfig) -> Iterator[str]:
    gate = phase.exit_gate
    for name, loss in gate.validation_loss.items():
        if name not in config.data.validation:
            known = ", ".join(config.data.validation) or "none"
            yield (
                f"{key}.exit_gate.validation_loss.{name}: no such corpus in data.validation "
                f"(known: {known})"
            )
        if not 0 < loss < math.inf:
            yield f"{key}.exit_gate.validation_loss.{name}: {loss} must be positive and finite"
    if gate.validation_loss and not config.logging.eval_every_steps:
        yield (
            f"{key}.exit_gate.validation_loss: needs evaluations, and logging.eval_every_steps is 0"
        )
    for limit in ("most_skip_rate", "least_load_entropy"):
        value = getattr(gate, limit)
        if value is not None and not 0 <= value <= 1:
            yield f"{key}.exit_gate.{limit}: {value} must lie in [0, 1]"
