"""`zaya submit`: a run as one Slurm job, or as a chain of jobs with a phase each."""

from __future__ import annotations

import math
import shutil
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_train.config.check import problems
from zaya_train.config.cluster import check_submission, directive_problems, of_phase
from zaya_train.config.derive import config_hash
from zaya_train.config.errors import ConfigError
from zaya_train.config.frozen import frozen
from zaya_train.data.check import check_corpora
from zaya_train.planning.expected import check_memory
from zaya_train.runtime.files import write_json, write_text
from zaya_train.tools.submit_script import Job, render
from zaya_train.train.metrics import METRICS_FILE, iter_rows

if TYPE_CHECKING:
    from rich.console import Console

    from zaya_train.config.cluster import SubmitConfig
    from zaya_train.config.schema import TrainConfig

LEAD_SECONDS = 300
"""Where the run has no figures of its own yet: guesses of a first save and evaluation, doubled."""
SUBMISSIONS = "submit"
_LEAST_LEAD_SECONDS = 60


@dataclass(frozen=True)
class SubmitRequest:
    """What to submit; a dry run writes the files and submits nothing."""

    submit: SubmitConfig
    config: TrainConfig
    dry_run: bool = False


def submit(request: SubmitRequest, console: Console) -> list[str]:
    """Check everything, write configurations and scripts below the run directory, hand the jobs to
    Slurm. Returns their ids in order, none in a dry run.

    Raises:
        ConfigError: a key that cannot work, on whichever job; no sbatch here; or Slurm refused.
        DataError: a corpus is missing or damaged (not in a dry run, which may be elsewhere).
    """
    jobs = plan_jobs(request)
    for line in _check(jobs):
        console.print(f"warning: {line}", soft_wrap=True, markup=False)
    if not request.dry_run:
        check_corpora(request.config)
        if shutil.which("sbatch") is None:
            raise ConfigError("no sbatch here: submit from a login node, or write with --dry-run")
    (Path(request.config.run.dir) / "slurm").mkdir(parents=True, exist_ok=True)
    for job in jobs:
        write_json(job.frozen, frozen(job.config))
        write_text(job.script, render(job))
    return _hand_over(jobs, request, console)


def plan_jobs(request: SubmitRequest) -> list[Job]:
    """The jobs in the order of the plan; nothing is written."""
    config = request.config
    check_submission(request.submit, list(config.plan.phases))
    folder = Path(config.run.dir) / SUBMISSIONS
    lead = request.submit.lead_seconds or lead_from(Path(config.run.dir))
    whole = [(config.run.name, request.submit, config)]
    chain = [
        (f"{config.run.name}-{phase}", *of_phase(request.submit, config, phase))
        for phase in config.plan.phases
    ]
    jobs = []
    for name, resources, own in chain if request.submit.chain == "phases" else whole:
        path = folder / f"{name}-{config_hash(own)}.json"
        jobs.append(Job(name, resources, own, path, folder / f"{name}.sbatch", lead))
    return jobs


def _check(jobs: list[Job]) -> list[str]:
    """ConfigError with every rule broken by any job, said once; else what is to be said."""
    broken = [p for job in jobs for p in problems(job.config, job.ranks)]
    for job in jobs:
        broken += directive_problems(job.submit, job.config)
        limit = 60 * job.submit.time_limit_minutes
        if job.lead_seconds >= limit:
            broken.append(
                f"time_limit_minutes: {limit} s of job {job.name} hold no more than the warning of "
                f"{job.lead_seconds} s that the run's measured times ask for (lead_seconds)"
            )
    if broken:
        raise ConfigError("; ".join(dict.fromkeys(broken)))
    said = [
        check_memory(job.config, job.ranks, job.submit.tasks_per_node, None, "") for job in jobs
    ]
    return [line for line in dict.fromkeys(said) if line]


def lead_from(run_dir: Path) -> int:
    """Seconds between warning and time limit: a minute more than twice the longest step, evaluation
    and save that the run has seen, LEAD_SECONDS where it has not saved yet.

    Twice: the warning may come just after one has begun, and a failed save is tried again.
    """
    path = run_dir / METRICS_FILE
    if not path.exists():
        return LEAD_SECONDS
    longest = {"step": 0.0, "eval": 0.0, "checkpoint": 0.0}
    before = None
    for row in iter_rows(path):
        kind = row["kind"]
        if kind == "step":
            seconds = row["step_seconds"]
        elif kind == "checkpoint":
            seconds = row["seconds"]
        else:
            seconds = row["wall_time"] - (before or row["wall_time"])
        if kind in longest and math.isfinite(seconds):
            longest[kind] = max(longest[kind], seconds)
        before = row["wall_time"]
    if not longest["checkpoint"]:
        return LEAD_SECONDS
    return _LEAST_LEAD_SECONDS + math.ceil(2 * sum(longest.values()))


def _hand_over(jobs: list[Job], request: SubmitRequest, console: Console) -> list[str]:
    ids: list[str] = []
    for job in jobs:
        before = ids[-1] if ids else "JOB-BEFORE" if job is not jobs[0] else ""
        command = ["sbatch", "--parsable"]
        if before:
            # A predecessor that failed for good leaves nothing to wait for.
            command += [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"]
        command.append(str(job.script))
        if request.dry_run:
            console.print(f"not submitted: {' '.join(command)}", soft_wrap=True, markup=False)
            continue
        try:
            ids.append(_sbatch(command))
        except ConfigError as error:
            if not ids:
                raise
            record = _record(jobs, ids, Path(request.config.run.dir))
            queued = " ".join(ids)
            raise ConfigError(
                f"{error}; the jobs before it are queued ({record}), to take them back: "
                f"scancel {queued}"
            ) from error
        console.print(
            f"job {ids[-1]}: {job.name}, {job.submit.nodes} nodes, {job.ranks} ranks, {job.script}",
            soft_wrap=True,
            markup=False,
        )
    if ids:
        _record(jobs, ids, Path(request.config.run.dir))
    return ids


def _sbatch(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"{' '.join(command)}: {said}")
    # ID, or ID;CLUSTER in a federation.
    return done.stdout.strip().split(";")[0]


def _record(jobs: list[Job], ids: list[str], run_dir: Path) -> Path:
    """What was submitted when, one file per submission: the first jobs, those that have an id."""
    now = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    rows = [
        {"id": number, "name": job.name, "ranks": job.ranks, "config": str(job.frozen)}
        for job, number in zip(jobs, ids, strict=False)
    ]
    path = run_dir / SUBMISSIONS / f"jobs-{now}-{ids[0]}.json"
    write_json(path, rows)
    return path
