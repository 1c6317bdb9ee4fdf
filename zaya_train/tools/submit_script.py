"""The job script of `zaya submit`: launch/slurm/train.sbatch.template with directives, settings and
environment filled in."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import zaya_train
from zaya_train.config.cluster import DIRECTIVE_KEYS
from zaya_train.planning.checkpoint import checkpoint_bytes
from zaya_train.tools.launch_environment import shell_lines

if TYPE_CHECKING:
    from zaya_train.config.cluster import ContainerConfig, SubmitConfig
    from zaya_train.config.schema import TrainConfig

_MARK = "##@"


@dataclass(frozen=True)
class Job:
    """One job of a submission; paths are relative to the folder it is submitted from."""

    name: str
    submit: SubmitConfig
    config: TrainConfig
    frozen: Path
    """The frozen configuration, read by the ranks."""
    script: Path
    lead_seconds: int
    """Warning ahead of the time limit."""

    @property
    def ranks(self) -> int:
        """Processes over all nodes."""
        return self.submit.nodes * self.submit.tasks_per_node


def launch_dir() -> Path:
    """launch/ of the checkout, or its copy inside an installed package."""
    package = Path(zaya_train.__file__).parent
    installed = package / "_launch"
    return installed if installed.is_dir() else package.parent / "launch"


def render(job: Job) -> str:
    """The whole script."""
    template = (launch_dir() / "slurm" / "train.sbatch.template").read_text(encoding="ascii")
    parts = {
        "title": [
            f"# Job of run {job.config.run.name}, made by `zaya submit`: submit again to edit."
        ],
        "directives": directives(job),
        "settings": settings(job),
        "environment": shell_lines(job.submit.environment),
    }
    lines = []
    for line in template.splitlines():
        lines += parts[line.removeprefix(_MARK)] if line.startswith(_MARK) else [line]
    return "\n".join(lines) + "\n"


def directives(job: Job) -> list[str]:
    """The #SBATCH lines with what a reader may ask about them."""
    submit = job.submit
    hours, minutes = divmod(submit.time_limit_minutes, 60)
    options = {
        "job-name": job.name,
        "nodes": str(submit.nodes),
        "ntasks-per-node": str(submit.tasks_per_node),
        "gpus-per-node": str(submit.gpus_per_node) if submit.gpus_per_node else "",
        "cpus-per-task": str(submit.cpus_per_task),
        "time": f"{hours}:{minutes:02}:00",
        **{name: getattr(submit, name) for name in DIRECTIVE_KEYS},
    }
    given = {name: value for name, value in options.items() if value} | submit.directives
    lines = ["#"]
    lines += [f"#SBATCH --{name}={value}".rstrip("=") for name, value in given.items()]
    return [
        *lines,
        "# Whole nodes: a neighbour would share links, memory and page cache.",
        "#SBATCH --exclusive",
        "# Slurm starts the job again after a node failure.",
        "#SBATCH --requeue",
        f"# {job.lead_seconds} s for the step, evaluation and save under way and one more save.",
        f"#SBATCH --signal=B:USR1@{job.lead_seconds}",
        "# One log over all starts; the ranks' own are kept per start.",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={Path(job.config.run.dir) / 'slurm' / '%x-%j.log'}",
    ]


def settings(job: Job) -> list[str]:
    """Shell variables of the script."""
    submit = job.submit
    # Those kept, the one being written, and the end of a phase.
    checkpoints = job.config.checkpoint.keep_last + 2
    values = {
        "run_dir": job.config.run.dir,
        "config": str(job.frozen),
        "preflight": submit.preflight,
        "free_gib": f"{checkpoints * checkpoint_bytes(job.config) / 2**30:.1f}",
        "exclude": submit.exclude,
        "crash_limit": str(submit.crash_limit),
        "requeue_limit": str(submit.requeue_limit),
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    python, options = _start(submit)
    return [
        *lines,
        f"python=({python})",
        "# srun does not take --cpus-per-task over from the job (Slurm 22.05 and later).",
        f"options=({options})",
        f"export TASKS_PER_NODE={submit.tasks_per_node}",
        "",
    ]


def _start(submit: SubmitConfig) -> tuple[str, str]:
    """Words before `-m zaya_train` and options of srun, as shell text."""
    container = submit.container
    options = [f"--cpus-per-task={submit.cpus_per_task}", *submit.binding.split()]
    python = shlex.quote(container.python)
    if container.kind == "venv":
        return python, " ".join(map(shlex.quote, options))
    if container.kind == "apptainer":
        words = ["apptainer", "exec", *(["--rocm"] if submit.gpus_per_node else [])]
        words += ["--bind", _mounts(container, "$PWD"), "--pwd", '"$PWD"']
        words += [shlex.quote(container.image), python]
        return " ".join(words), " ".join(map(shlex.quote, options))
    own = [
        f"--container-image={shlex.quote(container.image)}",
        f"--container-mounts={_mounts(container, '$PWD:$PWD')}",
        '--container-workdir="$PWD"',
    ]
    return python, " ".join([*map(shlex.quote, options), *own])


def _mounts(container: ContainerConfig, here: str) -> str:
    """The working directory and what the configuration adds, for a shell that knows $PWD."""
    return f'"{here},{container.mounts}"' if container.mounts else f'"{here}"'
