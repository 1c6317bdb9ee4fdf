"""The `zaya` command. The only file that imports hydra.

Every handler imports the tool it runs: `zaya train` starts on every rank of a cluster and must not
load plotting, tokenizers and transformers there.

    zaya train recipe=smoke_cpu ...     ordinary Hydra: groups, overrides, --cfg job, --multirun
    zaya data prepare | trim | adopt | aggregate | synth | inspect | ledger verify | ledger show
    zaya import-hf | export-hf | generate | evaluate | plan | report | smoke
    zaya kernels verify
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

import zaya_train
from zaya_train.config.build import build
from zaya_train.config.defaults import defaults
from zaya_train.config.errors import EXIT_CONFIG, EXIT_OK, ConfigError, ZayaError
from zaya_train.config.schema import PhaseConfig, TrainConfig
from zaya_train.runtime.files import named_failure
from zaya_train.tools.data_parsers import FIELDS, add_data
from zaya_train.tools.run_parsers import add_hub, add_kernels, add_model_use, add_runs

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see config.errors)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["train"]:
            return _train(words[1:])
        options = _parser().parse_args(words)
        return int(options.run(options) or EXIT_OK)
    except ZayaError as error:
        return _told(error)
    except BrokenPipeError:
        return EXIT_OK
    except OSError as error:
        return _told(named_failure(error))


def _told(error: ZayaError) -> int:
    """Say the error in one line; its exit code."""
    sys.stderr.write(f"error: {error}\n")
    return error.exit_code


def config_dir() -> Path:
    """The Hydra configuration directory: inside an installed package, or of the checkout."""
    package = Path(zaya_train.__file__).parent
    installed = package / "_configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _register_defaults() -> None:
    """Give Hydra the schema's defaults: `schema` below the whole run, `phase/base` below a
    phase."""
    store = ConfigStore.instance()
    store.store(name="schema", node=defaults(TrainConfig))
    store.store(group="phase", name="base", node=defaults(PhaseConfig))


def _typed(values: DictConfig) -> TrainConfig:
    """Resolved YAML to the typed configuration."""
    try:
        plain = OmegaConf.to_container(values, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return build(TrainConfig, plain)


def _train(overrides: list[str]) -> int:
    """`zaya train`: Hydra parses, `run.train` trains. 2 for whatever Hydra itself refuses."""
    # torch: two seconds of import that the other commands and worker processes do without.
    from zaya_train.run import train

    codes: list[int] = []

    def task(values: DictConfig) -> None:
        try:
            codes.append(train(_for_job(_typed(values))))
        except ZayaError as error:
            codes.append(_told(error))
        except OSError as error:
            codes.append(_told(named_failure(error)))

    _register_defaults()
    if {"-h", "--help"} & set(overrides) and not any(w.startswith("recipe=") for w in overrides):
        # Hydra composes before it helps, and the recipe has no default.
        overrides = ["recipe=smoke_cpu", *overrides]
    sys.argv = ["zaya train", *overrides]
    # Hydra raises what it would otherwise print over many lines and turn into exit code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    started = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="train")(
        task
    )
    try:
        started()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from error
    except SystemExit as stop:
        if stop.code not in (0, None):
            return EXIT_CONFIG
    return max(codes, default=EXIT_OK)


def _one_line(error: Exception) -> str:
    """Hydra's message with its cause, without its list of places searched."""
    texts = [str(error).split("Config search path:")[0]]
    if error.__cause__ and str(error.__cause__) not in texts[0]:
        texts.append(str(error.__cause__))
    return "; ".join(" ".join(text.split()) for text in texts)


def _for_job(config: TrainConfig) -> TrainConfig:
    """In a sweep every job gets a directory of its own below the run's, named by its number: the
    overrides may hold paths and exceed the length of a file name."""
    if HydraConfig.get().mode != RunMode.MULTIRUN:
        return config
    run_dir = Path(config.run.dir) / str(HydraConfig.get().job.num)
    return replace(config, run=replace(config.run, dir=str(run_dir)))


def compose(overrides: Sequence[str]) -> TrainConfig:
    """The typed configuration of a list of Hydra overrides, without running anything."""
    _register_defaults()
    try:
        with hydra.initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            return _typed(hydra.compose("train", overrides=list(overrides)))
    except HydraException as error:
        raise ConfigError(_one_line(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zaya", description="Train ZAYA1-class language models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=zaya_train.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser(
        "train", add_help=False, help="train a model (Hydra: zaya train recipe=smoke_cpu --help)"
    )
    add_data(commands, _DATA_HANDLERS)
    for add in (add_hub, add_model_use, add_runs, add_kernels):
        add(commands, _HANDLERS)
    return parser


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


_DATA_HANDLERS = {
    "prepare": _data_prepare,
    "trim": _data_trim,
    "synth": _data_synth,
    "inspect": _data_inspect,
    "adopt": _data_adopt,
    "aggregate": _data_aggregate,
    "ledger verify": _ledger_verify,
    "ledger show": _ledger_show,
}


def _import(options: argparse.Namespace) -> None:
    from zaya_train.tools.transfer import ImportRequest, import_hf

    import_hf(ImportRequest(options.folder, options.model_yaml), Console())


def _export(options: argparse.Namespace) -> None:
    from zaya_train.tools.transfer import ExportRequest, export_hf

    request = ExportRequest(options.source, options.output, options.dtype, options.tokenizer)
    export_hf(request, Console())


def _generate(options: argparse.Namespace) -> None:
    from zaya_train.tools.generate import GenerateArgs, GenerateRequest, run

    request = GenerateRequest(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    prompts = tuple(options.prompts)
    run(GenerateArgs(model_dir=options.model, prompts=prompts, request=request), Console())


def _evaluate(options: argparse.Namespace) -> None:
    from zaya_train.tools import evaluate

    console = Console()
    rows = evaluate.read_rows(options.rows)[: options.count]
    request = evaluate.EvalRequest(max_new_tokens=options.max_new_tokens)
    result = evaluate.exact_match(options.model, rows, request)
    evaluate.print_report(result, console)
    if options.output:
        evaluate.write_report(result, options.output)


def _plan(options: argparse.Namespace) -> None:
    from zaya_train.tools.plan import PlanRequest, show_plan

    config = compose(options.overrides)
    show_plan(PlanRequest(config, options.ranks), Console())
    if options.rehearse or options.memory_gb is not None:
        from zaya_train.tools.rehearsal_table import RehearsalRequest, show_rehearsal

        phases = tuple(options.phase or ())
        request = RehearsalRequest(config, options.ranks, phases, options.memory_gb)
        show_rehearsal(request, Console())


def _doctor(options: argparse.Namespace) -> int:
    from zaya_train.tools.doctor import DoctorRequest, doctor

    request = DoctorRequest(compose(options.overrides), options.ranks, options.receipt)
    return doctor(request, Console())


def _report(options: argparse.Namespace) -> None:
    from zaya_train.tools.report import report

    output = options.output or options.runs[0] / "report.html"
    Console().print(str(report(options.runs, output)))


def _smoke(options: argparse.Namespace) -> int:
    from zaya_train.tools.smoke import SmokeRequest, smoke

    request = SmokeRequest(
        output=options.output,
        data=options.data,
        tokenizer=options.tokenizer,
        overrides=tuple(options.overrides),
    )
    return smoke(request, compose, Console())


def _kernels_verify(options: argparse.Namespace) -> int:
    from zaya_kernels.launch import ARCHITECTURES

    from zaya_train.tools.kernels import VerifyRequest, verify

    chosen = tuple(options.arch or ARCHITECTURES)
    if unknown := set(chosen) - set(ARCHITECTURES):
        raise ConfigError(f"--arch: {', '.join(sorted(unknown))}; of {', '.join(ARCHITECTURES)}")
    if options.write and chosen != ARCHITECTURES:
        raise ConfigError("--write: the golden file holds every architecture; leave --arch out")
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    return verify(VerifyRequest(chosen, not options.no_numerics, options.write), console)


_HANDLERS = {
    "import-hf": _import,
    "export-hf": _export,
    "generate": _generate,
    "evaluate": _evaluate,
    "plan": _plan,
    "doctor": _doctor,
    "report": _report,
    "smoke": _smoke,
    "kernels verify": _kernels_verify,
}
