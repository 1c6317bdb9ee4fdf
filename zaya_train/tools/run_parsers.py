"""Arguments of the other `zaya` commands; `main` has the handlers, which import what they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_train.tools.data_parsers import add_command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_train.tools.data_parsers import Handler


def add_hub(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya import-hf` and `export-hf`."""
    parser = add_command(
        commands,
        "import-hf",
        handlers["import-hf"],
        "check a Hugging Face `zaya` folder and write its model config",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model-yaml", required=True, type=Path)
    parser = add_command(
        commands, "export-hf", handlers["export-hf"], "write a checkpoint as a Hugging Face folder"
    )
    parser.add_argument("source", type=Path, help="run directory or checkpoint directory")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder, if the run has none")


def add_model_use(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya generate` and `evaluate`."""
    parser = add_command(
        commands, "generate", handlers["generate"], "answer prompts with an exported model"
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser = add_command(
        commands, "evaluate", handlers["evaluate"], "exact match on held-out problems"
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("rows", type=Path, help="JSONL with messages and answer")
    parser.add_argument("--count", type=int, default=200, help="rows to score, from the first on")
    parser.add_argument(
        "--max-new-tokens", type=int, default=640, help="longer replies are cut and wrong"
    )
    parser.add_argument("--output", type=Path, help="JSON report")


def add_runs(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya plan`, `doctor`, `report` and `smoke`."""
    parser = add_command(
        commands, "plan", handlers["plan"], "preview a run: phases, steps, layout, memory"
    )
    parser.add_argument("overrides", nargs="+", help="as for train: recipe=zaya1_8b ...")
    parser.add_argument("--ranks", type=int, default=1, help="ranks of the launch: nodes x GPUs")
    parser.add_argument(
        "--rehearse", action="store_true", help="peak memory and traffic of a step, without ranks"
    )
    parser.add_argument("--memory-gb", type=float, help="rehearse, and refuse what does not fit")
    parser.add_argument("--phase", action="append", help="rehearse these phases only")
    parser = add_command(
        commands, "doctor", handlers["doctor"], "prove a configuration on local ranks, shrunk"
    )
    parser.add_argument("overrides", nargs="+", help="as for train: recipe=zaya1_8b ...")
    parser.add_argument("--ranks", type=int, default=4, help="2, 4 or 8 processes of this machine")
    parser.add_argument("--receipt", type=Path, help="JSON file of all figures")
    parser = add_command(
        commands, "report", handlers["report"], "one HTML file with a run's curves"
    )
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, help="default: report.html in the first run")
    parser = add_command(commands, "smoke", handlers["smoke"], "the whole main job on this machine")
    parser.add_argument("--output", type=Path, default=Path("runs/smoke"))
    parser.add_argument("--data", help="train on this dataset instead of generated problems")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides for the training runs")


def add_kernels(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya kernels ...`."""
    kernels = commands.add_parser("kernels", help="check the Triton kernels").add_subparsers(
        metavar="COMMAND", required=True
    )
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
