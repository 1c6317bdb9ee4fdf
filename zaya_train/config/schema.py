"""The typed run: every key a YAML file or a command line may set, with its unit and its source.

Frozen dataclasses only; this package imports nothing but the standard library, so a configuration
can be checked on a login node without torch. Values that follow from others live in `derive.py`,
rules that span keys in `check.py`, the conversion from plain dictionaries in `build.py`.

"report" below is the ZAYA1-8B report, arXiv 2605.05365.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from zaya_train.config.faults import GuardConfig, SupervisorConfig
from zaya_train.config.precision import PrecisionConfig

NativeKernelName = Literal["eager", "native", "reference", "triton"]
"""native: in C for the CPU at hand, compiled at first use; triton: on a GPU (docs/kernels.md)."""
AttentionName = Literal["eager", "aiter", "flash_attn", "native", "reference", "sdpa", "triton"]
"""eager: torch's scaled_dot_product_attention (sdpa), and on a CPU own blocks where these gain.
flash_attn, aiter: libraries' kernels on a GPU in bf16, where they are installed. native: in C."""
GroupedMLPName = Literal[
    NativeKernelName, "fp8_emulated", "fp8_emulated_fnuz", "grouped_mm", "transformer_engine"
]
"""grouped_mm: torch's product of all experts at once. transformer_engine: GroupedLinear, GPU.
fp8_emulated, for precision.expert_dtype=fp8: its arithmetic anywhere, slowly; fnuz: MI300X's."""
NewtonSchulzName = Literal["eager", "gram", "reference", "triton"]
"""gram: symmetric products once, on a CPU faster for matrices of 256 rows and more."""
AccumulationKind = Literal["keep_unsharded", "all_reduce_last", "reduce_each"]
RecomputeKind = Literal["none", "selective", "full"]
ScheduleKind = Literal["wsd", "cosine", "linear", "constant"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one ZAYA model (report, table I)."""

    vocab_size: int
    """Tokens in the embedding and in the tied LM head; 262,272 for ZAYA1 (Gemma 3 tokenizer)."""
    num_layers: int
    """Layers, each one CCA attention block followed by one MoE block; 40 for ZAYA1-8B."""
    hidden_size: int
    """Width D of the residual stream; 2,048 for ZAYA1-8B."""
    num_query_heads: int
    """Query heads H after CCA's compression; 8 for ZAYA1-8B."""
    num_kv_heads: int
    """Key/value heads K; 2 for ZAYA1-8B. Divides num_query_heads."""
    head_dim: int
    """Channels d per head; 128 for ZAYA1-8B. Even, and rope_fraction * head_dim even."""
    num_experts: int
    """Routed experts E per layer, one chosen per token; 16 for ZAYA1-8B."""
    expert_ffn_size: int
    """SwiGLU width F after the activation (2F before it); 2,048 for ZAYA1-8B."""
    router_size: int
    """Router latent R; 256 for ZAYA1-8B (report, II-A2)."""
    conv_depthwise_taps: int = 2
    """Kernel size of CCA's depthwise convolution over the sequence (arXiv 2510.04476)."""
    conv_grouped_taps: int = 2
    """Kernel size of CCA's per-head convolution over the sequence."""
    rope_fraction: float = 0.5
    """Share of each head's channels that is rotated."""
    rope_base: float = 10_000.0
    """RoPE base; every phase sets its own (10 K, 10 K, 1 M, 5 M in the report)."""
    max_context_tokens: int = 131_072
    """Longest context any phase uses; written to the exported Hugging Face config."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    skip_class: bool = True
    """Router scores E + 1 classes, the last one without an expert (released checkpoints do)."""
    skip_output: Literal["identity", "zero"] = "identity"
    """What a skipped token receives: probability x normalised block input (the original code) or
    zero (transformers' `zaya`)."""
    init_std: float = 0.02
    """Standard deviation of the embedding's initial values; see model/init.py for the others."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate as a pure function of the tokens consumed in a phase."""

    kind: ScheduleKind = "wsd"
    """wsd: warm-up, stable, linear decay; cosine and linear: decay over the whole phase."""
    warmup_tokens: int = 0
    """Linear warm-up from zero."""
    decay_tokens: int = 0
    """wsd only: length of the final linear decay."""
    final_ratio: float = 0.0
    """Learning rate at the end of the phase over its peak, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class BatchRampConfig:
    """Global batch grown in equal increments, as in Megatron-LM's batch-size ramp."""

    start_tokens: int
    """Global batch at the phase's first step."""
    over_tokens: int
    """Tokens over which the batch grows to the phase's global_batch_tokens."""


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What a phase must have reached before the run leaves it; None asks for nothing."""

    validation_loss: dict[str, float] = field(default_factory=dict)
    """Name in data.validation -> highest loss at the end of the phase."""
    most_skip_rate: float | None = None
    """Highest share of tokens that chose the skip class, 0 to 1, in the last step of the phase that
    the process which ended it has applied. A process that only skipped steps has measured none, so
    the gate is missed; one with no step left to make is not judged by its load."""
    least_load_entropy: float | None = None
    """Lowest H(p) / ln E over the experts, mean over layers, in the same step, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One row of the plan (report, tables II and III)."""

    tokens: int
    """Tokens to consume: sequences x context_tokens. Rounded up to whole steps."""
    context_tokens: int
    """Sequence length of a packed row."""
    rope_base: float
    """RoPE base during this phase."""
    global_batch_tokens: int
    """Tokens per optimizer step over all ranks; a multiple of context_tokens."""
    micro_batch_sequences: int = 1
    """Rows per rank and forward pass."""
    context_parallel: int = 1
    """Ranks that share one row (1, 1, 2, 8 in the report)."""
    mixture: dict[str, float]
    """Name of one of data.sources -> weight by tokens; only the ratios of weights count."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """Tokens of conversations that are targets: the assistant's, reasoning included, or all."""
    learning_rate_scale: float = 1.0
    """Multiplies both optimizers' peak learning rates in this phase."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    batch_ramp: BatchRampConfig | None = None
    exit_gate: GateConfig = field(default_factory=GateConfig)
    """Checked before anything behind this phase begins; a run that misses it stops with code 5."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The phases in order; the order of the mapping is the order of training."""

    phases: dict[str, PhaseConfig]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One corpus made by `zaya data prepare` or `zaya data synth`."""

    path: str
    """Corpus directory: tokens.bin, tokens.idx, sections, manifest.json."""
    max_epochs: float | None = None
    """Most passes over this source that the whole plan may take; more is an error at the start."""
    max_documents: int | None = None
    """Use no more than this many of its documents, chosen by the seed."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the tokens come from. Mixture weights are a phase's own."""

    sources: dict[str, SourceConfig]
    """Training corpora by name."""
    validation: dict[str, SourceConfig] = field(default_factory=dict)
    """Held-out corpora by name; losses are logged under these names."""
    validation_sequences: int = 16
    """Rows of each validation corpus scored at every evaluation."""
    max_documents_per_row: int = 1024
    """Cap on documents packed into one row."""
    balance_rows: int = 8
    """Rows of a source that come one after the other with about equal attention work: what the data
    ranks of a step share should be a multiple of their number. At most a step's rows; 1 turns
    balancing off."""
    plan_dir: str | None = None
    """Where packing plans are kept; None: `plans` inside every corpus."""
    prefetch_batches: int = 2
    """Batches prepared ahead of the step by a background thread; 0: none, the step waits."""


@dataclass(frozen=True, kw_only=True)
class MuonConfig:
    """Muon for matrices, update RMS matched to AdamW (arXiv 2502.16982, section 2.2)."""

    learning_rate: float
    """Peak learning rate, on AdamW's scale."""
    momentum: float = 0.95
    momentum_dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 halves the state, rounding to nearest once a step. A momentum up to 0.99 cannot stall:
    each step takes 1 % or more of it away and bf16 resolves 0.4 %. A checkpoint resumes only with
    the dtype it was saved with."""
    nesterov: bool = True
    weight_decay: float = 0.1
    """Decoupled."""
    newton_schulz_steps: int = 5
    newton_schulz_coefficients: Literal["jordan", "polar_express"] = "jordan"
    """Quintic of each step. jordan: 3.4445, -4.7750, 2.0315 (kellerjordan.github.io/posts/muon);
    singular values end in 0.68 to 1.20. polar_express: another one each step, arXiv 2505.16932;
    after five steps 0.87 to 1.12, after six 1 to 0.3 %. The report does not say which it used."""
    newton_schulz_schedule: tuple[tuple[float, ...], ...] = ()
    """Coefficients [a, b, c] of every step's a s + b s^3 + c s^5, instead of the named ones; as
    many as newton_schulz_steps. Singular values from 0.03 to 1 must end in 0.4 to 1.6."""
    newton_schulz_dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of the Newton-Schulz products; fp32 is faster on CPUs without bf16 matrix units."""
    update_rms: float = 0.2
    """Target RMS of an update: 0.2 sqrt(max(n, m)) times an orthogonal matrix."""


@dataclass(frozen=True, kw_only=True)
class AdamWConfig:
    """AdamW for embedding / LM head, norms, biases and scales."""

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled; applied to the embedding only."""


@dataclass(frozen=True, kw_only=True)
class BalancingConfig:
    """AdamW on the routers' balancing biases; its gradient is load - 1/E (report, II-A2)."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    skip_target: float | None = None
    """Share of the tokens that the controller steers towards the skip class, 0 to 1; the experts
    share the rest evenly. None: the skip class's bias stays at its initial -1, with which it is
    hardly ever chosen (released checkpoints)."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    muon: MuonConfig
    adamw: AdamWConfig
    balancing: BalancingConfig = field(default_factory=BalancingConfig)
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 turns clipping off."""
    z_loss: float = 0.0
    """Adds this times the squared log of its softmax's sum to each supervised token's loss, against
    drifting logits (arXiv 2204.02311, 5: 1e-4). Evaluations lack it."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How ranks are laid out. Data parallel degree = world / context_parallel."""

    shard: int = 0
    """Ranks over which FSDP shards parameters, context ranks included; 0 means all of them."""
    expert_parallel: int = 1
    """Ranks of an FSDP group among which each layer's experts are divided, tokens travelling to
    them; divides parallel.shard and model.num_experts. 1 gathers all experts on every rank, what
    ZAYA1 did (arXiv 2511.17127) and what 192 GB hold; more saves memory and costs two all-to-alls
    per layer and direction."""
    context_parallel_limit: int = 0
    """Largest context-parallel degree this launch can hold; phases that ask for more are lowered to
    it, and the log says so. 0 means no limit."""
    context_parallel_fit: bool = False
    """Lower a phase's degree to the largest that divides both it and the ranks of an FSDP group,
    and log it, instead of refusing the launch: for recipes that run on any number of ranks."""
    reshard_after_forward: bool = False
    """Free gathered weights between forward and backward (ZeRO-3) instead of keeping them."""
    accumulation: AccumulationKind = "keep_unsharded"
    """How the gradients of a step's micro-batches are added up. With P parameters, an FSDP group of
    S ranks, and bytes of fp32 besides the 4 P / S of the sharded gradient:

    keep_unsharded: each rank adds up whole gradients, one reduction per step; + 4 P bytes (35 GB
    for 8.8B parameters; of experts only those this rank computes).
    all_reduce_last: reduce-scatter after every micro-batch, all-reduce over replicas once;
    + 4 P / S bytes.
    reduce_each: reduce-scatter and all-reduce after every micro-batch; no more memory."""
    recompute: RecomputeKind = "none"
    """Activations made again in the backward pass: none, cheap ones (selective), or whole layers
    (full); model/recompute.py lists them. Routing is never made again."""
    context_chunks: Literal["head_tail", "contiguous"] = "head_tail"
    """Which chunks of a row a context-parallel rank holds; head_tail balances causal attention."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Back end per operation, by name; a name that cannot run here is an error."""

    cca: NativeKernelName = "eager"
    attention: AttentionName = "eager"
    norm_residual: NativeKernelName = "eager"
    router: NativeKernelName = "eager"
    moe_permute: NativeKernelName = "eager"
    """Sorts tokens by expert and moves them there and back."""
    grouped_mlp: GroupedMLPName = "eager"
    grouped_mlp_recompute: bool = False
    """Make the experts' pre-activation, 2 x expert_ffn_size numbers a token, again in the backward
    pass instead of keeping it: two ninths of the experts' products more. triton only."""
    linear_cross_entropy: NativeKernelName = "eager"
    newton_schulz: NewtonSchulzName = "eager"


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 100
    """Steps between checkpoints; a phase's end is always saved."""
    keep_last: int = 3
    """Newest verified checkpoints kept; at least 2. Phase ends are kept besides."""
    keep_every_steps: int = 0
    """Checkpoints of multiples of this many steps are kept besides, for good; 0: none."""
    asynchronous: bool = True
    """Copy the state to host memory at the step boundary and write it while training goes on; costs
    host memory for one more copy of the rank's state. Saves at a phase's end and at a stop are
    always waited for."""
    retry_seconds: float = 10.0
    """Wait before a failed save that may not be skipped (end of a phase, stop) is tried again."""
    initial_weights: str | None = None
    """Hugging Face `zaya` folder to start from instead of a fresh initialisation."""
    branch_from: str | None = None
    """Checkpoint directory of another run that a run without checkpoints of its own goes on from:
    weights, optimizer and data position, under this configuration's phases ahead."""
    allow_changed: tuple[str, ...] = ()
    """Math keys (config.kinds: NAMEABLE) whose values may differ from those of the checkpoint that
    the run resumes from; any other that differs is an error, unless the attempt before had the
    value too: a name is needed once."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    every_steps: int = 1
    """Steps between console lines and metrics rows."""
    eval_every_steps: int = 50
    """Steps between validation losses; 0 turns them off."""
    trace_steps: int = 0
    """Steps whose routing is recorded below <run.dir>/routing, for `zaya router` to replay under
    other gains; 0: none. A step is layers x trace_tokens x classes x 4 bytes: 1.4 MB for 40 layers
    of 17 classes and 512 tokens."""
    trace_first_step: int = 1
    """The first of them."""
    trace_tokens: int = 512
    """Tokens whose probabilities are kept, of the writing rank's first micro-batch."""
    wandb: Literal["disabled", "offline", "online"] = "offline"
    wandb_project: str = "zaya-train"
    tensorboard: bool = True
    progress: bool = True
    """Progress bar on a terminal."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    name: str
    """Names the run in logs and its directory."""
    dir: str
    """Everything the run writes goes below this directory."""
    seed: int = 0
    """Seeds initialisation and data order."""
    only_phase: str | None = None
    """Run this phase of the plan alone, from the end of the one before, and exit 0 at its end: one
    job of a chain, whose layout needs to suit no other phase. None runs the plan."""


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the accelerator if torch sees one, else the CPU. ROCm devices are `cuda` to torch."""
    init_timeout_seconds: float = 600.0
    """Longest wait for all ranks to appear."""
    step_timeout_seconds: float = 300.0
    """Longest wait inside a collective once the first step is done."""
    threads: int = 0
    """CPU threads per rank; 0 divides the cores among the ranks of this node."""
    memory_gb: float | None = None
    """Memory of a rank's device, 10^9 bytes, that a launch must fit with a tenth to spare; None:
    what the accelerator says, or a CPU rank's share of the machine. `submit` knows no other."""
    memory_check: Literal["refuse", "warn"] = "refuse"
    """What becomes of a launch whose forecast peak does not fit (docs/planner.md)."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run."""

    run: RunConfig
    model: ModelConfig
    plan: PlanConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    supervisor: SupervisorConfig = field(default_factory=SupervisorConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
