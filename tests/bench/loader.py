"""Rows a second, resident memory and the balance of steps, from corpora on disk.

    python -m tests.bench.loader --megabytes 10 --megabytes 2000 --work build/loader
    python -m tests.bench.loader --traces ../shared/data/reasoning_traces.jsonl --work ...

Every corpus is read by a process of its own, which reports how much memory it held after the first
and after the last row. Corpora are synthetic conversations of lognormal length, made once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from tests.bench.streams import SOURCE, stream_of
from zaya_train.data.corpus import Corpus
from zaya_train.data.corpus_writer import fill_corpus, make_block
from zaya_train.data.prepare import PrepareRequest, prepare
from zaya_train.data.sections import Kind, Role, Sample, make_sections
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.runtime.files import whole_directory

if TYPE_CHECKING:
    from zaya_train.data.stream import PhaseStream

CONTEXTS = (4096, 32_768, 131_072)
RANKS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, action="append", default=[])
    parser.add_argument("--traces", type=Path, help="conversations to prepare and read")
    parser.add_argument("--tokenizer", default="bytes")
    parser.add_argument("--work", type=Path, required=True, help="folder for the corpora")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        _read(options.child, options.rows)
        return
    console = Console(width=160)
    corpora = [_generated(options.work / f"{size}mb", size) for size in options.megabytes]
    if options.traces:
        request = PrepareRequest(
            input=str(options.traces), output=options.work / "traces", tokenizer=options.tokenizer
        )
        corpora.append(prepare(request, console) / "train")
    for corpus in corpora:
        # A process that planned holds what planning took; a second one reads the stored plans.
        command = [sys.executable, "-m", "tests.bench.loader", "--work", str(options.work)]
        command += ["--child", str(corpus), "--rows", str(options.rows)]
        subprocess.run([*command[:-1], "8"], check=True, capture_output=True)
        for line in subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout.splitlines():
            console.print(f"{corpus}: {line}", markup=False, highlight=False, soft_wrap=True)


def _generated(path: Path, megabytes: int) -> Path:
    """A corpus of about that size; every conversation is a prompt, reasoning and an answer."""
    if path.is_dir():
        return path
    tokenizer, rng = load_tokenizer("bytes"), np.random.default_rng(0)
    source = {"generated": megabytes}
    with whole_directory(path) as folder, fill_corpus(folder, tokenizer, "chat", source) as writer:
        left = megabytes * 1_000_000 // 2
        while left > 0:
            samples = [_generated_sample(rng) for _ in range(64)]
            writer.append(make_block(samples, tokenizer))
            left -= sum(len(sample.tokens) for sample in samples)
    return path


def _generated_sample(rng: np.random.Generator) -> Sample:
    reasoning = int(rng.lognormal(np.log(2000) - 0.5, 1.0))
    rows = [(1, Role.USER, Kind.MARKUP, 0, False), (50, Role.USER, Kind.PROMPT, 0, False)]
    rows += [(2, Role.ASSISTANT, Kind.MARKUP, 1, True)]
    rows += [(reasoning, Role.ASSISTANT, Kind.REASONING, 1, True)]
    rows += [(1, Role.ASSISTANT, Kind.MARKUP, 1, True)]
    rows += [(60, Role.ASSISTANT, Kind.ANSWER, 1, True)]
    sections = make_sections(rows)
    return Sample(rng.integers(8, 264, int(sections["end"][-1])), sections)


def _read(path: Path, rows: int) -> None:
    console = Console(width=160)
    documents = len(Corpus.open(path))
    # Looking at whole plans takes memory, so it comes after all rows have been read.
    read = []
    for context in CONTEXTS:
        stream = stream_of(path, context)
        stream.row(0)
        before, count = _resident_bytes(), max(RANKS, min(rows, rows * 4096 // context * 2))
        start = time.process_time()
        for index in range(count):
            stream.row(index)
        seconds = time.process_time() - start
        read.append((stream, count, seconds, before, _resident_bytes()))
    for stream, count, seconds, before, after in read:
        report, context = stream.reports[SOURCE], stream.row_tokens
        work = np.array([_work(stream, index) for index in range(count // RANKS * RANKS)])
        steps = work.reshape(-1, RANKS)
        values = {
            "context": context,
            "documents": documents,
            "rows_per_cpu_second": round(count / seconds),
            "resident_mb_first_row": round(before / 1e6, 1),
            "resident_mb_last_row": round(after / 1e6, 1),
            "utilisation_percent": round(100 * report.utilisation, 3),
            "bound_percent": round(100 * report.tokens / (_bound(stream, context) * context), 3),
            "slowest_of_8": round(float((steps.max(axis=1) / steps.mean(axis=1)).mean()), 3),
            "slowest_of_8_median": round(
                float(np.median(steps.max(axis=1) / steps.mean(axis=1))), 3
            ),
            "slowest_of_8_by_time": round(
                float(steps.max(axis=1).sum() / steps.mean(axis=1).sum()), 3
            ),
            **_least_imbalance(stream),
        }
        console.print(json.dumps(values), markup=False, highlight=False, soft_wrap=True)


def _bound(stream: PhaseStream, row_tokens: int) -> int:
    """Rows that no packing can do without: L2 of Martello and Toth (1990)."""
    lengths = np.sort(stream.sources[SOURCE].plan.rows()[0].lengths)
    running = np.concatenate([[0], np.cumsum(lengths)])
    half = int(np.searchsorted(lengths, row_tokens // 2, side="right"))
    best = -(-int(running[-1]) // row_tokens)
    for small in np.unique(lengths[:half]).tolist():
        first = int(np.searchsorted(lengths, small))
        alone = int(np.searchsorted(lengths, row_tokens - small, side="right"))
        shared, room = alone - half, (alone - half) * row_tokens - (running[alone] - running[half])
        rest = int(running[half] - running[first] - room)
        rows = len(lengths) - alone + shared + max(0, -(-rest // row_tokens))
        best = max(best, rows)
    return best


def _least_imbalance(stream: PhaseStream) -> dict[str, float]:
    """What no packing and no order can do better, for one epoch of whole steps.

    The step that holds the longest document does at least that document's work on its slowest rank,
    and on average no more than an eighth of the longest documents that eight rows can hold, the
    last of them cut. All other steps are taken to be even.
    """
    falling = np.sort(stream.sources[SOURCE].plan.rows()[0].lengths)[::-1].astype(np.float64)
    count = int(np.searchsorted(np.cumsum(falling), RANKS * stream.row_tokens)) + 1
    heaviest, longest = float((falling[:count] ** 2).sum()) / RANKS, float(falling[0] ** 2)
    steps = max(1, len(stream.sources[SOURCE].plan) // RANKS)
    mean = float((falling**2).sum()) / RANKS / steps
    step = max(1.0, longest / heaviest)
    by_time = max(1.0, (longest + max(0.0, mean * steps - heaviest)) / (mean * steps))
    return {
        "least_of_heaviest_step": round(step, 3),
        "least_mean": round((step + steps - 1) / steps, 3),
        "least_by_time": round(by_time, 3),
    }


def _work(stream: PhaseStream, index: int) -> int:
    _, pieces = stream.pieces(index)
    return int((pieces.lengths**2).sum())


def _resident_bytes() -> int:
    fields = Path("/proc/self/status").read_text(encoding="ascii").split("VmRSS:")[1].split()
    return int(fields[0]) * 1024


if __name__ == "__main__":
    main()
