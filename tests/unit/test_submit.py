"""`zaya submit`: the scripts as golden files, what they do on every exit code, and what is refused.

The same scripts run under a real Slurm in tests/slurm. After a deliberate change:

    ZAYA_WRITE_GOLDEN=1 python -m pytest tests/unit/test_submit.py -k golden
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from functools import lru_cache
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from tests.helpers.paths import REPOSITORY
from tests.helpers.shell import executable, only, shellcheck
from zaya_train.config.cluster import SubmitConfig
from zaya_train.config.errors import ConfigError
from zaya_train.config.frozen import frozen, thaw
from zaya_train.config.schema import TrainConfig
from zaya_train.main import _parser, compose, compose_submission
from zaya_train.main import main as zaya
from zaya_train.tools.launch_environment import shell_file
from zaya_train.tools.submit import LEAD_SECONDS, SubmitRequest, lead_from, plan_jobs, submit
from zaya_train.tools.submit_script import Job, render
from zaya_train.train.metrics import ROW_FIELDS

if TYPE_CHECKING:
    from pathlib import Path

GOLDEN = REPOSITORY / "tests" / "golden" / "sbatch"
PUBLISHED = ["recipe=zaya1_8b", "nodes=128"]
VARIANTS = {
    "zaya1_8b_128": [],
    "zaya1_8b_128_apptainer": [
        "container.kind=apptainer",
        "container.image=zaya-train.sif",
        "container.mounts=/scratch,/data",
        "container.python=/opt/zaya-train/.venv/bin/python",
    ],
    "zaya1_8b_128_pyxis": ["container.kind=pyxis", "container.image=zaya-train.sqsh"],
    "zaya1_8b_chain": [
        "chain=phases",
        "partition=gpu",
        "account=research",
        "exclude=node[7-8]",
        "directives.mail-user=me@example.org",
        "jobs.sft.nodes=64",
        "jobs.sft.time_limit_minutes=2880",
        "jobs.midtrain.shard=16",
    ],
}


@lru_cache
def composed(*overrides: str) -> TrainConfig:
    return compose(list(overrides))


def jobs_of(words: list[str]) -> list[Job]:
    resources, overrides = compose_submission(words)
    return plan_jobs(SubmitRequest(resources, composed(*overrides)))


def refusal(words: list[str]) -> str:
    resources, overrides = compose_submission(words)
    with pytest.raises(ConfigError) as caught:
        submit(SubmitRequest(resources, composed(*overrides), True), Console(quiet=True))
    return str(caught.value)


@pytest.mark.parametrize("name", VARIANTS)
def test_rendered_scripts_are_golden_and_shellcheck_clean(name: str, tmp_path: Path) -> None:
    jobs = jobs_of([*PUBLISHED, *VARIANTS[name]])
    paths = []
    for job in jobs:
        # The hash of the whole configuration changes with every key added to the schema.
        text = render(job).replace(job.frozen.stem, f"{job.name}-HASH")
        golden = GOLDEN / (f"{name}.sbatch" if len(jobs) == 1 else f"{name}_{job.name}.sbatch")
        if os.environ.get("ZAYA_WRITE_GOLDEN") == "1":
            golden.write_text(text)
        assert golden.read_text() == text, golden
        paths.append(tmp_path / f"{job.name}.sbatch")
        paths[-1].write_text(text)
    shellcheck(paths)


def test_no_golden_file_is_left_over() -> None:
    names = {f"{name}.sbatch" for name in VARIANTS if "chain" not in name}
    phases = ("pretrain_1", "pretrain_2", "midtrain", "sft")
    names |= {f"zaya1_8b_chain_zaya1_8b-{phase}.sbatch" for phase in phases}
    assert {path.name for path in GOLDEN.iterdir()} == names


def test_a_chain_has_a_job_per_phase_with_its_own_layout() -> None:
    jobs = jobs_of([*PUBLISHED, *VARIANTS["zaya1_8b_chain"]])
    assert [job.config.run.only_phase for job in jobs] == list(jobs[0].config.plan.phases)
    assert [job.ranks for job in jobs] == [1024, 1024, 1024, 512]
    assert [job.config.parallel.shard for job in jobs] == [8, 8, 16, 8]
    # Nothing else differs, or the next job would refuse the checkpoint of the one before.
    assert len({json.dumps(frozen(job.config)["config"]["plan"]) for job in jobs}) == 1


def test_keys_of_run_and_submission_do_not_overlap() -> None:
    ours = {field.name for field in fields(SubmitConfig)} | {"cluster"}
    theirs = {field.name for field in fields(TrainConfig)} | {"recipe", "phase"}
    assert not ours & theirs


# What is changed -> what the line must hold.
BROKEN = [
    (["nodes=0"], ["nodes: 0", "positive"]),
    (["tasks_per_node=0", "gpus_per_node=0"], ["tasks_per_node: 0"]),
    (["gpus_per_node=4"], ["gpus_per_node: 4", "8 tasks_per_node"]),
    (["time_limit_minutes=0"], ["time_limit_minutes: 0"]),
    (["time_limit_minutes=5"], ["time_limit_minutes: 300 s", "300 s"]),
    (["time_limit_minutes=2", "lead_seconds=120"], ["lead_seconds: 120", "2"]),
    (["lead_seconds=-1"], ["lead_seconds: -1"]),
    (["lead_seconds=70000"], ["lead_seconds: 70000", "65535"]),
    (["crash_limit=0"], ["crash_limit: 0"]),
    (["requeue_limit=0"], ["requeue_limit: 0"]),
    (["container.kind=pyxis"], ["container.image: empty", "pyxis"]),
    (["container.mounts='$HOME'"], ["container.mounts", "shell"]),
    (["jobs.sft.nodes=64"], ["jobs:", "chain=phases"]),
    (["chain=phases", "jobs.sftt.nodes=64"], ["jobs.sftt", "pretrain_1"]),
    (["chain=phases", "jobs.sft.nodes=0"], ["jobs.sft.nodes: 0"]),
    (["chain=phases", "jobs.sft.time_limit_minutes=0"], ["jobs.sft.time_limit_minutes: 0"]),
    (["chain=phases", "jobs.sft.shard=24"], ["parallel.shard", "24", "1024"]),
    (["environment.x={value:'1',reason:r}"], ["environment.x", "not the name"]),
    (["environment.X={value:'1',reason:''}"], ["environment.X.reason", "empty"]),
    (["environment.X={value:'a`b`',reason:r}"], ["environment.X.value", "shell"]),
    (["parallel.shard=7"], ["parallel.shard", "7", "1024"]),
    (["run.name='two words'"], ["run.name: 'two words'", "#SBATCH"]),
    (["run.name=a/b"], ["run.name: 'a/b'", "path"]),
    (["run.name=a%j"], ["run.name: 'a%j'", "Slurm replaces %"]),
    (["partition='gpu --qos=x'"], ["partition: 'gpu --qos=x'"]),
    (["directives.comment='a#b'"], ["directives.comment: 'a#b'"]),
    (["directives.Mail_User=me"], ["directives.Mail_User", "not the name"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "parts"), BROKEN, ids=lambda value: "-".join(value)[:60])
def test_what_cannot_work_is_refused_in_one_line(
    words: list[str], parts: list[str], tmp_path: Path
) -> None:
    line = refusal([*PUBLISHED, f"run.dir={tmp_path / 'run'}", *words])
    assert all(part in line for part in parts), line
    assert "\n" not in line and not (tmp_path / "run").exists()


def test_unknown_keys_and_wrong_types_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("nodez=3", "nodes=many", "chain=phase", "jobs.sft.nodez=3", "cluster=none"):
        assert zaya(["submit", "recipe=zaya1_8b", "nodes=128", word, "--dry-run"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and len(said.splitlines()) == 1, said


def test_submission_without_slurm_or_corpora_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", *PUBLISHED, f"run.dir={tmp_path / 'run'}", "data.sources.code.path=nowhere"]
    assert zaya(words) == 2
    assert "nowhere" in capsys.readouterr().err
    monkeypatch.setattr("zaya_train.tools.submit.check_corpora", lambda config: {})
    monkeypatch.setenv("PATH", str(tmp_path))
    assert zaya(words) == 2
    assert "no sbatch here" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_jobs_of_a_chain_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for sbatch that answers ids and may refuse."""
    calls = tmp_path / "calls"
    tools = only(tmp_path / "bin", "bash", "wc", "cat")
    executable(
        tools / "sbatch",
        f'echo "$*" >> {calls}; n=$(wc -l < {calls})\n'
        'if [ "$n" = 3 ]; then echo "sbatch: error: no such partition" >&2; exit 1; fi\n'
        'echo "4$n;cluster"',
    )
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr("zaya_train.tools.submit.check_corpora", lambda config: {})
    resources, overrides = compose_submission(
        [*PUBLISHED, "chain=phases", f"run.dir={tmp_path / 'run'}"]
    )
    with pytest.raises(ConfigError, match=r"no such partition; .*scancel 41 42$") as refused:
        submit(SubmitRequest(resources, composed(*overrides)), Console(quiet=True))
    lines = calls.read_text().splitlines()
    assert len(lines) == 3 and "--dependency" not in lines[0]
    assert "--dependency=afterok:41 --kill-on-invalid-dep=yes" in lines[1]
    assert "--dependency=afterok:42 " in lines[2]
    (record,) = (tmp_path / "run" / "submit").glob("jobs-*-41.json")
    assert [row["id"] for row in json.loads(record.read_text())] == ["41", "42"]
    assert str(record) in str(refused.value)


def row(kind: str, wall_time: float, **values: float) -> str:
    """A line of metrics.jsonl with every field its kind must have."""
    rest = dict.fromkeys(ROW_FIELDS[kind], 0)
    return json.dumps({"kind": kind, "attempt": 1, **rest, "wall_time": wall_time, **values}) + "\n"


def test_the_warning_follows_the_runs_own_times(tmp_path: Path) -> None:
    assert lead_from(tmp_path) == LEAD_SECONDS
    rows = [
        row("start", 0.0),
        row("step", 10.0, step_seconds=9.0),
        row("step", 12.0, step_seconds=2.0),
        row("eval", 42.0),
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(rows))
    assert lead_from(tmp_path) == LEAD_SECONDS  # no save seen yet
    with path.open("a") as file:
        file.write(row("checkpoint", 50.0, seconds=100.5))
    assert lead_from(tmp_path) == 60 + 2 * (9 + 30) + 201


def test_a_frozen_file_is_the_configuration_or_refused(tmp_path: Path) -> None:
    config = compose(["recipe=smoke_cpu"])
    path = tmp_path / "frozen.json"
    path.write_text(json.dumps(frozen(config)))
    assert thaw(path) == config
    edited = json.loads(path.read_text())
    edited["config"]["run"]["seed"] = 7
    for text, said in (
        (json.dumps(edited), "was edited"),
        (path.read_text()[:-9], "not JSON"),
        ("{}", "not a file that zaya submit wrote"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ConfigError, match=said):
            thaw(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        thaw(tmp_path / "absent.json")
    assert zaya(["train", "--frozen", str(path), "run.seed=1"]) == 2


@pytest.mark.parametrize("cluster", ["mi300x", "mi300x_pollara"])
def test_environment_files_are_the_tables(cluster: str) -> None:
    environment = compose_submission([f"cluster={cluster}", "nodes=1"])[0].environment
    path = REPOSITORY / "launch" / "env" / f"{cluster}.sh"
    assert path.read_text() == shell_file(environment, cluster)
    assert len(environment) >= 8
    for name, variable in environment.items():
        assert variable.reason.endswith(".") and len(variable.reason.split()) >= 5, name
        assert variable.source, name


def test_a_variable_set_already_wins(tmp_path: Path) -> None:
    script = f". {REPOSITORY}/launch/env/mi300x.sh; echo $GPU_MAX_HW_QUEUES $OMP_NUM_THREADS"
    done = subprocess.run(
        ["sh", "-c", script], env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "7"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["2", "7"]


def test_env_says_where_a_value_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPU_MAX_HW_QUEUES", "5")
    monkeypatch.setenv("NCCL_STRANGE", "1")
    monkeypatch.setenv("COLUMNS", "220")
    assert zaya(["env", "mi300x"]) == 0
    said = capsys.readouterr().out
    assert "5 (table: 2)" in said and "not in the table: NCCL_STRANGE=1" in said


class Batch:
    """A rendered script with stand-ins for srun and scontrol, in a checkout of its own."""

    def __init__(self, root: Path, preflight: str = "off") -> None:
        self.root = root
        resources, overrides = compose_submission(
            ["recipe=smoke_cpu", "cluster=cpu", "nodes=2", "tasks_per_node=1", "crash_limit=2",
             "requeue_limit=4", f"preflight={preflight}", "run.dir=runs/x", "exclude=n9",
             "environment.PLANTED={value:planted,reason:A variable of a test.}"]
        )  # fmt: skip
        (job,) = plan_jobs(SubmitRequest(resources, composed(*overrides)))
        (root / "job.sbatch").write_text(render(job))
        self.frozen = str(job.frozen)
        self.seen = root / "seen"
        words = "$RANK/$WORLD_SIZE $LOCAL_RANK/$LOCAL_WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $PLANTED"
        executable(
            root / ".venv" / "bin" / "python",
            f'echo "{words} $*" >> {self.seen}\n. {root}/behaviour "$@"',
        )
        tools = only(
            root / "bin", "bash", "head", "date", "cat", "sed", "mkdir", "find", "sort", "tail",
            "uniq", "awk", "grep", "sleep", "env", "paste",
        )  # fmt: skip
        executable(
            tools / "srun",
            f'exec {sys.executable} {REPOSITORY}/tests/helpers/srun.py "$@"',
        )
        executable(
            tools / "scontrol",
            'case "$1 $2" in\n'
            '  "show hostnames") echo n1; echo n2 ;;\n'
            '  "show node") echo "NodeName=$3 NodeAddr=10.0.0.1 NodeHostName=x" ;;\n'
            # A requeue ends what still runs on the node.
            f'  *) kill -TERM $$; echo "scontrol $*" >> {self.seen} ;;\n'
            "esac",
        )
        self.environment = {"PATH": str(tools), "SLURM_JOB_ID": "40123", "SLURM_NTASKS": "2"}
        self.environment["SLURM_JOB_NODELIST"] = "n[1-2]"

    def start(self, behaviour: str, restarts: int = 0) -> subprocess.Popen[str]:
        self.seen.write_text("")
        (self.root / "behaviour").write_text(behaviour)
        return subprocess.Popen(
            ["bash", "job.sbatch"],
            cwd=self.root,
            env={**self.environment, "SLURM_RESTART_COUNT": str(restarts)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, behaviour: str, restarts: int = 0) -> tuple[int, str]:
        process = self.start(behaviour, restarts)
        output, _ = process.communicate()
        return process.returncode, output

    def orders(self) -> list[str]:
        return [x for x in self.seen.read_text().splitlines() if x.startswith("scontrol")]

    def signalled(self, number: signal.Signals, behaviour: str) -> tuple[int, str]:
        """Send a signal to the batch shell once both ranks say that they listen or, where the
        behaviour has no such word, run."""
        for note in self.root.glob("listening-*"):
            note.unlink()
        process = self.start(behaviour)
        while len(self.seen.read_text().splitlines()) < 2 or (
            "listening" in behaviour and len(list(self.root.glob("listening-*"))) < 2
        ):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        output, _ = process.communicate()
        return process.returncode, output


SAVES = (
    "trap 'kill $!; exit 75' USR1; (trap '' USR1; exec env sleep 600) & : > listening-$RANK; wait"
)
LOADS = "exec env sleep 600"
REQUEUE = ["scontrol requeue 40123"]


def test_ranks_get_their_places_and_the_environment(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    code, output = batch.run("exit 0")
    assert code == 0, output
    port, frozen_path = 20000 + 2 * (40123 % 6000) + 1, batch.frozen
    rest = f"10.0.0.1:{port} planted -m zaya_train train --frozen {frozen_path}"
    assert sorted(batch.seen.read_text().splitlines()) == [f"{r}/2 0/1 {rest}" for r in (0, 1)]
    assert not batch.orders()


@pytest.mark.parametrize(
    ("code", "result", "orders"),
    [(0, 0, []), (75, 75, REQUEUE), (2, 2, []), (3, 3, []), (4, 4, []), (5, 5, []), (6, 6, []),
     (1, 75, REQUEUE), (137, 75, REQUEUE)],
)  # fmt: skip
def test_every_exit_code_has_its_consequence(
    tmp_path: Path, code: int, result: int, orders: list[str]
) -> None:
    batch = Batch(tmp_path)
    status, output = batch.run(f"echo 'Error: planted'; exit {code}")
    assert status == result, output
    assert batch.orders() == orders
    assert ("Error: planted" in output) == (code not in (0, 75))


def test_a_warning_is_handed_on_and_requeues(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    code, output = batch.signalled(signal.SIGUSR1, SAVES)
    assert (code, batch.orders()) == (75, REQUEUE), output
    assert "stopped at a checkpoint; requeueing" in output


def test_a_warning_before_the_ranks_listen_loses_nothing(tmp_path: Path) -> None:
    """Python's default action on USR1 is to die."""
    batch = Batch(tmp_path)
    code, output = batch.signalled(signal.SIGUSR1, LOADS)
    assert (code, batch.orders()) == (75, REQUEUE), output
    # And it is no crash, of which there may be few.
    assert not list(tmp_path.rglob("crashes")) and "after a warning" in output


def test_an_ended_job_saves_and_is_not_resurrected(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    code, output = batch.signalled(signal.SIGTERM, SAVES)
    assert (code, batch.orders()) == (75, []), output
    assert "stopped at a checkpoint, but the job was ended from outside" in output
    # Also where the ranks did not listen yet; that is no crash either.
    code, output = batch.signalled(signal.SIGTERM, LOADS)
    assert (code, batch.orders()) == (75, []), output
    assert "ended from outside" in output and not list(tmp_path.rglob("crashes"))


def test_one_ranks_reason_outweighs_the_killed_ones(tmp_path: Path) -> None:
    """srun returns the highest code, 137; a refused configuration must not be started again."""
    batch = Batch(tmp_path)
    code, output = batch.run('[ "$RANK" = 0 ] && exit 2; exit 137')
    assert (code, batch.orders()) == (2, []), output
    # The code of that start is not the next one's.
    assert batch.run("exit 137", 1)[0] == 75


def test_a_signal_while_srun_is_being_started_is_handed_on(tmp_path: Path) -> None:
    """The stand-in for srun signals the batch shell before that knows its process."""
    batch = Batch(tmp_path)
    text = (tmp_path / "job.sbatch").read_text()
    known = "    step=$logs/$log-srun\n"
    assert text.count(known) == 1
    (tmp_path / "job.sbatch").write_text(
        text.replace(
            known,
            "    until [ -e listening-0 ] && [ -e listening-1 ]; do sleep 0.1; done\n"
            f"    kill -USR1 $$\n{known}",
        )
    )
    # Not handed on, the ranks end by themselves.
    code, output = batch.run(SAVES.replace("600", "20"))
    assert (code, batch.orders()) == (75, REQUEUE), output
    assert "stopped at a checkpoint; requeueing" in output


def test_a_job_that_cannot_keep_its_status_is_no_success(tmp_path: Path) -> None:
    """On a full disk, say; a chain goes on after a job that ends with 0."""
    batch = Batch(tmp_path)
    code, output = batch.run(f"[ $RANK = 1 ] || mkdir {tmp_path}/runs/x/slurm/*/*/train-status")
    assert code == 75 and "exit code 1, crash 1" in output, output


def test_a_crash_loop_ends_and_progress_starts_the_count_again(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    checkpoints = tmp_path / "runs/x/checkpoints"
    assert batch.run("exit 1")[0] == 75
    (checkpoints / "step-00000010").mkdir(parents=True)
    assert batch.run("exit 139", 1)[0] == 75
    code, output = batch.run("exit 1", 2)
    assert code == 6 and "crash 2 without a new checkpoint" in output
    assert not batch.orders()


def test_requeues_are_limited(tmp_path: Path) -> None:
    batch = Batch(tmp_path)
    assert batch.run("exit 75", 2)[0] == 75
    code, output = batch.run("exit 75", 3)
    assert code == 6 and "requeue_limit=4" in output and not batch.orders()


PREFLIGHT_FAILS = 'case "$*" in *preflight*) {what} exit 1 ;; esac; exit 0'


def test_failed_nodes_are_excluded_and_the_job_requeued(tmp_path: Path) -> None:
    batch = Batch(tmp_path, preflight="quick")
    note = 'while [ "$1" != --exclude-file ]; do shift; done; echo n2 > "$2";'
    code, output = batch.run(PREFLIGHT_FAILS.format(what=note))
    assert code == 75, output
    assert batch.orders() == [*REQUEUE, "scontrol update JobId=40123 ExcNodeList=n9,n2"]
    assert "--frozen" not in batch.seen.read_text()
    # Slurm replaces its list: another node at the next start joins the first. (A checkpoint since
    # then, or it would be the second failure of crash_limit=2.)
    (tmp_path / "runs/x/checkpoints/step-00000010").mkdir(parents=True)
    behaviour = PREFLIGHT_FAILS.format(what=note.replace("n2", "n5"))
    code, output = batch.run(behaviour, 1)
    assert code == 75, output
    assert batch.orders() == [*REQUEUE, "scontrol update JobId=40123 ExcNodeList=n9,n2,n5"]
    code, output = batch.run(behaviour, 2)
    assert code == 6 and not batch.orders(), output
    assert "preflight ended with 1, crash 2 without a new checkpoint" in output


def test_an_exclusion_that_slurm_refuses_does_not_hold_the_job(tmp_path: Path) -> None:
    batch = Batch(tmp_path, preflight="quick")
    scontrol = tmp_path / "bin" / "scontrol"
    text = scontrol.read_text()
    assert text.count("  *) kill") == 1
    scontrol.write_text(text.replace("  *) kill", '  "update "*) exit 1 ;;\n  *) kill'))
    note = 'while [ "$1" != --exclude-file ]; do shift; done; echo n2 > "$2";'
    code, output = batch.run(PREFLIGHT_FAILS.format(what=note))
    assert (code, batch.orders()) == (75, REQUEUE), output
    assert "Slurm did not take the list" in output


def test_the_commands_of_a_script_are_commands_of_zaya(tmp_path: Path) -> None:
    """What the ranks are started with, parsed by the command line's own parser."""
    batch = Batch(tmp_path, preflight="quick")
    assert batch.run("exit 0")[0] == 0
    words = {line.split(" -m zaya_train ")[1] for line in batch.seen.read_text().splitlines()}
    train, preflight = sorted(words, key=lambda text: text.startswith("preflight"))
    options = _parser().parse_args(preflight.split())
    assert options.level == "quick" and options.exclude_file is not None
    # Hydra has the rest of this one; --frozen is thawed before.
    assert train == f"train --frozen {batch.frozen}"
    assert zaya(train.replace(batch.frozen, str(tmp_path / "absent.json")).split()) == 2


def test_a_preflight_that_blames_no_node_ends_the_job(tmp_path: Path) -> None:
    batch = Batch(tmp_path, preflight="full")
    code, output = batch.run(PREFLIGHT_FAILS.format(what="echo 'error: planted';"))
    assert code == 1 and not batch.orders(), output
    assert "error: planted" in output
    assert "--level full" in batch.seen.read_text()
    assert batch.run("exit 0")[0] == 0
    assert "train --frozen" in batch.seen.read_text()


def test_scripts_of_the_repository_pass_shellcheck() -> None:
    scripts = [*(REPOSITORY / "launch").rglob("*.sh")]
    scripts += [REPOSITORY / ".ci" / name for name in ("run", "setup", "test")]
    assert len(scripts) >= 6
    shellcheck(scripts)


def test_the_wheel_carries_the_template() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert '"launch" = "zaya_train/_launch"' in text
