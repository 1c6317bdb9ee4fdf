"""Ways to get a configuration wrong, each with what its one line must hold."""

from __future__ import annotations

S, M = "plan.phases.sft", "plan.phases.midtrain"

BAD: tuple[tuple[str, tuple[str, ...]], ...] = (
    # Words that are no overrides.
    ("run.dir", ("'run.dir'", "KEY=VALUE")),
    ("config.yaml", ("'config.yaml'", "KEY=VALUE")),
    ("model.hidden_size=[1", ("[1",)),
    ("run.name=a b=c", ("run.name=a b=c",)),
    ("run.seed=${nope}", ("run.seed", "nope")),
    # Typing mistakes in keys.
    ("model.hiden_size=3", ("model.hiden_size: unknown key", "did you mean model.hidden_size?")),
    ("+model.hiden_size=3", ("model.hiden_size: unknown key", "hidden_size")),
    ("~model.hiden", ("model.hiden: unknown key",)),
    ("modle.num_layers=3", ("did you mean model.num_layers?",)),
    ("parallel.shrad=2", ("did you mean parallel.shard?",)),
    ("++guard.sigam=3", ("guard.sigam: unknown key", "sigma")),
    ("supervisor.hang_second=3", ("did you mean supervisor.hang_seconds?",)),
    (f"{M}.contxt_tokens=5", (f"did you mean {M}.context_tokens?",)),
    (f"{M}.schedule.warmup=5", (f"did you mean {M}.schedule.warmup_tokens?",)),
    ("plan.phases.midtrian.tokens=5", ("plan.phases has no entry midtrian", "+")),
    ("data.sources.text.pth=x", ("did you mean data.sources.text.path?",)),
    ("+foo=1", ("foo: unknown key",)),
    # Names without their place.
    ("learning_rate=0.1", ("optim.muon.learning_rate", "optim.adamw.learning_rate")),
    ("optim.learning_rate=0.1", ("optim.muon.learning_rate",)),
    ("hidden_size=64", ("there is model.hidden_size",)),
    ("seed=3", ("run.seed",)),
    # Groups.
    ("recipe=smok_cpu", ("recipe=smok_cpu: no such recipe", "did you mean smoke_cpu?")),
    ("recipe=", ("no such recipe", "zaya1_8b")),
    ("model=zaya1_8", ("did you mean zaya1_8b?",)),
    ("precision=fp8", ("no such precision", "bf16, fp32")),
    ("model=null", ("must be a string",)),
    # Types.
    ("model.hidden_size=abc", ("model.hidden_size: expected int", "'abc'")),
    ("model.num_layers=2.5", ("model.num_layers: expected int", "2.5")),
    ("model.num_layers=true", ("model.num_layers: expected int", "True")),
    ("model.skip_class=1", ("model.skip_class: expected bool",)),
    ("run.dir=null", ("run.dir: expected str",)),
    ("run=3", ("run: expected a mapping",)),
    (f"{S}=null", (f"{S}: expected a mapping",)),
    ("plan.phases=[]", ("plan.phases",)),
    ("checkpoint.every_steps=0.5", ("checkpoint.every_steps: expected int",)),
    # Choices.
    ("logging.wandb=on", ("logging.wandb", "disabled, offline, online")),
    ("runtime.device=gpu", ("runtime.device", "auto, cpu, cuda")),
    ("kernels.attention=flash", ("kernels.attention: str 'flash' is not one of eager",)),
    ("optim.muon.newton_schulz_dtype=fp16", ("newton_schulz_dtype", "fp32, bf16")),
    ("guard.at_limit=retry", ("guard.at_limit", "stop, roll_back")),
    (f"{S}.schedule.kind=linaer", (f"{S}.schedule.kind", "wsd, cosine, linear, constant")),
    # Values.
    ("run.dir=''", ("run.dir: must not be empty",)),
    ("run.seed=-1", ("run.seed: -1",)),
    ("optim.muon.learning_rate=-0.1", ("optim.muon.learning_rate: -0.1", "positive")),
    ("optim.adamw.learning_rate=nan", ("optim.adamw.learning_rate: nan",)),
    ("optim.muon.momentum=1.0", ("optim.muon.momentum: 1.0", "[0, 1)")),
    ("checkpoint.keep_last=1", ("checkpoint.keep_last: 1", "at least 2")),
    ("guard.window_steps=1", ("guard.window_steps: 1", "at least 4")),
    ("guard.most_skipped=0", ("guard.most_skipped: 0", "positive")),
    ("supervisor.straggler_factor=1", ("supervisor.straggler_factor: 1.0", "above 1")),
    ("supervisor.hang_seconds=0", ("supervisor.hang_seconds: 0", "positive")),
    (f"+{S}.exit_gate.validation_loss.web=3", ("exit_gate.validation_loss.web", "reasoning")),
    (f"{S}.exit_gate.most_skip_rate=2", (f"{S}.exit_gate.most_skip_rate: 2.0", "[0, 1]")),
    # Combinations.
    ("model.num_query_heads=3", ("model.num_query_heads: 3", "num_kv_heads 2")),
    ("parallel.shard=3", ("parallel.shard: 3", "1 ranks")),
    ("parallel.expert_parallel=3", ("parallel.expert_parallel: 3", "1 ranks")),
    ("parallel.context_parallel_fit=false", ("context_parallel: 2", "1 ranks")),
    (f"{M}.context_tokens=1000", (f"{M}.global_batch_tokens: 2048", "1000")),
    (f"{S}.context_tokens=512", (f"{S}.context_tokens: 512", "1024", "phase midtrain")),
    (f"{M}.schedule.warmup_tokens=999999", (f"{M}.schedule", "999999", "307200")),
    (f"+{S}.mixture.web=1", (f"{S}.mixture.web", "reasoning")),
)
"""(override of recipe smoke_cpu on one rank, what the line must hold)."""
