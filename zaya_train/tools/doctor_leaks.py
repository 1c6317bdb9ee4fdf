"""The leak probe: change one part of a packed row and see what else moves.

Document: other random tokens in document A must move neither the logits of any other document nor
the gradients of a loss over the others' tokens. Causal: other tokens from a place on must not move
the logits before it. What moves by rounding alone (experts' batches change with their tokens) stays
below `TOLERANCE`; a leak is of the order of the numbers themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.optim.shards import Shard
from zaya_train.parallel.fsdp import reshard
from zaya_train.tools.doctor_layouts import relative
from zaya_train.tools.doctor_ranks import RanksFailed, on_ranks
from zaya_train.tools.doctor_subject import Subject
from zaya_train.tools.random_rows import RandomRow, random_row

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from zaya_train.config.schema import TrainConfig
    from zaya_train.tools.doctor_subject import Context, Trial

TOLERANCE = 1e-5
_LENGTHS = (9, 1, 13, 6)
"""Of 32 tokens, with padding behind them; cuts of 2 to 8 chunks lie within documents."""


@dataclass(frozen=True)
class Change:
    """Tokens [start, end) of the row get other values."""

    what: str
    start: int
    end: int
    others: bool
    """The range is one document of others; False: it reaches to the row's end."""

    def protects(self, place: int) -> bool:
        """Whether the logits at a place must stay."""
        return not self.start <= place < self.end


@dataclass(frozen=True)
class Leak:
    """The largest movement that one kind of change caused."""

    what: str
    layout: str
    context: Context
    moved: float
    """Relative to the largest logit, or to the gradient's norm."""
    culprit: str
    """Change, and the first module whose output moved, or the parameter."""

    @property
    def ok(self) -> bool:
        return self.moved <= TOLERANCE


def probe(config: TrainConfig, context: Context, trial: Trial) -> list[Leak]:
    """Documents, gradients and causality under one layout; `config` is shrunk."""
    try:
        ranks = on_ranks(_probe, trial.layout.world, config, context, trial)
    except RanksFailed as failure:
        return [Leak("forward pass", trial.name, context, float("nan"), str(failure))]
    worst: dict[str, tuple[float, str]] = {}
    for found in ranks:
        for what, (moved, culprit) in found.items():
            if not moved <= worst.get(what, (-1.0, ""))[0]:
                worst[what] = (moved, culprit)
    return [Leak(what, trial.name, context, *values) for what, values in worst.items()]


def _probe(config: TrainConfig, context: Context, trial: Trial) -> dict[str, tuple[float, str]]:
    subject = Subject.of(config, context, trial)
    row = _row(context, config.model.vocab_size)
    base, places = _logits(subject, row), subject.local_tokens()
    found = {"documents": (0.0, ""), "causality": (0.0, "")}
    for change in _changes(row, 2 * trial.context):
        moved = _logits(subject, _changed(row, change, config.model.vocab_size))
        kept = torch.tensor([change.protects(place) for place in places] + [True] * len(places))
        kind = "documents" if change.others else "causality"
        result = _movement(base, moved, kept)
        if not result[0] <= found[kind][0]:
            found[kind] = (result[0], f"{change.what} moves {result[1]}")
    found["gradients"] = _gradients(subject, row)
    return found


def _row(context: Context, vocabulary: int) -> RandomRow:
    times = context.row_tokens // sum((*_LENGTHS, 3))
    return random_row(7, _LENGTHS * times, context.row_tokens, vocabulary)


def _spans(row: RandomRow) -> list[tuple[int, int]]:
    ends = np.cumsum(row.document_lengths).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _changes(row: RandomRow, chunks: int) -> Iterator[Change]:
    spans = _spans(row)
    # First, last, and some between, one-token documents among them.
    for number in sorted({0, 1, 2, len(spans) // 2, len(spans) - 1}):
        start, end = spans[number]
        yield Change(f"document {number} [{start}, {end})", start, end, True)
    length = len(row.tokens)
    # The last token of each chunk is what neighbours see of it.
    cuts = [(i + 1) * length // chunks for i in range(chunks)]
    for place in sorted({1, *(cut - 1 for cut in cuts), length // 2, length // 2 + 3}):
        yield Change(f"everything from token {place} on", place, length, False)


def _changed(row: RandomRow, change: Change, vocabulary: int) -> RandomRow:
    tokens = row.tokens.copy()
    steps = np.random.default_rng(3).integers(1, vocabulary, change.end - change.start)
    tokens[change.start : change.end] = (tokens[change.start : change.end] + steps) % vocabulary
    return RandomRow(tokens, row.labels, row.document_lengths)


def _logits(subject: Subject, row: RandomRow) -> dict[str, Tensor]:
    """Outputs [2 S_local, width] of every block in order, then the logits."""
    batch, outputs = subject.batch([row, _neighbour(subject)]), {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            outputs[name] = first.detach().flatten(0, 1).clone()

        return hook

    handles = [
        module.register_forward_hook(keep(name))
        for name, module in subject.model.named_modules()
        if name.endswith((".attention", ".moe"))
    ]
    with torch.no_grad():
        outputs["logits"] = subject.model.logits(batch.tokens, batch.layout).flatten(0, 1)
    for handle in handles:
        handle.remove()
    reshard(subject.model)
    return outputs


def _neighbour(subject: Subject) -> RandomRow:
    """Another row of the micro-batch, never changed."""
    length, vocabulary = subject.context.row_tokens, subject.config.model.vocab_size
    return random_row(8, (length,), length, vocabulary)


def _movement(base: dict[str, Tensor], moved: dict[str, Tensor], kept: Tensor) -> tuple[float, str]:
    """Largest movement of the kept places' logits, and the first block where they moved so."""
    sizes = {
        name: float((moved[name] - base[name])[kept].abs().max() / base[name].abs().max())
        for name in base
    }
    first = next((name for name, size in sizes.items() if not size <= TOLERANCE), "nothing")
    return sizes["logits"], f"others first in {first}"


def _gradients(subject: Subject, row: RandomRow) -> tuple[float, str]:
    """Gradients of a loss over all documents but one, with that one's tokens changed."""
    spans = _spans(row)
    worst = (0.0, "")
    for number in (1, len(spans) // 2):
        start, end = spans[number]
        labels = row.labels.copy()
        labels[start:end] = IGNORE_LABEL
        silent = RandomRow(row.tokens, labels, row.document_lengths)
        change = Change("", start, end, True)
        other = _changed(silent, change, subject.config.model.vocab_size)
        before, after = _backward(subject, silent), _backward(subject, other)
        if not any(gradient.any() for gradient in before.values()):
            return float("nan"), "there is no gradient to compare"
        for name, gradient in before.items():
            moved = relative(after[name], gradient) if gradient.any() or after[name].any() else 0.0
            if not moved <= worst[0]:
                worst = (moved, f"document {number} [{start}, {end}) moves the gradient of {name}")
    return worst


def _backward(subject: Subject, row: RandomRow) -> dict[str, Tensor]:
    """Local gradients of the summed loss."""
    batch = subject.batch([row])
    subject.reduction.prepare(subject.model, last=True)
    subject.model(batch.tokens, batch.labels, batch.layout).loss.backward()
    named = subject.model.named_parameters()
    gradients = {name: Shard.of(name, p).grad.clone() for name, p in named}
    subject.model.zero_grad(set_to_none=True)
    dist.barrier()
    return gradients
