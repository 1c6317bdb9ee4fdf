"""Runs under a real Slurm: interrupted in every way it knows, resumed to the same weights."""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from rich.console import Console

from tests.helpers.shell import executable
from tests.integration.runs import (
    ENVIRONMENT,
    Launched,
    last_step,
    make_corpora,
    overrides_for,
    values_for,
)
from tests.slurm.cluster import Cluster, why_not
from zaya_train.config.errors import ConfigError
from zaya_train.main import compose, compose_submission
from zaya_train.run import CHECKPOINTS
from zaya_train.tools.compare import compare_runs
from zaya_train.tools.submit import SubmitRequest, submit
from zaya_train.train.metrics import read_metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no Slurm here: {why_not()}")

RESOURCES = [
    "cluster=cpu", "nodes=2", "tasks_per_node=1", "time_limit_minutes=30", "preflight=off",
    f"container.python={sys.executable}",
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as started:
        yield started


@pytest.fixture(autouse=True)
def as_a_user(monkeypatch: pytest.MonkeyPatch, cluster: Cluster) -> None:
    """What sbatch takes over from the shell it is called in."""
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpus"))


def changes(steps: int) -> dict[str, Any]:
    """So many steps in the first phase, for events to fall into, and five in the second."""
    return {
        "plan.phases.short.tokens": steps * 256,
        "plan.phases.short.schedule": {"kind": "constant"},
        "checkpoint.every_steps": 50,
        "logging.eval_every_steps": 0,
    }


def unbroken(folder: Path, corpora: Path, steps: int) -> Path:
    launched = Launched(
        overrides_for(values_for(folder / "run", corpora, changes(steps))), folder, ranks=2
    )
    assert launched.wait(3000.0) == [0, 0], launched.output()
    return folder / "run"


class Submitted:
    """A run below `folder`, handed to Slurm as `zaya submit` does it."""

    def __init__(self, cluster: Cluster, folder: Path, corpora: Path, steps: int) -> None:
        self.cluster = cluster
        self.run_dir = folder / "run"
        self.overrides = overrides_for(values_for(self.run_dir, corpora, changes(steps)))

    def submit(self, *words: str) -> list[str]:
        resources, overrides = compose_submission([*RESOURCES, *words, *self.overrides])
        console = Console(quiet=True)
        return submit(SubmitRequest(resources, compose(overrides)), console)

    def reaches(self, step: int, job: str) -> None:
        """Wait for a step; fails when the job ends before."""

        asked = 0

        def there() -> bool:
            nonlocal asked
            asked += 1
            # Not each time: to ask takes as long as some steps.
            if asked % 100 == 0:
                state = self.cluster.facts(job)["JobState"]
                alive = state in ("PENDING", "RUNNING", "COMPLETING")
                assert alive or last_step(self.run_dir) >= step, self.output()
            return last_step(self.run_dir) >= step

        self.cluster.until(there, f"step {step}\n{self.output()}")

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """Ranks do not move inside, however long the commands in there take: steps are tiny, and
        the run would be over. The nodes are processes of this machine."""
        ranks = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # gone meanwhile
                words = path.read_bytes().decode(errors="replace").split("\0")
                if words[0] == sys.executable and f"{self.run_dir}/submit/" in " ".join(words):
                    ranks.append(int(path.parent.name))
        assert len(ranks) == 2, ranks
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        yield
        for rank in ranks:
            with suppress(ProcessLookupError):
                os.kill(rank, signal.SIGCONT)

    def output(self) -> str:
        """Everything the jobs and their ranks said."""
        logs = sorted((self.run_dir / "slurm").rglob("*.log"))
        return "".join(f"== {path}\n{path.read_text()}" for path in logs)

    def resumed_at(self) -> list[int]:
        return [row["step"] for row in read_metrics(self.run_dir) if row["kind"] == "resume"]


def test_a_run_survives_warning_drain_and_cancel(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    """Warned as before a time limit while a node is drained; requeued on other nodes; cancelled;
    submitted again, now with a preflight before it; the weights are those of a run that nothing
    happened to."""
    steps = 200
    run = Submitted(cluster, tmp_path / "slurm", corpora, steps)
    (job,) = run.submit()
    run.reaches(20, job)
    with run.standing_still():
        assert cluster.facts(job)["NodeList"] == "n[1-2]"
        cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
        # What Slurm sends ahead of the time limit: USR1 to the batch shell alone.
        cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.until(lambda: cluster.facts(job)["Restarts"] == "1", "requeue\n" + run.output())
    stopped = last_step(run.run_dir)
    assert stopped < steps and (run.run_dir / CHECKPOINTS / f"step-{stopped:08d}").is_dir()

    run.reaches(stopped + 1, job)
    with run.standing_still():
        assert cluster.facts(job)["NodeList"] == "n[1,3]"
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
        cluster.run("scancel", job)
    cluster.until_state(job, "CANCELLED")
    # Cancelled for good, but not without a checkpoint: nothing requeued the job behind our back.
    cluster.until(lambda: "not requeued by this script" in run.output(), run.output())
    cancelled = last_step(run.run_dir)
    assert stopped < cancelled < steps
    assert cluster.facts(job)["JobState"] == "CANCELLED"

    (again,) = run.submit("preflight=quick")
    cluster.until_state(again, "COMPLETED", "FAILED")
    assert cluster.facts(again)["ExitCode"] == "0:0", run.output()
    (report,) = run.run_dir.glob("slurm/*/*/preflight.json")
    findings = json.loads(report.read_text())
    assert findings["verdict"] == "PASS"
    # Both ranks took part, each as a node of its own: Slurm's names, not the host's.
    assert {f["node"] for f in findings["findings"]} >= {"n1", "n2"}, findings
    assert run.resumed_at() == [stopped, cancelled]
    comparison = compare_runs(run.run_dir, unbroken(tmp_path / "unbroken", corpora, steps))
    assert comparison.equal, comparison.text()
    assert comparison.steps == steps + 5


def test_a_configuration_that_cannot_run_is_not_requeued(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    """Exit code 2, of a frozen file edited after submission: failed once, and the chain with it."""
    run = Submitted(cluster, tmp_path, corpora, 8)
    # Held until the file has been tampered with.
    jobs = run.submit("chain=phases", "++directives.hold=")
    for path in (run.run_dir / "submit").glob("tiny-short-*.json"):
        content = json.loads(path.read_text())
        content["config"]["run"]["seed"] += 1
        path.write_text(json.dumps(content))
    for job in jobs:
        cluster.run("scontrol", "release", job)
    cluster.until_state(jobs[0], "FAILED")
    assert cluster.facts(jobs[0])["ExitCode"] == "2:0", run.output()
    assert cluster.facts(jobs[0])["Restarts"] == "0"
    assert "was edited" in run.output()
    cluster.until_state(jobs[1], "CANCELLED")


def test_excluded_nodes_stay_excluded(cluster: Cluster, corpora: Path, tmp_path: Path) -> None:
    """With a stand-in for the interpreter, as no node here fails a check of its own: each start
    names the first node it is on."""
    names = 'while [ "$1" != --exclude-file ]; do shift; done\n'
    names += '[ "$RANK" != 0 ] || echo "$SLURMD_NODENAME" > "$2"\nexit 1'
    python = executable(tmp_path / "python", names)
    run = Submitted(cluster, tmp_path / "slurm", corpora, 8)
    # One node at a time, so that a third start has one left.
    words = ["nodes=1", "preflight=quick", f"container.python={python}", "crash_limit=3"]
    (job,) = run.submit(*words)
    cluster.until_state(job, "FAILED", "CANCELLED", "COMPLETED")
    facts = cluster.facts(job)
    assert (facts["ExitCode"], facts["Restarts"]) == ("6:0", "2"), run.output()
    assert facts["ExcNodeList"] == "n1,n2" and facts["NodeList"] == "n3", facts
    assert "crash 3 without a new checkpoint: giving up" in run.output()


@pytest.mark.nightly
def test_a_chain_of_phases_on_different_nodes(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    """A job per phase, the second on other nodes and with another FSDP degree."""
    run = Submitted(cluster, tmp_path / "slurm", corpora, 100)
    words = ["chain=phases", "jobs.long.nodes=3", "jobs.long.shard=1", "time_limit_minutes=10"]
    with pytest.raises(ConfigError, match=r"plan\.phases\.long\.global_batch_tokens: 256"):
        run.submit(*words)
    jobs = run.submit("chain=phases", "jobs.short.nodes=1", "jobs.short.shard=1")
    cluster.until_state(jobs[-1], "COMPLETED", "FAILED", "CANCELLED")
    assert [cluster.facts(job)["JobState"] for job in jobs] == ["COMPLETED"] * 2, run.output()
    worlds = [row["world_size"] for row in read_metrics(run.run_dir) if "world_size" in row]
    assert worlds == [1, 2]
    assert last_step(run.run_dir) == 105


@pytest.mark.nightly
@pytest.mark.timeout(5000)
def test_the_real_time_limit_warns_and_requeues(
    cluster: Cluster, corpora: Path, tmp_path: Path
) -> None:
    """A limit of three minutes, and a run that takes longer on whatever machine this is."""
    sample = unbroken(tmp_path / "sample", corpora, 50)
    seconds = [row["step_seconds"] for row in read_metrics(sample) if row["kind"] == "step"]
    steps = max(1000, int(200 / statistics.median(seconds)))
    run = Submitted(cluster, tmp_path / "slurm", corpora, steps)
    # The warning may come up to 60 s early (sbatch's manual): 60 to 120 s after the start.
    (job,) = run.submit("time_limit_minutes=3", "lead_seconds=60")
    cluster.until_state(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", patience=3000.0)
    assert cluster.facts(job)["JobState"] == "COMPLETED", run.output()
    # A start that was warned before its ranks listened has resumed nothing.
    assert 1 <= len(run.resumed_at()) <= int(cluster.facts(job)["Restarts"])
    comparison = compare_runs(run.run_dir, unbroken(tmp_path / "unbroken", corpora, steps))
    assert comparison.equal, comparison.text()


@pytest.mark.nightly
def test_a_lost_node_and_a_killed_rank(cluster: Cluster, corpora: Path, tmp_path: Path) -> None:
    """Slurm requeues after a lost node by itself; the script does after a crash."""
    steps = 300
    run = Submitted(cluster, tmp_path / "slurm", corpora, steps)
    (job,) = run.submit()
    run.reaches(20, job)
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    cluster.until(lambda: cluster.facts(job)["Restarts"] == "1", "requeue\n" + run.output())
    lost = last_step(run.run_dir)
    run.reaches(lost + 20, job)
    cluster.run("scancel", "--signal=KILL", f"{job}.0")
    cluster.until(lambda: cluster.facts(job)["Restarts"] == "2", "requeue\n" + run.output())
    cluster.run("scontrol", "update", "NodeName=n2", "State=IDLE")
    cluster.until_state(job, "COMPLETED", "FAILED")
    assert cluster.facts(job)["JobState"] == "COMPLETED", run.output()
    assert "crash 1 of 3 at this checkpoint" in run.output()
    comparison = compare_runs(run.run_dir, unbroken(tmp_path / "unbroken", corpora, steps))
    assert comparison.equal, comparison.text()
