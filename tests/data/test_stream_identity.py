"""The ledger of a run over every way to read it: 1, 2 and 4 ranks, 0 and 2 batches ahead, killed
after every step there is. tests/integration/test_ledger.py does the same with real runs."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zaya_train.config.derive import Layout
from zaya_train.data.ledger import LEDGER_FILE, LedgerWriter, PhaseEntry, add_fingerprints
from zaya_train.data.stream import PastPhase, PhaseStream, prefetch
from zaya_train.parallel.sequence import Chunking
from zaya_train.train.feed import Feed, step_starts

from .builders import CorpusFactory, data_config, phase_config, problems

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.config.schema import DataConfig, PhaseConfig

ROWS = 4
"""Of a step: two micro-batches of two ranks, or one of four."""
PHASES = {
    name: replace(
        phase_config(context, mixture),
        tokens=steps * ROWS * context,
        global_batch_tokens=ROWS * context,
    )
    for name, context, mixture, steps in (
        ("short", 128, {"chat": 0.75, "text": 0.25}, 9),
        ("long", 256, {"chat": 0.4, "text": 0.6}, 6),
    )
}
STEPS, CHECKPOINT_STEPS = 15, 2


class OneOf:
    """What a feed asks of a mesh, as data rank `data_rank` of `ranks`."""

    context_rank = 0

    def __init__(self, data_rank: int, ranks: int) -> None:
        self.data_rank, self.layout = data_rank, Layout(replicate=1, shard=ranks, context=1)


@pytest.fixture
def data(corpora: CorpusFactory) -> DataConfig:
    texts = [f"{number} the quick brown fox"[: 12 + number] for number in range(60)]
    sources = {"chat": corpora.chat("chat", problems(80)), "text": corpora.text("text", texts)}
    return data_config(sources, balance_rows=4)


def feeds(stream: PhaseStream, phase: PhaseConfig, ranks: int) -> list[Feed]:
    chunking = Chunking(ranks=1, head_tail=False)
    device = torch.device("cpu")
    meshes: list[Any] = [OneOf(rank, ranks) for rank in range(ranks)]
    return [Feed(stream, phase, mesh, chunking, device, ranks) for mesh in meshes]


def attempt(
    run_dir: Path, data: DataConfig, ranks: int, depth: int, steps: tuple[int, int]
) -> None:
    """Steps steps[0] + 1 to steps[1] of the run, by a process of its own so to say."""
    ledger, done = LedgerWriter(run_dir, True), 0
    past: list[PastPhase] = []
    for name, phase in PHASES.items():
        count = phase.tokens // phase.global_batch_tokens
        first, last = (min(max(step - done, 0), count) for step in steps)
        if last > first:
            stream = PhaseStream(data, name, phase, 3, past)
            ledger.phase(PhaseEntry(name, done + first, stream.describe()), first * ROWS)
            starts = list(step_starts(phase, first * ROWS, ranks))
            parts = [prefetch(feed.batches, starts, depth) for feed in feeds(stream, phase, ranks)]
            for step in range(first, last):
                read = [batch.fingerprint for part in parts for batch in next(part)]
                ledger.step(done + step + 1, (step + 1) * ROWS, add_fingerprints(read))
            for part in parts:
                part.close()
        past.append(PastPhase(name, phase, count * ROWS))
        done += count
    ledger.close()


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_prefetching_and_kills_at_every_step_change_no_byte(
    tmp_path: Path, data: DataConfig, ranks: int, depth: int
) -> None:
    attempt(tmp_path / "alone", data, 1, 0, (0, STEPS))
    expected = (tmp_path / "alone" / LEDGER_FILE).read_bytes()
    assert expected.count(b"\n") == STEPS + len(PHASES)
    for first in range(1, 8):
        kills = [*range(first, STEPS, 7), STEPS]
        run_dir = tmp_path / str(first)
        # A resume begins at the newest checkpoint, which may lie before the kill.
        begins = [0, *(kill // CHECKPOINT_STEPS * CHECKPOINT_STEPS for kill in kills)]
        for begin, kill in zip(begins, kills, strict=False):
            attempt(run_dir, data, ranks, depth, (begin, kill))
            if kill < STEPS:
                with (run_dir / LEDGER_FILE).open("ab") as file:
                    file.write(b'{"kind":"step","st')
        assert (run_dir / LEDGER_FILE).read_bytes() == expected, (ranks, depth, first)
