"""Real training runs of a tiny model on a tiny corpus, started as a person would start them."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import socket
import sys
import time
from typing import TYPE_CHECKING

import torch
from rich.console import Console

from tests.helpers.paths import REPOSITORY
from tests.helpers.tiny import RUN, changed
from zaya_train.data.prepare import PrepareRequest, prepare
from zaya_train.data.synth import SynthRequest, write_jsonl
from zaya_train.main import main
from zaya_train.train.metrics import METRICS_FILE, iter_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from typing import Any

ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels")]),
}


def make_corpora(folder: Path) -> Path:
    """corpus/train and corpus/heldout, of generated problems with short traces."""
    quiet = Console(quiet=True)
    for split, name, count in (("train", "train", 300), ("heldout", "heldout", 40)):
        source = folder / f"{name}.jsonl"
        write_jsonl(SynthRequest(count, seed=1, split=split), source)  # type: ignore[arg-type]
        prepare(PrepareRequest(input=str(source), output=folder / name), quiet)
    return folder


def values_for(
    run_dir: Path, corpora: Path, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The miniature run as plain dictionaries, over these corpora."""
    return changed(
        RUN,
        {
            "run.dir": str(run_dir),
            "data.sources.problems.path": str(corpora / "train" / "train"),
            "data.validation.problems.path": str(corpora / "heldout" / "train"),
            **(changes or {}),
        },
    )


def overrides_for(values: Mapping[str, Any]) -> list[str]:
    """Hydra overrides that turn recipe smoke_cpu into the run of `values`."""
    words = ["recipe=smoke_cpu", "~plan.phases", f"+plan.phases={_text(values['plan']['phases'])}"]
    words += ["~data.sources", f"+data.sources={_text(values['data']['sources'])}"]
    words += ["~data.validation", f"+data.validation={_text(values['data']['validation'])}"]
    rest = {k: v for k, v in values.items() if k not in ("plan", "data")}
    words += [f"{key}={_text(value)}" for key, value in _leaves(rest)]
    return [*words, f"data.validation_sequences={values['data']['validation_sequences']}"]


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found


def _text(value: Any) -> str:
    """In the grammar of Hydra's overrides."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_text(v)}" for k, v in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


PATIENCE_SECONDS = 540.0
"""For a run of a few seconds, on a machine that others have loaded; pytest ends a test at 600."""


class Launched:
    """`zaya train`, or another command that ranks run together, each of them a fork of this process
    (no import to pay for).

    The environment is torchrun's; output goes to one file per rank.
    """

    def __init__(
        self,
        overrides: Sequence[str],
        folder: Path,
        ranks: int = 1,
        command: str = "train",
        **limits: int,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"rank-{rank}.out" for rank in range(ranks)]
        launch = _launch_environment(ranks) if ranks > 1 else {}
        context = multiprocessing.get_context("fork")
        self.processes = [
            context.Process(
                target=_zaya,
                args=([command, *overrides], self.logs[rank], _of_rank(launch, rank), limits),
            )
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = PATIENCE_SECONDS) -> list[int | None]:
        """Exit codes in rank order."""
        try:
            for process in self.processes:
                process.join(timeout)
            return [process.exitcode for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL for every rank."""
        for process in self.processes:
            process.kill()
            process.join()

    def output(self) -> str:
        return "".join(log.read_text(encoding="utf-8", errors="replace") for log in self.logs)

    def at_step(self, run_dir: Path, step: int) -> Launched:
        """Returns once the metrics report `step`; AssertionError when the run ends before."""
        return self._until(lambda: last_step(run_dir) >= step)

    def _until(self, there: Callable[[], bool]) -> Launched:
        while not there():
            alive = all(process.is_alive() for process in self.processes)
            assert alive or there(), self.output()
            time.sleep(0.005)
        return self


def left_alone(folder: Path, corpora: Path, changes: Mapping[str, Any], ranks: int = 1) -> Path:
    """The directory, below `folder`, of a run that went to its end."""
    words = overrides_for(values_for(folder / "run", corpora, changes))
    launched = Launched(words, folder, ranks)
    assert launched.wait() == [0] * ranks, launched.output()
    return folder / "run"


def zaya(words: Sequence[str], log: Path, **limits: int) -> int | None:
    """Any `zaya` command in a fork of this process; its exit code."""
    process = multiprocessing.get_context("fork").Process(
        target=_zaya, args=(words, log, {}, limits)
    )
    process.start()
    process.join(PATIENCE_SECONDS)
    return process.exitcode


def _launch_environment(ranks: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = str(ranks)
    return {
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _of_rank(launch: dict[str, str], rank: int) -> dict[str, str]:
    return {**launch, "RANK": str(rank), "LOCAL_RANK": str(rank)} if launch else {}


def _zaya(
    words: Sequence[str], log: Path, environment: dict[str, str], limits: dict[str, int]
) -> None:
    """Body of a child: become the command, output into `log`, file sizes limited where asked."""
    # What the parent left to its collector, a process group of a command run in it for one, has
    # threads that a fork does not: collected here, it would be joined for ever.
    gc.freeze()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    os.environ.update(environment)
    if "file_bytes" in limits:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limits["file_bytes"], hard))
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.exit(main(words))


def last_step(run_dir: Path) -> int:
    """The newest step on record, 0 before the first."""
    return max((row["step"] for row in _rows(run_dir) if row["kind"] == "step"), default=0)


def _rows(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / METRICS_FILE
    return list(iter_rows(path)) if path.exists() else []
