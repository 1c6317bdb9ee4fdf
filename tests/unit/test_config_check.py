"""Rules that span keys: each broken value or combination gives one line with keys and numbers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.tiny import DELETED, tiny
from zaya_train.config.check import check, problems
from zaya_train.config.errors import ConfigError

S, L = "plan.phases.short", "plan.phases.long"
NAN, INF = float("nan"), float("inf")

# (what is changed, ranks, what the line must hold)
BROKEN: list[tuple[dict[str, Any], int, list[str]]] = [
    # Layout.
    ({}, 1, [f"{L}.context_parallel", "2", "1 ranks", "context_parallel_limit"]),
    ({}, 3, [f"{S}.global_batch_tokens", "256", "192", "3 data ranks"]),
    ({f"{S}.global_batch_tokens": 192}, 3, [f"{L}.context_parallel", "2", "3 ranks"]),
    ({"parallel.shard": 3}, 4, ["parallel.shard", "3", "4 ranks"]),
    ({"parallel.shard": 4}, 2, ["parallel.shard", "4", "2 ranks"]),
    ({"parallel.shard": 1}, 2, [f"{L}.context_parallel", "2", "1 ranks"]),
    ({"parallel.expert_parallel": 2}, 2, ["parallel.expert_parallel", "2", "3 experts"]),
    ({"parallel.expert_parallel": 3}, 2, ["parallel.expert_parallel", "3", "2 ranks", "world 2"]),
    (
        {"parallel.expert_parallel": 3, "parallel.shard": 2},
        4,
        ["parallel.expert_parallel", "3", "2 ranks", "world 4", "parallel.shard 2"],
    ),
    ({"parallel.expert_parallel": 0}, 2, ["parallel.expert_parallel", "0", "positive"]),
    ({"parallel.shard": -1}, 2, ["parallel.shard", "-1"]),
    ({"parallel.context_parallel_limit": -2}, 2, ["parallel.context_parallel_limit", "-2"]),
    ({f"{L}.context_parallel": 0}, 2, [f"{L}.context_parallel", "0", "positive"]),
    ({f"{L}.context_parallel": -2}, 2, [f"{L}.context_parallel", "-2", "positive"]),
    ({f"{L}.context_parallel": 3}, 2, [f"{L}.context_parallel", "3", "2"]),
    # Divisibility.
    ({f"{S}.global_batch_tokens": 100}, 2, [f"{S}.global_batch_tokens", "100", "64"]),
    ({f"{S}.global_batch_tokens": 192}, 2, [f"{S}.global_batch_tokens", "192", "128"]),
    ({f"{S}.micro_batch_sequences": 3}, 2, [f"{S}.global_batch_tokens", "256", "384", "64"]),
    ({f"{S}.micro_batch_sequences": 0}, 2, [f"{S}.micro_batch_sequences", "0"]),
    ({f"{S}.global_batch_tokens": 0}, 2, [f"{S}.global_batch_tokens", "0", "positive"]),
    (
        {f"{L}.context_tokens": 126, f"{L}.global_batch_tokens": 252},
        2,
        [f"{L}.context_tokens", "126", "4 chunks", "head_tail"],
    ),
    (
        {
            f"{L}.context_tokens": 127,
            f"{L}.global_batch_tokens": 254,
            "parallel.context_chunks": "contiguous",
        },
        2,
        [f"{L}.context_tokens", "127", "2 chunks", "contiguous"],
    ),
    (
        {"model.conv_depthwise_taps": 20, "model.conv_grouped_taps": 20},
        2,
        [f"{L}.context_tokens", "32 tokens a chunk", "38"],
    ),
    (
        {"kernels.cca": "triton", "model.head_dim": 48, "model.rope_fraction": 1.0},
        2,
        ["kernels.cca=triton", "model.head_dim 48", "power of two from 32"],
    ),
    (
        {"kernels.cca": "triton", "model.head_dim": 32, "model.rope_fraction": 0.25},
        2,
        ["kernels.cca=triton", "model.rope_fraction 0.25", "8 channels", "multiple of 16"],
    ),
    (
        {"kernels.grouped_mlp_recompute": True},
        2,
        ["kernels.grouped_mlp_recompute", "kernels.grouped_mlp=eager", "needs triton"],
    ),
    (
        {"kernels.attention": "triton", "model.head_dim": 256},
        2,
        ["kernels.attention=triton", "model.head_dim 256", "16, 32, 64 or 128"],
    ),
    (
        {"kernels.router": "triton", "model.router_size": 24},
        2,
        ["kernels.router=triton", "model.router_size 24", "power of two from 16"],
    ),
    (
        {"kernels.router": "triton", "model.router_size": 16, "model.hidden_size": 72},
        2,
        ["kernels.router=triton", "model.hidden_size 72", "multiple of 16"],
    ),
    (
        {"kernels.moe_permute": "triton", "model.num_experts": 512},
        2,
        ["kernels.moe_permute=triton", "model.num_experts 512", "at most 511"],
    ),
    (
        {"kernels.linear_cross_entropy": "triton", "model.hidden_size": 72},
        2,
        ["kernels.linear_cross_entropy=triton", "model.hidden_size 72", "multiple of 16"],
    ),
    (
        {"kernels.attention": "flash_attn"},
        2,
        ["kernels.attention=flash_attn", "takes bf16", "precision.compute_dtype is fp32"],
    ),
    (
        {
            "kernels.attention": "aiter",
            "precision.compute_dtype": "bf16",
            "model.head_dim": 12,
            "model.rope_fraction": 0.5,
        },
        2,
        ["kernels.attention=aiter", "model.head_dim 12", "multiple of 8", "256"],
    ),
    (
        {
            "kernels.grouped_mlp": "grouped_mm",
            "precision.compute_dtype": "bf16",
            "model.hidden_size": 36,
        },
        2,
        ["kernels.grouped_mlp=grouped_mm", "model.hidden_size 36", "multiple of 8", "bf16"],
    ),
    (
        {
            "kernels.grouped_mlp": "grouped_mm",
            "model.expert_ffn_size": 18,
        },
        2,
        ["kernels.grouped_mlp=grouped_mm", "model.expert_ffn_size 18", "multiple of 4", "fp32"],
    ),
    ({"model.num_query_heads": 3}, 2, ["model.num_query_heads", "3", "num_kv_heads 2"]),
    (
        {"model.num_kv_heads": 1, "model.head_dim": 7, "model.rope_fraction": 1.0},
        2,
        ["model.num_kv_heads", "1 x 7", "even"],
    ),
    ({"model.rope_fraction": 0.3}, 2, ["model.rope_fraction", "0.3", "8"]),
    ({"model.rope_fraction": 0.125}, 2, ["model.rope_fraction", "0.125", "1.0 channels"]),
    ({"model.rope_fraction": 1.5}, 2, ["model.rope_fraction", "1.5"]),
    ({"model.rope_fraction": NAN}, 2, ["model.rope_fraction", "nan"]),
    ({"model.head_dim": 0}, 2, ["model.head_dim", "0", "positive"]),
    ({"model.num_kv_heads": 0}, 2, ["model.num_kv_heads", "0", "positive"]),
    ({"model.vocab_size": -1}, 2, ["model.vocab_size", "-1"]),
    ({"model.norm_eps": 0}, 2, ["model.norm_eps", "0"]),
    ({"model.rope_base": INF}, 2, ["model.rope_base", "inf", "finite"]),
    # Budgets and order of phases.
    ({f"{S}.tokens": 0}, 2, [f"{S}.tokens", "0", "positive"]),
    ({f"{S}.context_tokens": 0}, 2, [f"{S}.context_tokens", "0", "positive"]),
    ({f"{S}.rope_base": -1.0}, 2, [f"{S}.rope_base", "-1.0"]),
    ({"model.max_context_tokens": 100}, 2, [f"{L}.context_tokens", "128", "100"]),
    (
        {f"{S}.context_tokens": 256, f"{S}.global_batch_tokens": 512},
        2,
        [f"{L}.context_tokens", "128", "256", "phase short"],
    ),
    ({"plan.phases": {}}, 2, ["plan.phases", "at least one"]),
    # Schedules and ramps.
    ({f"{S}.schedule.warmup_tokens": 1537}, 2, [f"{S}.schedule", "1537", "512", "2048"]),
    ({f"{S}.schedule.warmup_tokens": -1}, 2, [f"{S}.schedule.warmup_tokens", "-1"]),
    ({f"{S}.schedule.decay_tokens": -5}, 2, [f"{S}.schedule.decay_tokens", "-5"]),
    ({f"{S}.schedule.kind": "cosine"}, 2, [f"{S}.schedule.decay_tokens", "wsd", "cosine"]),
    ({f"{S}.schedule.final_ratio": 1.5}, 2, [f"{S}.schedule.final_ratio", "1.5"]),
    ({f"{S}.schedule.final_ratio": NAN}, 2, [f"{S}.schedule.final_ratio", "nan"]),
    ({f"{S}.learning_rate_scale": 0.0}, 2, [f"{S}.learning_rate_scale", "0.0"]),
    (
        {f"{S}.batch_ramp": {"start_tokens": 512, "over_tokens": 512}},
        2,
        [f"{S}.batch_ramp.start_tokens", "512", "256"],
    ),
    (
        {f"{S}.batch_ramp": {"start_tokens": 64, "over_tokens": 512}},
        2,
        [f"{S}.batch_ramp.start_tokens", "64", "128"],
    ),
    (
        {f"{S}.batch_ramp": {"start_tokens": 0, "over_tokens": 512}},
        2,
        [f"{S}.batch_ramp.start_tokens", "0"],
    ),
    (
        {f"{S}.batch_ramp": {"start_tokens": 128, "over_tokens": 4096}},
        2,
        [f"{S}.batch_ramp.over_tokens", "4096", "2048"],
    ),
    (
        {f"{S}.batch_ramp": {"start_tokens": 128, "over_tokens": 0}},
        2,
        [f"{S}.batch_ramp.over_tokens", "0"],
    ),
    # Mixtures.
    ({f"{S}.mixture": {"web": 1.0}}, 2, [f"{S}.mixture.web", "problems"]),
    ({f"{S}.mixture": {"problems": 0.0}}, 2, [f"{S}.mixture", "0.0", "sum to nothing"]),
    ({f"{S}.mixture": {}}, 2, [f"{S}.mixture", "sum to nothing"]),
    ({f"{S}.mixture": {"problems": NAN}}, 2, [f"{S}.mixture", "nan"]),
    ({f"{S}.mixture": {"problems": INF}}, 2, [f"{S}.mixture.problems", "inf", "finite"]),
    (
        {f"{S}.mixture": {"problems": 1.0, "web": -1.0}, "data.sources.web": {"path": "x"}},
        2,
        [f"{S}.mixture.web", "-1.0", "negative"],
    ),
    # Optimizers.
    ({"optim.muon.learning_rate": 0.0}, 2, ["optim.muon.learning_rate", "0.0"]),
    ({"optim.muon.learning_rate": NAN}, 2, ["optim.muon.learning_rate", "nan"]),
    ({"optim.muon.momentum": 1.0}, 2, ["optim.muon.momentum", "1.0", "[0, 1)"]),
    ({"optim.muon.newton_schulz_steps": 0}, 2, ["optim.muon.newton_schulz_steps", "0"]),
    ({"optim.muon.update_rms": -0.2}, 2, ["optim.muon.update_rms", "-0.2"]),
    ({"optim.muon.weight_decay": -0.1}, 2, ["optim.muon.weight_decay", "-0.1"]),
    ({"optim.adamw.weight_decay": NAN}, 2, ["optim.adamw.weight_decay", "nan"]),
    ({"optim.adamw.beta2": -0.1}, 2, ["optim.adamw.beta2", "-0.1"]),
    ({"optim.adamw.eps": 0.0}, 2, ["optim.adamw.eps", "0.0"]),
    ({"optim.balancing.beta1": 1.5}, 2, ["optim.balancing.beta1", "1.5"]),
    ({"optim.balancing.skip_target": 1.0}, 2, ["optim.balancing.skip_target", "1.0", "[0, 1)"]),
    (
        {"optim.balancing.skip_target": 0.1, "model.skip_class": False},
        2,
        ["optim.balancing.skip_target: 0.1", "model.skip_class"],
    ),
    ({"optim.clip_norm": -1.0}, 2, ["optim.clip_norm", "-1.0"]),
    ({"optim.z_loss": -1e-4}, 2, ["optim.z_loss", "-0.0001", "negative"]),
    ({"optim.z_loss": NAN}, 2, ["optim.z_loss", "nan", "finite"]),
    ({"optim.z_loss": INF}, 2, ["optim.z_loss", "inf", "finite"]),
    # The rest.
    ({"checkpoint.keep_last": 1}, 2, ["checkpoint.keep_last", "1", "2"]),
    ({"checkpoint.keep_every_steps": -3}, 2, ["checkpoint.keep_every_steps", "-3"]),
    ({"checkpoint.keep_every_steps": 7}, 2, ["checkpoint.keep_every_steps", "7", "every_steps=3"]),
    ({"checkpoint.every_steps": 0}, 2, ["checkpoint.every_steps", "0"]),
    ({"logging.every_steps": 0}, 2, ["logging.every_steps", "0"]),
    ({"logging.eval_every_steps": -1}, 2, ["logging.eval_every_steps", "-1"]),
    ({"data.validation_sequences": 0}, 2, ["data.validation_sequences", "0"]),
    ({"data.prefetch_batches": -1}, 2, ["data.prefetch_batches", "-1"]),
    ({"data.max_documents_per_row": 0}, 2, ["data.max_documents_per_row", "0"]),
    ({"runtime.init_timeout_seconds": 0.0}, 2, ["runtime.init_timeout_seconds", "0.0"]),
    ({"runtime.threads": -1}, 2, ["runtime.threads", "-1"]),
    ({"run.seed": -1}, 2, ["run.seed", "-1"]),
    ({"run.dir": ""}, 2, ["run.dir", "empty"]),
]


def _id(case: tuple[dict[str, Any], int, list[str]]) -> str:
    changes, world, _ = case
    return f"{','.join(f'{k}={v}' for k, v in changes.items()) or 'as it is'} on {world}"


@pytest.mark.parametrize(("changes", "world", "fragments"), BROKEN, ids=map(_id, BROKEN))
def test_broken_rule_gives_one_line(
    changes: dict[str, Any], world: int, fragments: list[str]
) -> None:
    config = tiny(changes)
    with pytest.raises(ConfigError) as caught:
        check(config, world)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    # The preview lists every broken rule, so all rules must survive each other's bad values.
    assert message in list(problems(config, world))


@pytest.mark.parametrize(
    ("changes", "world"),
    [
        ({}, 2),
        ({"parallel.shard": 2}, 2),
        ({"parallel.context_parallel_limit": 1}, 1),
        ({f"{L}.context_parallel": 1}, 1),
        ({"parallel.context_chunks": "contiguous", f"{L}.context_tokens": 128}, 2),
        ({f"{S}.schedule.warmup_tokens": 1536}, 2),
        ({f"{S}.schedule": {"kind": "constant"}}, 2),
        ({f"{S}.batch_ramp": {"start_tokens": 128, "over_tokens": 2048}}, 2),
        ({f"{S}.mixture": {"problems": 3, "web": 0}, "data.sources.web": {"path": "x"}}, 2),
        ({"plan.phases.long": DELETED}, 4),
        ({"optim.clip_norm": 0.0}, 2),
        ({"optim.muon.momentum": 0.0}, 2),
        ({"model.conv_depthwise_taps": 1, "model.conv_grouped_taps": 1}, 2),
    ],
)
def test_what_is_right_passes(changes: dict[str, Any], world: int) -> None:
    assert list(problems(tiny(changes), world)) == []
