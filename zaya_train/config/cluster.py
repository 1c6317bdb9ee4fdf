"""How jobs of a run are asked for: `zaya submit` and configs/cluster/*.yaml."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from zaya_train.config.errors import ConfigError
from zaya_train.config.schema import (  # noqa: TC001 (`build` reads the fields' types)
    AccumulationKind,
    RecomputeKind,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from zaya_train.config.schema import TrainConfig


@dataclass(frozen=True, kw_only=True)
class VariableConfig:
    """An environment variable of every rank. One that is set already at submission wins."""

    value: str
    reason: str
    """Why it is set, one sentence; rendered above the export."""
    source: str = ""
    """Where the advice is from."""


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    kind: Literal["venv", "apptainer", "pyxis"] = "venv"
    """venv runs `python` as it is; apptainer and pyxis (Slurm's plug-in for enroot) run it in
    `image`."""
    image: str = ""
    """A .sif file for apptainer; a .sqsh file or registry name for pyxis."""
    mounts: str = ""
    """Host folders the container sees besides the working directory: /data,/scratch:/tmp."""
    python: str = ".venv/bin/python"
    """Interpreter with zaya-train installed: from the working directory, or inside the image."""


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """What one phase's job of a chain has otherwise than the others; None means as they do."""

    nodes: int | None = None
    time_limit_minutes: int | None = None
    shard: int | None = None
    """parallel.shard, and so on below."""
    expert_parallel: int | None = None
    accumulation: AccumulationKind | None = None
    recompute: RecomputeKind | None = None
    reshard_after_forward: bool | None = None


@dataclass(frozen=True, kw_only=True)
class SubmitConfig:
    """Jobs under Slurm. Keys on the command line stand beside those of the run:
    zaya submit recipe=zaya1_8b nodes=128 partition=gpu."""

    nodes: int
    tasks_per_node: int = 8
    """Ranks of a node: one per GPU."""
    gpus_per_node: int = 8
    """0 asks Slurm for none, for CPU clusters."""
    cpus_per_task: int = 12
    time_limit_minutes: int = 1440
    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    exclude: str = ""
    """Nodes not to be used, as Slurm writes them: node[3,17-18]."""
    directives: dict[str, str] = field(default_factory=lambda: {"mem": "0"})
    """Further #SBATCH options by name, such as mail-user; one with an empty value stands alone.
    `mem: 0` is a node's whole memory: --exclusive alone gives the partition's default of it."""
    binding: str = "--cpu-bind=cores --distribution=block:block"
    """Options of srun that place ranks on cores."""
    lead_seconds: int = 0
    """Warning before the time limit. 0: from the run's own step, evaluation and save times where it
    has metrics already, 300 where it has not."""
    chain: Literal["run", "phases"] = "run"
    """run: one job for the plan. phases: a job per phase, each after the success of the one
    before."""
    preflight: Literal["off", "quick", "full"] = "quick"
    """Checks on every node at each start of the job; nodes that fail are excluded."""
    crash_limit: int = 3
    """Crashes in a row without a new checkpoint after which the job gives up with exit code 6."""
    requeue_limit: int = 1000
    """Starts of one job after which it gives up, whatever the reason."""
    container: ContainerConfig = field(default_factory=ContainerConfig)
    environment: dict[str, VariableConfig] = field(default_factory=dict)
    jobs: dict[str, JobConfig] = field(default_factory=dict)
    """Differences by phase; only with chain=phases."""


PARALLEL_KEYS = (
    "shard",
    "expert_parallel",
    "accumulation",
    "recompute",
    "reshard_after_forward",
)
DIRECTIVE_KEYS = ("partition", "account", "qos", "constraint", "exclude")
_VARIABLE_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
_PLAIN = re.compile(r"[^\"$`\\{}\n]*")
"""What stands for itself inside the quotes of a shell."""
_OPTION_NAME = re.compile(r"[a-z][a-z0-9-]*")
_OPTION_VALUE = re.compile(r"[^\s\"'\\#]*")
"""What sbatch takes over from a line as it is: no word's end, quote, escape or comment."""


def submit_problems(submit: SubmitConfig, phases: list[str]) -> Iterator[str]:
    """Every rule that a submission to a plan of `phases` breaks, one line each."""
    for name in ("nodes", "tasks_per_node", "cpus_per_task", "crash_limit", "requeue_limit"):
        if (value := getattr(submit, name)) < 1:
            yield f"{name}: {value} must be positive"
    if submit.gpus_per_node not in (0, submit.tasks_per_node):
        yield (
            f"gpus_per_node: {submit.gpus_per_node} for {submit.tasks_per_node} tasks_per_node; "
            "every rank has one GPU, or none has (0)"
        )
    yield from _times("", submit.time_limit_minutes, submit.lead_seconds)
    if not _PLAIN.fullmatch(submit.container.mounts):
        yield f"container.mounts: {submit.container.mounts!r} holds what a shell would interpret"
    if submit.container.kind != "venv" and not submit.container.image:
        yield f"container.image: empty, and container.kind={submit.container.kind} needs one"
    for name, variable in submit.environment.items():
        if not _VARIABLE_NAME.fullmatch(name):
            yield f"environment.{name}: not the name of an environment variable"
        if not _PLAIN.fullmatch(variable.value):
            yield f"environment.{name}.value: {variable.value!r} holds what a shell would interpret"
        if not variable.reason.strip():
            yield f"environment.{name}.reason: empty; every variable states why it is set"
    if submit.jobs and submit.chain != "phases":
        yield f"jobs: only chain=phases has a job per phase, chain is {submit.chain}"
    for name, job in submit.jobs.items():
        if name not in phases:
            yield f"jobs.{name}: not a phase of the plan ({', '.join(phases)})"
        if job.nodes is not None and job.nodes < 1:
            yield f"jobs.{name}.nodes: {job.nodes} must be positive"
        if job.time_limit_minutes is not None:
            yield from _times(f"jobs.{name}.", job.time_limit_minutes, submit.lead_seconds)


def directive_problems(submit: SubmitConfig, config: TrainConfig) -> Iterator[str]:
    """Values that would not reach Slurm as they are in an #SBATCH line, one line each."""
    values = {name: getattr(submit, name) for name in DIRECTIVE_KEYS}
    values |= {f"directives.{name}": value for name, value in submit.directives.items()}
    for key, value in {**values, "run.name": config.run.name, "run.dir": config.run.dir}.items():
        if not _OPTION_VALUE.fullmatch(value):
            yield (
                f"{key}: {value!r} ends or changes an #SBATCH line; no white space, quotes, "
                "backslashes or #"
            )
    for key, value, letters in (
        ("run.name", config.run.name, "%/"),
        ("run.dir", config.run.dir, "%"),
    ):
        if set(value) & set(letters):
            yield f"{key}: {value!r} is part of a log's path, where Slurm replaces %; no {letters}"
    for name in submit.directives:
        if not _OPTION_NAME.fullmatch(name):
            yield f"directives.{name}: not the name of an option of sbatch"


def _times(prefix: str, limit_minutes: int, lead_seconds: int) -> Iterator[str]:
    if limit_minutes < 1:
        yield f"{prefix}time_limit_minutes: {limit_minutes} must be positive"
    # Slurm keeps the lead in 16 bits.
    if not 0 <= lead_seconds <= 65535:
        yield f"lead_seconds: {lead_seconds} must lie in 0 to 65535"
    elif limit_minutes >= 1 and lead_seconds >= 60 * limit_minutes:
        yield (
            f"lead_seconds: {lead_seconds} leaves nothing of {prefix}time_limit_minutes "
            f"{limit_minutes}"
        )


def of_phase(
    submit: SubmitConfig, config: TrainConfig, phase: str
) -> tuple[SubmitConfig, TrainConfig]:
    """Resources and configuration of the job that runs `phase` alone."""
    job = submit.jobs.get(phase, JobConfig())
    given = {key: getattr(job, key) for key in PARALLEL_KEYS if getattr(job, key) is not None}
    resources = {
        key: getattr(job, key)
        for key in ("nodes", "time_limit_minutes")
        if getattr(job, key) is not None
    }
    run = replace(config.run, only_phase=phase)
    parallel = replace(config.parallel, **given)
    return replace(submit, **resources), replace(config, run=run, parallel=parallel)


def check_submission(submit: SubmitConfig, phases: list[str]) -> None:
    """ConfigError with every broken rule of `submit_problems`."""
    if broken := list(submit_problems(submit, phases)):
        raise ConfigError("; ".join(broken))
