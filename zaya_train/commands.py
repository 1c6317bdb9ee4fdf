"""What the `zaya` commands call, by the names that `arguments` parses.

Every handler imports the tool it runs: no command loads plotting, tokenizers or transformers for
another. Those that take Hydra overrides find `main.compose` among their options.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from zaya_train.arguments import FIELDS
from zaya_train.config.check import check
from zaya_train.config.derive import launched_ranks
from zaya_train.config.errors import ConfigError

if TYPE_CHECKING:
    import argparse


def _data_prepare(options: argparse.Namespace) -> None:
    from zaya_train.data.prepare import FieldOverrides, PrepareRequest, prepare

    fields = FieldOverrides(**{name: getattr(options, f"{name}_field") for name in FIELDS})
    request = PrepareRequest(
        input=options.input,
        output=options.output,
        tokenizer=options.tokenizer,
        fields=fields,
        answer_marker=options.answer_marker,
        heldout_fraction=options.heldout_fraction,
        split=options.split,
        document_characters=options.document_characters,
        overwrite=options.overwrite,
        allow_rejects=options.allow_rejects,
        workers=options.workers,
        own_template=options.own_template,
        encoder=options.encoder,
        compare_every=options.compare_every,
    )
    prepare(request, Console())


def _data_synth(options: argparse.Namespace) -> None:
    from zaya_train.data.synth import SynthRequest, write_jsonl

    chosen = tuple(options.families) if options.families else None
    request = SynthRequest(options.count, options.seed, options.split, chosen)
    size = write_jsonl(request, options.output)
    Console().print(f"{options.output}: {options.count:,} problems, {size:,} bytes")


def _data_inspect(options: argparse.Namespace) -> None:
    from zaya_train.data.inspect import inspect_corpus

    inspect_corpus(
        options.corpus,
        options.index,
        options.budget,
        Console(),
        "hashes" if options.verify else "tokens",
    )


def _data_trim(options: argparse.Namespace) -> None:
    from zaya_train.data.prepare import FieldOverrides
    from zaya_train.data.trim_text import TrimRequest, show_summary, trim_file

    names = FIELDS[:-1]
    request = TrimRequest(
        input=options.input,
        output=options.output,
        budget_tokens=options.budget,
        tokenizer=options.tokenizer,
        fields=FieldOverrides(**{name: getattr(options, f"{name}_field") for name in names}),
        split=options.split,
        overwrite=options.overwrite,
    )
    show_summary(trim_file(request), Console())


def _data_adopt(options: argparse.Namespace) -> None:
    from zaya_train.data.adopt import AdoptRequest, adopt

    request = AdoptRequest(
        prefix=options.prefix, tokenizer=options.tokenizer, output=options.output
    )
    manifest = adopt(request).manifest
    counts = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens"
    Console().print(f"{options.output}: {counts}", markup=False)


def _data_aggregate(options: argparse.Namespace) -> None:
    from zaya_train.data.aggregate import AggregateRequest, aggregate

    request = AggregateRequest(
        input=options.input,
        output=options.output,
        candidates=options.candidates,
        tail_tokens=options.tail,
        tokenizer=options.tokenizer,
        seed=options.seed,
    )
    outcomes = ", ".join(f"{name} {count:,}" for name, count in aggregate(request).items())
    Console().print(f"{options.output}: {outcomes}", markup=False)


def _ledger_verify(options: argparse.Namespace) -> None:
    from zaya_train.tools.ledger import verify

    verify(options.run_dir, not options.plan_only, Console())


def _ledger_show(options: argparse.Namespace) -> None:
    from zaya_train.tools.ledger import show

    show(options.run_dir, options.step, options.rows, Console())


DATA_HANDLERS = {
    "prepare": _data_prepare,
    "trim": _data_trim,
    "synth": _data_synth,
    "inspect": _data_inspect,
    "adopt": _data_adopt,
    "aggregate": _data_aggregate,
    "ledger verify": _ledger_verify,
    "ledger show": _ledger_show,
}


def _plan(options: argparse.Namespace) -> None:
    from zaya_train.tools.plan_command import run_plan

    # `zaya plan phases recipe=...`: the first word is no override.
    chain = options.overrides[0] == "phases"
    run_plan(options, options.compose(options.overrides[chain:]), chain, Console())


def _supervise(options: argparse.Namespace) -> int:
    from zaya_train.tools.supervise import SuperviseRequest, supervise

    request = SuperviseRequest(
        config=options.compose(options.overrides),
        overrides=options.overrides,
        ranks=options.ranks,
        nodes=options.nodes,
        node_rank=options.node_rank,
        master=options.master,
    )
    return supervise(request)


def _doctor(options: argparse.Namespace) -> int:
    from zaya_train.tools.doctor import DoctorRequest, doctor

    request = DoctorRequest(options.compose(options.overrides), options.ranks, options.receipt)
    return doctor(request, Console())


def _parity(options: argparse.Namespace) -> int:
    from zaya_train.tools.parity import ParityRequest, parity

    config = options.compose(options.overrides)
    check(config, launched_ranks(os.environ))
    output = options.output or Path(config.run.dir) / "parity"
    return parity(ParityRequest(config, output, options.steps), _wide_console())


def _report(options: argparse.Namespace) -> None:
    from zaya_train.tools.report import report

    output = options.output or options.runs[0] / "report.html"
    Console().print(str(report(options.runs, output)))


def _sync(options: argparse.Namespace) -> None:
    from zaya_train.tools.replay import SyncRequest, sync

    sinks = (options.only,) if options.only else ("tensorboard", "wandb")
    sync(SyncRequest(options.run_dir, sinks, options.online, options.follow), Console())


def _diff(options: argparse.Namespace) -> int:
    from zaya_train.tools.diff import diff_runs

    return diff_runs(options.first, options.second, options.json, _wide_console())


def _watch(options: argparse.Namespace) -> None:
    from zaya_train.tools.watch import watch

    watch(options.run_dir, Console(), options.once, options.every_seconds)


def _router(options: argparse.Namespace) -> None:
    from zaya_train.tools.router import router

    router(options.run_dir, options.gains or [], Console())


def _smoke(options: argparse.Namespace) -> int:
    from zaya_train.tools.smoke import SmokeRequest, smoke

    request = SmokeRequest(
        output=options.output,
        data=options.data,
        tokenizer=options.tokenizer,
        overrides=tuple(options.overrides),
    )
    return smoke(request, options.compose, Console())


def _kernels_verify(options: argparse.Namespace) -> int:
    from zaya_kernels.launch import ARCHITECTURES

    from zaya_train.tools.kernels import VerifyRequest, verify

    chosen = tuple(options.arch or ARCHITECTURES)
    if unknown := set(chosen) - set(ARCHITECTURES):
        raise ConfigError(f"--arch: {', '.join(sorted(unknown))}; of {', '.join(ARCHITECTURES)}")
    if options.write and chosen != ARCHITECTURES:
        raise ConfigError("--write: the golden file holds every architecture; leave --arch out")
    request = VerifyRequest(chosen, not options.no_numerics, options.write)
    return verify(request, _wide_console())


def _kernels_bench(options: argparse.Namespace) -> int:
    from zaya_train.tools.kernels_bench import BenchRequest, bench

    request = BenchRequest(
        ops=tuple(options.op or ()),
        shapes=tuple(options.shape or ()),
        backends=tuple(options.backend or ()),
        rounds=options.rounds,
        device=options.device,
        dtype=options.dtype,
        out=options.out,
    )
    return bench(request, lambda name: options.compose([f"recipe={name}"]).model, _wide_console())


def _bench_step(options: argparse.Namespace) -> int:
    from zaya_train.tools.bench_step import StepRequest, bench_step

    config = options.compose(options.overrides)
    check(config, launched_ranks(os.environ))
    request = StepRequest(
        config=config,
        output=options.output or Path(config.run.dir) / "bench",
        phase=options.phase,
        warm_steps=options.warm,
        timed_steps=options.steps,
        profiled_micro_batches=options.profiled,
        document_tokens=options.document_tokens,
    )
    return bench_step(request, _wide_console())


def _checkpoint_ls(options: argparse.Namespace) -> int:
    from zaya_train.tools.checkpoint import show_checkpoints

    return show_checkpoints(options.path, _wide_console())


def _checkpoint_verify(options: argparse.Namespace) -> int:
    from zaya_train.tools.checkpoint import verify_checkpoints

    return verify_checkpoints(options.paths, _wide_console())


def _checkpoint_diff(options: argparse.Namespace) -> int:
    from zaya_train.tools.checkpoint_diff import diff_checkpoints

    return diff_checkpoints(options.first, options.second, options.rows, _wide_console())


def _wide_console() -> Console:
    """Tables for a file or a pipe are not cut to the eighty columns rich takes for granted."""
    console = Console()
    return console if console.is_terminal else Console(width=200)


def _submit(options: argparse.Namespace) -> None:
    from zaya_train.tools.submit import SubmitRequest, submit

    resources, overrides = options.compose_submission(options.words)
    submit(SubmitRequest(resources, options.compose(overrides), options.dry_run), Console())


def _environment(options: argparse.Namespace) -> None:
    from zaya_train.tools.launch_environment import shell_file, show_environment

    words = [f"cluster={options.cluster}", "nodes=1"]
    environment = options.compose_submission(words)[0].environment
    if options.sh:
        sys.stdout.write(shell_file(environment, options.cluster))
    else:
        show_environment(environment, os.environ, Console())


def _preflight(options: argparse.Namespace) -> int:
    from zaya_train.tools.preflight import PreflightRequest, preflight

    request = PreflightRequest(
        directory=options.directory,
        level=options.level,
        output=options.output,
        exclude_file=options.exclude_file,
        free_gib=options.free_gib,
        minimums=tuple(options.minimum or ()),
        timeout_seconds=options.timeout,
        device=options.device,
    )
    return preflight(request, Console())


HANDLERS = {
    "plan": _plan,
    "supervise": _supervise,
    "doctor": _doctor,
    "parity": _parity,
    "report": _report,
    "sync": _sync,
    "diff": _diff,
    "watch": _watch,
    "router": _router,
    "smoke": _smoke,
    "kernels verify": _kernels_verify,
    "kernels bench": _kernels_bench,
    "bench step": _bench_step,
    "checkpoint ls": _checkpoint_ls,
    "checkpoint verify": _checkpoint_verify,
    "checkpoint diff": _checkpoint_diff,
    "submit": _submit,
    "env": _environment,
    "preflight": _preflight,
}
