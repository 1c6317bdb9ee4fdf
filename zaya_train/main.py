"""The `zaya` command. The only file that imports hydra.

Every handler imports the tool it runs: `zaya train` starts on every rank of a cluster and must not
load plotting, tokenizers and transformers there.

    zaya train recipe=smoke_cpu ...     ordinary Hydra: groups, overrides, --cfg job, --multirun
    zaya data prepare | synth | inspect
    zaya import-hf | export-hf | generate | evaluate | plan | report | smoke
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from zaya_train.run import train
from zaya_train.runtime.files import named_failure

if TYPE_CHECKING:
    from collections.abc import Sequence


_FIELDS = ("messages", "prompt", "response", "text")
"""Columns `zaya data prepare` can be told about; see data.fields.FieldOverrides."""


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
    _add_data(commands)
    _add_hub(commands)
    _add_model_use(commands)
    _add_runs(commands)
    return parser


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="make and look at corpora").add_subparsers(
        metavar="COMMAND", required=True
    )
    parser = _command(data, "prepare", _data_prepare, "tokenize a dataset into a corpus")
    parser.add_argument(
        "--input", required=True, help="JSONL, JSON, text, Parquet, Arrow or a hub name"
    )
    parser.add_argument(
        "--output", required=True, type=Path, help="directory for train/ and heldout/"
    )
    parser.add_argument(
        "--tokenizer", default="bytes", help="bytes, a tokenizer.json or a hub name"
    )
    parser.add_argument(
        "--heldout-fraction", type=float, default=0.0, help="share kept out of training, 0 to 1"
    )
    parser.add_argument(
        "--answer-marker", help="line start that separates worked steps from the answer"
    )
    parser.add_argument("--split", default="train", help="split of a hub dataset")
    parser.add_argument("--document-characters", type=int, help="cut text files into documents")
    parser.add_argument("--overwrite", action="store_true", help="replace a different corpus")
    parser.add_argument(
        "--allow-rejects", action="store_true", help="accept that most documents are rejected"
    )
    for name in _FIELDS:
        parser.add_argument(f"--{name}-field", help=f"column that holds the {name}")

    parser = _command(data, "synth", _data_synth, "generate reasoning problems as JSONL")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--count", required=True, type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--families", nargs="+", help="names of problem families; all by default")

    parser = _command(data, "inspect", _data_inspect, "show a corpus and one document's sections")
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--index", type=int, default=0, help="document to show")
    parser.add_argument("--budget", type=int, help="show what trimming to this many tokens removes")
    parser.add_argument(
        "--verify", action="store_true", help="compare every file with the manifest's sha256 first"
    )


def _data_prepare(options: argparse.Namespace) -> None:
    from zaya_train.data.prepare import FieldOverrides, PrepareRequest, prepare

    fields = FieldOverrides(**{name: getattr(options, f"{name}_field") for name in _FIELDS})
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


def _add_hub(commands: Any) -> None:
    parser = _command(
        commands,
        "import-hf",
        _import,
        "check a Hugging Face `zaya` folder and write its model config",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model-yaml", required=True, type=Path)
    parser = _command(commands, "export-hf", _export, "write a checkpoint as a Hugging Face folder")
    parser.add_argument("source", type=Path, help="run directory or checkpoint directory")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder, if the run has none")


def _import(options: argparse.Namespace) -> None:
    from zaya_train.tools.transfer import ImportRequest, import_hf

    import_hf(ImportRequest(options.folder, options.model_yaml), Console())


def _export(options: argparse.Namespace) -> None:
    from zaya_train.tools.transfer import ExportRequest, export_hf

    request = ExportRequest(options.source, options.output, options.dtype, options.tokenizer)
    export_hf(request, Console())


def _add_model_use(commands: Any) -> None:
    parser = _command(commands, "generate", _generate, "answer prompts with an exported model")
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser = _command(commands, "evaluate", _evaluate, "exact match on held-out problems")
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("rows", type=Path, help="JSONL with messages and answer")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--output", type=Path, help="JSON report")


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
    result = evaluate.exact_match(options.model, rows, evaluate.EvalRequest())
    evaluate.print_report(result, console)
    if options.output:
        evaluate.write_report(result, options.output)


def _add_runs(commands: Any) -> None:
    parser = _command(commands, "plan", _plan, "preview a run: phases, steps, layout, memory")
    parser.add_argument("overrides", nargs="+", help="as for train: recipe=zaya1_8b ...")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument(
        "--rehearse", action="store_true", help="peak memory and traffic of a step, without ranks"
    )
    parser.add_argument("--memory-gb", type=float, help="rehearse, and refuse what does not fit")
    parser.add_argument("--phase", action="append", help="rehearse these phases only")
    parser = _command(commands, "doctor", _doctor, "prove a configuration on local ranks, shrunk")
    parser.add_argument("overrides", nargs="+", help="as for train: recipe=zaya1_8b ...")
    parser.add_argument("--ranks", type=int, default=4, help="2, 4 or 8 processes of this machine")
    parser.add_argument("--receipt", type=Path, help="JSON file of all figures")
    parser = _command(commands, "report", _report, "one HTML file with a run's curves")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, help="default: report.html in the first run")
    parser = _command(commands, "smoke", _smoke, "the whole main job on this machine")
    parser.add_argument("--output", type=Path, default=Path("runs/smoke"))
    parser.add_argument("--data", help="train on this dataset instead of generated problems")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for the training runs")


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
