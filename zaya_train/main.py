"""The `zaya` command. The only file that imports hydra; `*arguments` and `*commands` have the rest.

zaya train recipe=smoke_cpu ...     ordinary Hydra: groups, overrides, --cfg job, --multirun
zaya data prepare | trim | adopt | aggregate | synth | inspect | ledger verify | ledger show
zaya import-hf | export-hf | verify-export | generate | evaluate
zaya plan | supervise | doctor | report | watch | sync | diff | smoke
zaya checkpoint ls | verify | diff
zaya submit recipe=zaya1_8b nodes=128 | env | preflight
zaya kernels verify | bench
zaya bench step recipe=zaya1_8b_1gpu
"""

from __future__ import annotations

import os
import re
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import zaya_train
from zaya_train.arguments import (
    Help,
    Parser,
    add_bench,
    add_checkpoint,
    add_cluster,
    add_data,
    add_kernels,
    add_runs,
)
from zaya_train.commands import DATA_HANDLERS, HANDLERS
from zaya_train.config.build import build
from zaya_train.config.check import check
from zaya_train.config.cluster import SubmitConfig
from zaya_train.config.defaults import defaults
from zaya_train.config.derive import launched_ranks
from zaya_train.config.errors import EXIT_CONFIG, EXIT_OK, ConfigError, ZayaError
from zaya_train.config.frozen import thaw
from zaya_train.config.schema import PhaseConfig, TrainConfig
from zaya_train.config.suggest import unknown_key, unknown_name
from zaya_train.model_arguments import add_hub, add_model_use
from zaya_train.model_commands import MODEL_HANDLERS
from zaya_train.runtime.files import named_failure

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

T = TypeVar("T")

_DOCS = (
    "Documentation, in the repository: README.md, then docs/tutorial/index.md; what went wrong, by "
    "symptom, in docs/troubleshooting.md; every key in docs/reference/configuration.md; all pages "
    "in docs/index.md."
)
_LEAVE_SECONDS = 60.0
"""In which the first rank of a node has said what is wrong, however busy the machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (see config.errors)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words[:1] == ["train"]:
            return _train(words[1:])
        options = _parsed(words)
        return int(options.run(options) or EXIT_OK)
    except ZayaError as error:
        return _told(error)
    except BrokenPipeError:
        return EXIT_OK
    except OSError as error:
        return _told(named_failure(error))


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """Options may stand between overrides; argparse takes positional words of one stretch only."""
    parser = _parser()
    options, rest = parser.parse_known_args(words)
    taken = getattr(options, "overrides", None) or getattr(options, "words", None)
    if rest and (not taken or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if taken:
        taken += rest
    return options


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
    """Give Hydra the schemas' defaults: `schema` below the whole run, `phase/base` below a phase,
    `submit_schema` below a submission."""
    store = ConfigStore.instance()
    store.store(name="schema", node=defaults(TrainConfig))
    store.store(group="phase", name="base", node=defaults(PhaseConfig))
    store.store(name="submit_schema", node=defaults(SubmitConfig))


def _typed(values: DictConfig, cls: type[T]) -> T:
    """Resolved YAML to the typed configuration."""
    try:
        plain = OmegaConf.to_container(values, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    return build(cls, plain)


def _train(overrides: list[str]) -> int:
    """`zaya train`: Hydra parses, `run.train` trains. 2 for whatever Hydra itself refuses."""
    if overrides[:1] == ["--frozen"]:
        return _checked_and_started(lambda: _thawed(overrides[1:]))
    codes: list[int] = []

    def task(values: DictConfig) -> None:
        try:
            codes.append(_checked_and_started(lambda: _for_job(_typed(values, TrainConfig))))
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
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not _is_refusal(error):
            raise
        return _refused(ConfigError(_one_line(error)))
    except SystemExit as stop:
        if stop.code not in (0, None):
            return EXIT_CONFIG
    return max(codes, default=EXIT_OK)


def _thawed(words: Sequence[str]) -> TrainConfig:
    if len(words) != 1:
        raise ConfigError("train --frozen FILE: takes one file, and nothing can be overridden")
    return thaw(Path(words[0]))


def _checked_and_started(configuration: Callable[[], TrainConfig]) -> int:
    """Train with what `configuration` returns, once it is checked for this launch."""
    try:
        config = configuration()
        check(config, launched_ranks(os.environ))
    except ConfigError as error:
        return _refused(error)
    # torch: two seconds of import that a bad configuration does not pay for.
    from zaya_train.run import train

    return train(config)


def _refused(error: ConfigError) -> int:
    """What every rank finds, one of each node says; its exit code."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return _told(error)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # torchrun ends all ranks as soon as one leaves, the one that is about to say it too.
        time.sleep(_LEAVE_SECONDS)
    return error.exit_code


def _is_refusal(error: Exception) -> bool:
    """Whether Hydra or OmegaConf refused the words; a plain ValueError is only where they parse."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return True
    return str(error).startswith("Config group override must be")


def _one_line(error: Exception, root: type = TrainConfig) -> str:
    """What is wrong with the words, in the project's terms where Hydra's are its own."""
    text = str(error).split("Config search path:")[0]
    if found := re.match(r"Could not override '([^']*)'", text):
        key = found[1]
        place = re.search(r"full_key: (\S+)", str(error.__cause__ or ""))
        if place and unknown_key(root, key) == f"{key}: unknown key":
            parent, _, name = place[1].rpartition(".")
            return f"{key}: {parent} has no entry {name}; +{key}=... adds one"
        return unknown_key(root, key)
    if found := re.search(r"Could not delete from config\. '([^']*)'", text):
        return unknown_key(root, found[1])
    if found := re.search(r"Could not find '([^/']*)/([^']*)'", text):
        options = text.partition("Available options in")[2].partition(":")[2].split()
        return f"{found[1]}={found[2]}: no such {found[1]}{unknown_name(found[2], options)}"
    if found := re.match(r"Error parsing override '(.*)'\s+missing EQUAL", text):
        return f"override {found[1]!r}: expected KEY=VALUE"
    if found := re.match(r"You must specify '([^']*)'", text):
        options = text.partition("Available options:")[2].split()
        return f"{found[1]}: missing; {found[1]}=NAME with one of {', '.join(options)}"
    texts = [text.split("See https://hydra.cc")[0]]
    if isinstance(error, OverrideParseException) and error.override not in text:
        texts.insert(0, f"override {error.override!r}")
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
    return _compose("train", overrides, TrainConfig)


def compose_submission(words: Sequence[str]) -> tuple[SubmitConfig, list[str]]:
    """How to submit, and the overrides left for the run; keys of the two stand mixed."""
    ours = {field.name for field in fields(SubmitConfig)} | {"cluster"}
    # Names of one's own below these: nothing to override need be there.
    own_names = ("jobs", "environment", "directives")
    mine: list[str] = []
    rest: list[str] = []
    for word in words:
        key = word.split("=", 1)[0].lstrip("+~").split(".")[0]
        if key in own_names and word[0] not in "+~":
            word = f"++{word}"
        if key in ours and key not in ("jobs", "environment"):
            word = _quoted(word)
        (mine if key in ours else rest).append(word)
    return _compose("submit", mine, SubmitConfig), rest


def _quoted(word: str) -> str:
    """Node lists and mounts are strings, whatever their brackets and commas mean to Hydra."""
    key, found, value = word.partition("=")
    if not found or not set(value) & set("[](){},: ") or value[:1] in "'\"":
        return word
    return key + "='" + value.replace("'", "\\'") + "'"


def _compose(name: str, overrides: Sequence[str], cls: type[T]) -> T:
    _register_defaults()
    try:
        with hydra.initialize_config_dir(config_dir=str(config_dir()), version_base="1.3"):
            return _typed(hydra.compose(name, overrides=list(overrides)), cls)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        if not _is_refusal(error):
            raise
        raise ConfigError(_one_line(error, cls)) from error


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="zaya",
        description="Train ZAYA1-class language models.",
        epilog=_DOCS,
        allow_abbrev=False,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=zaya_train.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser(
        "train", add_help=False, help="train a model (Hydra: zaya train recipe=smoke_cpu --help)"
    )
    add_data(commands, DATA_HANDLERS)
    for add in (add_hub, add_model_use):
        add(commands, MODEL_HANDLERS)
    for add in (add_runs, add_checkpoint, add_cluster, add_kernels, add_bench):
        add(commands, HANDLERS)
    parser.set_defaults(compose=compose, compose_submission=compose_submission)
    return parser
