"""`zaya data prepare` against Megatron-LM's tools/preprocess_data.py, whole commands in turn.

    python -m tests.bench.prepare --data ../shared/data --tokenizer FOLDER --work DIR \
        --megatron CHECKOUT --encoder tokenizers gigatoken --rounds 3

FOLDER holds a tokenizer.json. CHECKOUT is a Megatron-LM checkout of the release of megatron-core
that is installed; `--extra` adds folders with what its tool imports besides (six). Without a
checkout only our command is timed, and that is said. Both use `--workers` processes, write what the
other writes byte for byte (checked), and pay for their own imports. CPU seconds include children.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console

from zaya_train.data.corpus import BIN, IDX
from zaya_train.data.fast_encoder import ENCODERS, PLAIN
from zaya_train.data.reading import open_input
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.runtime.files import file_sha256

CONSOLE = Console(width=160, highlight=False)
FILES = ("reasoning_traces.jsonl", "gsm8k_train.jsonl", "multiturn_think.jsonl", "math500.jsonl")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSONL files")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer.json")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--megatron", type=Path, help="Megatron-LM checkout")
    parser.add_argument("--extra", type=Path, action="append", default=[])
    parser.add_argument("--encoder", nargs="+", choices=ENCODERS, default=[PLAIN])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=1, help="the text so many times over")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.work / "text.jsonl"
    _write_text(options, text)
    load_tokenizer(str(options.tokenizer)).save(options.work / "tokenizer")
    size = text.stat().st_size / 1e6
    commands = {name: _ours(options, text, name) for name in options.encoder}
    if options.megatron:
        commands["megatron"] = _theirs(options, text)
    else:
        CONSOLE.print("megatron: skipped, no --megatron CHECKOUT given")
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(options.rounds):
        for name, (command, environment) in commands.items():
            seconds[name].append(_timed(command, environment))
            wall, cpu = seconds[name][-1]
            CONSOLE.print(f"{name}: {wall:.1f} s wall, {cpu:.1f} s CPU, {size / wall:.2f} MB/s")
    if not options.megatron:
        return 0
    for name in options.encoder:
        for kind, place in (("wall", 0), ("CPU", 1)):
            pairs = zip(seconds["megatron"], seconds[name], strict=True)
            ratios = [theirs[place] / ours[place] for theirs, ours in pairs]
            listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            median = statistics.median(ratios)
            CONSOLE.print(f"{name}: {kind} ratio {listed}; median {median:.2f}")
    return max(_compare(options.work, name) for name in options.encoder)


def _write_text(options: argparse.Namespace, target: Path) -> None:
    """The texts of conversations and pairs, one document each, without think tags: those of a text
    stay text here, where the other tool makes them special tokens."""
    lines = []
    for name in FILES:
        for _, row in open_input(str(options.data / name)).rows():
            if "messages" in row:
                document = "\n".join(str(message["content"]) for message in row["messages"])
            else:
                document = "\n".join(value for value in row.values() if isinstance(value, str))
            document = document.replace("<think>", "").replace("</think>", "")
            lines.append(json.dumps({"text": document}) + "\n")
    target.write_text("".join(lines) * options.repeat, encoding="utf-8")


def _ours(
    options: argparse.Namespace, text: Path, encoder: str
) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "zaya_train", "data", "prepare", "--input", str(text)]
    command += ["--output", str(options.work / encoder), "--workers", str(options.workers)]
    command += ["--encoder", encoder]
    command += ["--tokenizer", str(options.work / "tokenizer")]
    return command, dict(os.environ)


def _theirs(options: argparse.Namespace, text: Path) -> tuple[list[str], dict[str, str]]:
    tool = options.megatron / "tools" / "preprocess_data.py"
    command = [sys.executable, "-W", "ignore", str(tool), "--input", str(text), "--append-eod"]
    command += ["--output-prefix", str(options.work / "theirs"), "--workers", str(options.workers)]
    command += ["--tokenizer-type", "HuggingFaceTokenizer"]
    command += ["--tokenizer-model", str(options.work / "tokenizer")]
    places = [str(options.megatron), *map(str, options.extra)]
    return command, {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


def _timed(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall and CPU seconds of a command that must succeed; what it wrote before is removed."""
    if "zaya_train" in command:
        shutil.rmtree(command[command.index("--output") + 1], ignore_errors=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def _compare(work: Path, encoder: str) -> int:
    """1 where the two wrote different bytes."""
    different = 0
    for ours, ending in ((BIN, "bin"), (IDX, "idx")):
        theirs = work / f"theirs_text_document.{ending}"
        same = file_sha256(work / encoder / "train" / ours) == file_sha256(theirs)
        CONSOLE.print(f"{encoder}: .{ending}: {'same bytes' if same else 'DIFFERENT'}")
        different |= not same
    return int(different)


if __name__ == "__main__":
    sys.exit(main())
