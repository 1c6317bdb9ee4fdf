"""The whole main job in miniature: `zaya smoke`.

Data, untrained baseline, an unbroken training run, the same run killed by SIGKILL and resumed, a
comparison of the two bit for bit, export, reload through transformers, sampled answers, report.
"""

from __future__ import annotations

import fcntl
import shutil
import textwrap
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from zaya_kernels.native import library

from zaya_train.config.derive import layout, phase_sequences
from zaya_train.config.errors import ConfigError, DataError
from zaya_train.data.reading import open_input
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.hub.convert import Form, to_hf
from zaya_train.model.init import initialise
from zaya_train.model.zaya import ZayaModel
from zaya_train.phases.plan import steps_in
from zaya_train.run import CHECKPOINTS
from zaya_train.runtime.device import usable_cores
from zaya_train.runtime.files import NO_LOCKS
from zaya_train.tools.compare import compare_runs
from zaya_train.tools.evaluate import (
    EvalReport,
    EvalRequest,
    EvalSample,
    exact_match,
    print_report,
    read_rows,
    write_report,
)
from zaya_train.tools.export_receipt import PAGE, read_receipt
from zaya_train.tools.generate import GenerateArgs, GenerateRequest
from zaya_train.tools.generate import run as print_samples
from zaya_train.tools.launch import Launch, TrainingFailed, kill_tree, run_to_end, start, watch
from zaya_train.tools.report import report
from zaya_train.tools.smoke_data import SmokeData, given_data, synthetic_data
from zaya_train.tools.transfer import ExportRequest, Verification, export_hf
from zaya_train.train.metrics import METRICS_FILE, iter_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from rich.console import Console

    from zaya_train.config.schema import TrainConfig

    Compose = Callable[[Sequence[str]], TrainConfig]

_PROBLEMS = 200
_UNTRAINED_TOKENS = 160
"""An untrained model never ends a reply; long enough to hold nearly all right ones."""
_TRAINED_TOKENS = 640
"""Replies are cut here: the longest traces, about one problem in a hundred, count as wrong, and the
evaluation stays a small part of the run."""
_VERIFY_TOKENS = 1024
"""Compared with transformers at the export: two seconds on one core."""
_SAMPLES = 3
_SHOWN_CHARACTERS = 240


@dataclass(frozen=True)
class SmokeRequest:
    """What `zaya smoke` is asked for."""

    output: Path
    """Replaced when it holds an earlier smoke run."""
    data: str | None
    """Dataset to train on; None for generated problems."""
    tokenizer: str
    overrides: tuple[str, ...]
    """Hydra overrides for the training runs."""


@dataclass(frozen=True)
class _Job:
    request: SmokeRequest
    compose: Compose
    console: Console
    data: SmokeData
    ranks: int
    newton_schulz_dtype: str
    kernels: str

    def overrides(self, run_dir: Path) -> list[str]:
        return [
            "recipe=smoke_cpu",
            *([] if _chooses_kernels(self.request) else [f"kernels={self.kernels}"]),
            f"run.dir={run_dir}",
            f"optim.muon.newton_schulz_dtype={self.newton_schulz_dtype}",
            *self.data.overrides,
            *self.request.overrides,
        ]

    def config(self, run_dir: Path) -> TrainConfig:
        return self.compose(self.overrides(run_dir))


def smoke(request: SmokeRequest, compose: Compose, console: Console) -> int:
    """Run the main job; 0 when the killed and the unbroken run agree bit for bit, else 1."""
    begin = time.perf_counter()
    # Decoding a tiny model is thousands of small operations: threads would wait for each other.
    torch.set_num_threads(1)
    out = request.output
    if request.data:
        # Before an earlier run is removed for it.
        open_input(request.data)
        load_tokenizer(request.tokenizer)
    with _room(out):
        return _main_job(request, compose, console, begin)


def _main_job(request: SmokeRequest, compose: Compose, console: Console, begin: float) -> int:
    out = request.output
    _say(console, 1, "data")
    data = given_data(out, request, console) if request.data else synthetic_data(out, console)
    kernels = "" if _chooses_kernels(request) else smoke_kernels(console)
    job = _Job(request, compose, console, data, _ranks(), newton_schulz_dtype(), kernels)
    run_dir, unbroken_dir = out / "run", out / "unbroken"
    job.config(run_dir)

    _say(console, 2, "untrained model")
    untrained = _untrained(job, out)
    _say(console, 3, f"unbroken training run on {job.ranks} processes")
    _train(job, unbroken_dir)
    _say(console, 4, "the same run, killed in the middle and resumed")
    killed_at = _train_with_kill(job, run_dir)
    _say(console, 5, "comparison of the two runs")
    comparison = compare_runs(run_dir, unbroken_dir)
    console.print(comparison.text())
    _say(console, 6, "export, reload through transformers, sampled answers")
    model_dir = _export(job, run_dir, out / "model")
    trained = _trained(job, model_dir, run_dir)
    _say(console, 7, "report")
    page = report([run_dir], out / "report.html")
    seconds = time.perf_counter() - begin
    _summary(job, page, (untrained, trained), (killed_at, comparison.equal), seconds)
    return 0 if comparison.equal else 1


@contextmanager
def _room(out: Path) -> Iterator[None]:
    """Remove an earlier smoke run, not one at work; refuse to touch anything else."""
    marker = out / ".zaya-smoke"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise DataError(f"{out}: exists and is not an earlier smoke run; choose another --output")
    out.mkdir(parents=True, exist_ok=True)
    with marker.open("a", encoding="utf-8") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{out}: another smoke run is at work here; wait for it or choose another --output"
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != marker:
                path.unlink()
        yield


def _ranks() -> int:
    """Two processes where the machine has two devices of the kind that is used."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else usable_cores()
    return min(2, count)


def newton_schulz_dtype() -> str:
    """bf16 where this machine has bf16 matrix instructions, else fp32.

    CPUs with them are several times faster in bf16 (docs/lab-log.md), others many times slower.
    """
    if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported():
        return "bf16"
    return "fp32"


def _chooses_kernels(request: SmokeRequest) -> bool:
    """Hydra refuses a group that is chosen twice."""
    return any(word.startswith("kernels=") for word in request.overrides)


def smoke_kernels(console: Console) -> str:
    """Of configs/kernels: native where it trains on the CPU and C compiles here, else eager; which
    of them is said, and why where it is the slower one."""
    if torch.cuda.is_available():
        console.print("kernels=eager: native computes on a CPU")
        return "eager"
    try:
        library.ready()
    except ConfigError as error:
        console.print(f"kernels=eager, which is slower; {error}", markup=False)
        return "eager"
    console.print("kernels=native, compiled for this processor")
    return "native"


def _say(console: Console, number: int, text: str) -> None:
    console.rule(f"[bold]{number}/7 {text}", align="left")


def _untrained(job: _Job, out: Path) -> EvalReport | None:
    """Exact match of the run's own initial weights."""
    if job.data.heldout is None:
        return None
    config = job.config(out / "run")
    model = ZayaModel(config.model)
    initialise(model, config.run.seed)
    folder = out / "untrained"
    to_hf(model, folder, Form(tokenizer=job.data.tokenizer))
    request = EvalRequest(max_new_tokens=_UNTRAINED_TOKENS)
    result = exact_match(folder, _problems(job), request)
    job.console.print(f"exact match {result.correct} of {result.total}")
    write_report(result, out / "run" / "evaluation" / "untrained.json")
    return result


def _export(job: _Job, run_dir: Path, folder: Path) -> Path:
    """The trained model as a Hugging Face folder, compared with transformers on held-out text."""
    heldout = next(iter(job.config(run_dir).data.validation.values()), None)
    data = Path(heldout.path) if heldout else None
    verification = Verification(tokens=_VERIFY_TOKENS, data=data)
    return export_hf(ExportRequest(run_dir, folder, verify=verification), job.console)


def _trained(job: _Job, model_dir: Path, run_dir: Path) -> EvalReport | None:
    if job.data.heldout is None:
        prompts = tuple(job.data.prompts)
        request = GenerateRequest(max_new_tokens=200)
        print_samples(
            GenerateArgs(model_dir=model_dir, prompts=prompts, request=request), job.console
        )
        return None
    rows = _problems(job)
    result = exact_match(model_dir, rows, EvalRequest(max_new_tokens=_TRAINED_TOKENS))
    for sample in result.samples[:_SAMPLES]:
        job.console.print(_sample_line(sample), markup=False)
    print_report(result, job.console)
    write_report(result, run_dir / "evaluation" / "trained.json")
    return result


def _sample_line(sample: EvalSample) -> str:
    """One question with its reply, long texts shortened."""
    prompt, reply = (
        textwrap.shorten(text, _SHOWN_CHARACTERS, placeholder=" ...")
        for text in (sample.prompt, sample.reply)
    )
    return f"  {prompt}  ->  {reply}  (expected {sample.expected})"


def _problems(job: _Job) -> list[dict[str, Any]]:
    assert job.data.heldout is not None
    return read_rows(job.data.heldout)[:_PROBLEMS]


def _progress(job: _Job) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=job.console,
    )


def _plan_tokens(config: TrainConfig) -> int:
    return sum(phase_sequences(p) * p.context_tokens for p in config.plan.phases.values())


def _train(job: _Job, run_dir: Path) -> None:
    # The reference run needs no dashboards.
    overrides = [*job.overrides(run_dir), "logging.wandb=disabled", "logging.tensorboard=false"]
    launch = Launch(run_dir, overrides, job.ranks, run_dir / "logs" / "launch.log")
    _point_to(launch, job.console)
    with _progress(job) as bar:
        run_to_end(launch, _follow(bar, job, run_dir))


def _point_to(launch: Launch, console: Console) -> None:
    """Where minutes of training can be followed that no progress bar shows."""
    if not console.is_terminal:
        console.print(
            f"log: {launch.log}; zaya watch {launch.run_dir} shows it live",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip


def _train_with_kill(job: _Job, run_dir: Path) -> int:
    """SIGKILL to every process about half way, between two checkpoints, then a plain restart; the
    last step reported before the kill. TrainingFailed when the kill found nothing to kill."""
    config = job.config(run_dir)
    every = config.checkpoint.every_steps
    kill_at = max(1, _plan_steps(config, job.ranks) // 2 // every) * every + every // 2
    launch = Launch(run_dir, job.overrides(run_dir), job.ranks, run_dir / "logs" / "launch.log")
    _point_to(launch, job.console)
    with _progress(job) as bar:
        follow = _follow(bar, job, run_dir)
        process = start(launch)
        try:
            code = watch(process, launch, follow, kill_at_step=kill_at)
        except BaseException:
            kill_tree(process.pid)
            raise
        if code is not None:
            raise TrainingFailed(
                f"training ended with code {code} before step {kill_at}, where it was to be "
                f"killed; see {launch.log}"
            )
        killed_at = max(row["step"] for row in iter_rows(run_dir / METRICS_FILE))
        bar.console.print(f"killed every process after step {killed_at}; starting again")
        run_to_end(launch, follow)
    if not any(row["kind"] == "resume" for row in iter_rows(run_dir / METRICS_FILE)):
        raise TrainingFailed(f"{run_dir}: the second start did not resume; see {launch.log}")
    return killed_at


def _plan_steps(config: TrainConfig, ranks: int) -> int:
    return sum(
        steps_in(phase, layout(phase, config.parallel, ranks).data * phase.micro_batch_sequences)
        for phase in config.plan.phases.values()
    )


def _follow(bar: Progress, job: _Job, run_dir: Path) -> Callable[[dict[str, Any]], None]:
    """Progress of a training process, from its metrics rows."""
    task = bar.add_task("starting", total=_plan_tokens(job.config(run_dir)), note="")

    def on_row(row: dict[str, Any]) -> None:
        if row["kind"] == "step":
            note = f"step {row['step']}  loss {float(row['loss']):.3f}"
            bar.update(task, completed=row["tokens"], description=row["phase"], note=note)
        elif row["kind"] == "resume":
            bar.console.print(f"resumed at step {row['step']}")

    return on_row


def _summary(
    job: _Job,
    page: Path,
    results: tuple[EvalReport | None, EvalReport | None],
    killed: tuple[int, bool],
    seconds: float,
) -> None:
    out, (killed_at, equal) = job.request.output, killed
    table = Table(title=f"smoke run, {seconds:.0f} seconds", show_header=False)
    for label, result in zip(("untrained", "trained"), results, strict=True):
        if result is not None:
            score = f"{result.accuracy:.1%}  ({result.correct} of {result.total})"
            table.add_row(f"exact match {label}", score)
    verdict = "equal" if equal else "NOT EQUAL"
    table.add_row(
        "killed and resumed", f"after step {killed_at}; {verdict} bit for bit to unbroken"
    )
    table.add_row("report", str(page))
    table.add_row("model (Hugging Face)", str(out / "model"))
    agreement = read_receipt(out / "model")["agreement"]["fp32"]
    table.add_row(
        "against transformers",
        f"logits to {agreement['logits']['largest']:.1e} of their deviation, "
        f"{agreement['equal_choices']:.2%} of choices",
    )
    table.add_row("its receipt", str(out / "model" / PAGE))
    table.add_row("run, metrics, logs", str(out / "run"))
    table.add_row("checkpoints", str(out / "run" / CHECKPOINTS))
    table.add_row("data", str(out / "data"))
    job.console.print(table)
    job.console.print(
        f"ask it: zaya generate {out / 'model'} '{job.data.prompts[0]}'", markup=False
    )
