"""Arguments of commands about Hugging Face folders; `model_commands` has what they call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from zaya_train.arguments import add_command

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zaya_train.arguments import Handler


def add_hub(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya import-hf`, `export-hf` and `verify-export`."""
    parser = add_command(
        commands,
        "import-hf",
        handlers["import-hf"],
        "check a Hugging Face `zaya` folder, native or legacy, and write its model config",
    )
    parser.add_argument("folder", type=Path, help="config.json and safetensors, downloaded")
    parser.add_argument(
        "--model-yaml", required=True, type=Path, help="file to write: configs/model/NAME.yaml"
    )
    parser = add_command(
        commands, "export-hf", handlers["export-hf"], "write a checkpoint as a Hugging Face folder"
    )
    parser.add_argument("source", type=Path, help="run directory or checkpoint directory")
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder, if the run has none")
    parser.add_argument(
        "--layout",
        choices=("native", "legacy"),
        default="native",
        help="native: transformers'; legacy: Zyphra's, attention and MoE as layers of their own",
    )
    parser.add_argument(
        "--verify-tokens", type=int, default=2048, help="compared with transformers"
    )
    parser.add_argument(
        "--verify-data", type=Path, help="corpus or text that they come from; default: random"
    )
    parser.add_argument(
        "--no-verify", action="store_true", help="do not compare; the receipt says so"
    )
    parser = add_command(
        commands,
        "verify-export",
        handlers["verify-export"],
        "check an exported folder against its receipt",
    )
    parser.add_argument("folder", type=Path, help="as `zaya export-hf` wrote it")
    parser.add_argument("--against", type=Path, help="run or checkpoint it must come from")
    parser.add_argument(
        "--files-only", action="store_true", help="hashes and totals; compute nothing"
    )


def add_model_use(commands: Any, handlers: Mapping[str, Handler]) -> None:
    """`zaya generate` and `evaluate`."""
    parser = add_command(
        commands, "generate", handlers["generate"], "answer prompts with an exported model"
    )
    parser.add_argument("model", type=Path, help="Hugging Face folder")
    parser.add_argument("prompts", nargs="+", help="each a conversation's first turn")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="longer replies are cut")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of probability kept")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
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
