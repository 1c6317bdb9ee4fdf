"""Arguments of the `zaya` commands; `commands` has what they call."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from zaya_train.config.suggest import unknown_name
from zaya_train.plan_arguments import add_plan

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Handler = Callable[[argparse.Namespace], int | None]

FIELDS = ("messages", "prompt", "response", "text")
"""Columns `zaya data prepare` can be told about; see data.fields.FieldOverrides."""


class Parser(argparse.ArgumentParser):
    """Says what a misspelt command or choice may have meant; its subcommands' parsers too."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, where only a command is missing all commands; exit with 2."""
        if message.endswith("required: COMMAND"):
            self.exit(2, self.format_help())
        found = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if found:
            known = re.findall(r"[\w.-]+", found[2])
            message = f"{message[: found.start()]}{found[1]!r}{unknown_name(found[1], known)}"
        super().error(message)


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there are any, and commands beside what they do."""

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if action.nargs == argparse.PARSER:
            # argparse leaves no room for the step by which it moves commands to the right.
            self._action_max_length += self._indent_increment

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required or action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def add_command(commands: Any, name: str, run: Handler, text: str) -> argparse.ArgumentParser:
    """A subcommand `name` that calls `run` with the parsed options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text,
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser


def add_data(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya data ...`; `handlers` by subcommand, those of `ledger` as `ledger verify`."""
    data = commands.add_parser(
        "data", help="make and look at corpora", formatter_class=Help
    ).add_subparsers(metavar="COMMAND", required=True)
    _prepare(add_command(data, "prepare", handlers["prepare"], "tokenize a dataset into a corpus"))
    _trim(add_command(data, "trim", handlers["trim"], "fit conversations into a token budget"))
    _synth(add_command(data, "synth", handlers["synth"], "generate reasoning problems as JSONL"))
    parser = add_command(
        data, "inspect", handlers["inspect"], "show a corpus and one document's sections"
    )
    parser.add_argument("corpus", type=Path, help="its directory: train/ or heldout/")
    parser.add_argument("--index", type=int, default=0, help="document to show")
    parser.add_argument("--budget", type=int, help="show what trimming to this many tokens removes")
    parser.add_argument(
        "--verify", action="store_true", help="compare every file with the manifest's sha256 first"
    )
    parser = add_command(
        data, "adopt", handlers["adopt"], "use a Megatron corpus as plain text as it is"
    )
    parser.add_argument("--prefix", required=True, type=Path, help="its .bin and .idx, less these")
    parser.add_argument("--tokenizer", required=True, help="the tokenizer it was made with")
    parser.add_argument("--output", required=True, type=Path, help="corpus directory to make")
    _aggregate(
        add_command(
            data, "aggregate", handlers["aggregate"], "several attempts to one improved solution"
        )
    )
    _ledger(data, handlers)


def _prepare(parser: argparse.ArgumentParser) -> None:
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
        "--own-template", action="store_true", help="the tokenizer's chat template, not ours"
    )
    parser.add_argument("--workers", type=int, help="processes; default: one per processor")
    parser.add_argument(
        "--encoder", default="tokenizers", help="tokenizers, or gigatoken: faster, ids compared"
    )
    parser.add_argument(
        "--compare-every", type=int, default=16, help="compare every Nth document; 1: all"
    )
    parser.add_argument(
        "--allow-rejects", action="store_true", help="accept that most documents are rejected"
    )
    for name in FIELDS:
        parser.add_argument(f"--{name}-field", help=f"column that holds the {name}")


def _trim(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", required=True, help="conversations or pairs, as for prepare")
    parser.add_argument(
        "--output", required=True, type=Path, help="JSONL; rejects go to OUTPUT.rejected.jsonl"
    )
    parser.add_argument(
        "--budget", required=True, type=int, help="tokens of a whole conversation, markers included"
    )
    parser.add_argument(
        "--tokenizer", default="bytes", help="bytes, a tokenizer.json or a hub name"
    )
    parser.add_argument("--split", default="train", help="split of a hub dataset")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    for name in FIELDS[:-1]:
        parser.add_argument(f"--{name}-field", help=f"column that holds the {name}")


def _synth(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", required=True, type=Path, help="JSONL file to write")
    parser.add_argument("--count", required=True, type=int, help="problems")
    parser.add_argument("--seed", type=int, default=0, help="of the problems")
    parser.add_argument(
        "--split", choices=("train", "heldout"), default="train", help="no problem is in both"
    )
    parser.add_argument("--families", nargs="+", help="names of problem families; all by default")


def _aggregate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", required=True, help="rows of prompt, rollouts and solution")
    parser.add_argument("--output", required=True, type=Path, help="JSONL of conversations")
    parser.add_argument("--candidates", type=int, default=4, help="attempts in an example")
    parser.add_argument("--tail", type=int, default=4096, help="tokens of each attempt's end")
    parser.add_argument("--tokenizer", default="bytes", help="by which --tail counts")
    parser.add_argument("--seed", type=int, default=0, help="chooses among more attempts")


def _ledger(data: Any, handlers: Mapping[str, Handler]) -> None:
    ledger = data.add_parser(
        "ledger", help="which document made which step", formatter_class=Help
    ).add_subparsers(metavar="COMMAND", required=True)
    parser = add_command(
        ledger,
        "verify",
        handlers["ledger verify"],
        "prove that a run read its data once, in order, without loss",
    )
    parser.add_argument("run_dir", type=Path, help="run directory")
    parser.add_argument(
        "--plan-only", action="store_true", help="do not read every row to compare fingerprints"
    )
    parser = add_command(
        ledger, "show", handlers["ledger show"], "print the text that a step was made of"
    )
    parser.add_argument("run_dir", type=Path, help="run directory")
    parser.add_argument("--step", type=int, required=True, help="counted from 1")
    parser.add_argument("--rows", type=int, default=4, help="rows to print")


def add_runs(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya plan`, `supervise`, `doctor`, `parity`, `report`, `watch`, `sync`, `diff`, `smoke`."""
    add_plan(
        add_command(commands, "plan", handlers["plan"], "preview a run: memory, time, layouts")
    )
    parser = add_command(
        commands, "supervise", handlers["supervise"], "train, watched from outside and restarted"
    )
    parser.add_argument("overrides", nargs="+", help="as for train: recipe=zaya1_8b ...")
    parser.add_argument("--ranks", type=int, default=1, help="processes of this node")
    parser.add_argument("--nodes", type=int, default=1, help="of the run")
    parser.add_argument("--node-rank", type=int, default=0, help="this node's number, from 0")
    parser.add_argument("--master", help="host:port where the nodes meet")
    parser = add_command(
        commands, "doctor", handlers["doctor"], "prove a configuration on local ranks, shrunk"
    )
    parser.add_argument("overrides", nargs="+", help="as for train: recipe=zaya1_8b ...")
    parser.add_argument("--ranks", type=int, default=4, help="2, 4 or 8 processes of this machine")
    parser.add_argument("--receipt", type=Path, help="JSON file of all figures")
    parser = add_command(
        commands, "parity", handlers["parity"], "does a run with experts in fp8 follow its curve"
    )
    parser.add_argument(
        "overrides", nargs="+", help="as for train: recipe=... precision=fp8_experts"
    )
    parser.add_argument("--steps", type=int, default=20, help="of each of the three runs")
    parser.add_argument(
        "--output", type=Path, help="folder; default: parity in the run's directory"
    )
    parser = add_command(
        commands, "report", handlers["report"], "one HTML file with the curves of runs"
    )
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, overlaid")
    parser.add_argument("--output", type=Path, help="default: report.html in the first run")
    parser = add_command(
        commands, "sync", handlers["sync"], "show a run's metrics in TensorBoard and wandb"
    )
    parser.add_argument("run_dir", type=Path, help="run directory")
    parser.add_argument(
        "--only", choices=("tensorboard", "wandb"), help="one of them; both by default"
    )
    parser.add_argument(
        "--online", action="store_true", help="upload to wandb now, not by `wandb sync` later"
    )
    parser.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    parser = add_command(
        commands, "diff", handlers["diff"], "must two runs give the same loss curve, and why not"
    )
    place = "run directory, checkpoint, or configuration (frozen, or kept by a run)"
    parser.add_argument("first", type=Path, help=place)
    parser.add_argument("second", type=Path, help="the same")
    parser.add_argument("--json", action="store_true", help="everything, for programs")
    parser = add_command(commands, "watch", handlers["watch"], "a live run in the terminal")
    parser.add_argument("run_dir", metavar="run", type=Path, help="run directory")
    parser.add_argument("--once", action="store_true", help="print one frame and end")
    parser.add_argument("--every-seconds", type=float, default=2.0, help="between frames")
    parser = add_command(
        commands, "router", handlers["router"], "the balancing controller: state, advice, what-if"
    )
    parser.add_argument("run_dir", metavar="run", type=Path, help="run directory")
    parser.add_argument(
        "--gains",
        action="append",
        help="replay the routing trace under these: learning_rate=0.003,beta1=0.8; repeatable",
    )
    parser = add_command(commands, "smoke", handlers["smoke"], "the whole main job on this machine")
    parser.add_argument("--output", type=Path, default=Path("runs/smoke"), help="folder of it all")
    parser.add_argument("--data", help="train on this dataset instead of generated problems")
    parser.add_argument(
        "--tokenizer", default="bytes", help="bytes, a tokenizer.json or a hub name"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for the training runs")


def add_bench(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya bench step`."""
    bench = commands.add_parser("bench", help="measure", formatter_class=Help).add_subparsers(
        metavar="COMMAND", required=True
    )
    parser = add_command(
        bench,
        "step",
        handlers["bench step"],
        "time training steps on random rows, and what is in them",
    )
    parser.add_argument("overrides", nargs="+", help="as for train: recipe=zaya1_8b_1gpu ...")
    parser.add_argument("--phase", help="of the plan; default: its first")
    parser.add_argument("--warm", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument(
        "--profiled", type=int, default=2, help="micro-batches of the profiled step; 0: no profile"
    )
    parser.add_argument("--document-tokens", type=int, help="default: a row is one document")
    parser.add_argument("--output", type=Path, help="folder; default: bench in the run's directory")


def add_checkpoint(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya checkpoint ...`."""
    checkpoint = commands.add_parser(
        "checkpoint", help="look at checkpoints", formatter_class=Help
    ).add_subparsers(metavar="COMMAND", required=True)
    place = "run directory, its checkpoints, or one of them"
    parser = add_command(checkpoint, "ls", handlers["checkpoint ls"], "list them, unread")
    parser.add_argument("path", type=Path, help=place)
    parser = add_command(
        checkpoint, "verify", handlers["checkpoint verify"], "read every byte of them"
    )
    parser.add_argument("paths", nargs="+", type=Path, help=place)
    parser = add_command(
        checkpoint, "diff", handlers["checkpoint diff"], "tensors, position and configuration"
    )
    parser.add_argument("first", type=Path, help="a checkpoint, or a run for its newest")
    parser.add_argument("second", type=Path, help="the same")
    parser.add_argument("--rows", type=int, default=10, help="most tensors to show")


def add_cluster(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya submit`, `env` and `preflight`."""
    parser = add_command(commands, "submit", handlers["submit"], "hand a run to Slurm")
    parser.add_argument(
        "words", nargs="+", help="as for train, and nodes=, time_limit_minutes=, cluster=, chain="
    )
    parser.add_argument("--dry-run", action="store_true", help="write the scripts, submit nothing")
    parser = add_command(commands, "env", handlers["env"], "environment of the ranks, with reasons")
    parser.add_argument("cluster", nargs="?", default="mi300x_pollara", help="of configs/cluster")
    parser.add_argument("--sh", action="store_true", help="as shell lines")
    parser = add_command(
        commands, "preflight", handlers["preflight"], "is every node fit for a run, on every rank"
    )
    parser.add_argument(
        "--level", choices=("quick", "full"), default="quick", help="full: minutes, with load"
    )
    parser.add_argument(
        "--directory", type=Path, default=Path("."), help="folder that all nodes see, to write in"
    )
    parser.add_argument(
        "--free-gib", type=float, default=1.0, help="space that checkpoints need in that folder"
    )
    parser.add_argument("--output", type=Path, help="JSON report")
    parser.add_argument("--exclude-file", type=Path, help="names of unfit nodes, for sbatch")
    parser.add_argument(
        "--minimum", action="append", metavar="NAME=VALUE", help="a limit of this site"
    )
    parser.add_argument("--timeout", type=float, default=300.0, help="longest wait for a rank, s")
    _device(parser)


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="cuda: ROCm, too"
    )


def add_kernels(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya kernels ...`."""
    kernels = commands.add_parser(
        "kernels", help="check and time the kernels", formatter_class=Help
    ).add_subparsers(metavar="COMMAND", required=True)
    parser = add_command(
        kernels,
        "verify",
        handlers["kernels verify"],
        "interpret them, compile them for absent GPUs, compare",
    )
    parser.add_argument("--arch", nargs="+", help="gfx942, gfx950, sm_90; all by default")
    parser.add_argument("--no-numerics", action="store_true", help="compile only")
    parser.add_argument(
        "--write", type=Path, help="replace the golden file and the table of this page"
    )
    parser = add_command(
        kernels, "bench", handlers["kernels bench"], "time back ends against each other, here"
    )
    parser.add_argument("--op", action="append", help="as in kernels.*; default: all")
    parser.add_argument("--shape", action="append", help="default: those for the device")
    parser.add_argument("--backend", action="append", help="eager, triton, compile ...; all")
    parser.add_argument("--rounds", type=int, help="samples; 20 on a GPU, 5 on a CPU")
    _device(parser)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--out", type=Path, default=Path("kernels/bench/results.csv"), help="table to append to"
    )
