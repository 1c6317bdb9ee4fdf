"""Validation loss on fixed held-out rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from zaya_train.parallel.collectives import sum_over
from zaya_train.parallel.fsdp import reshard
from zaya_train.train.batch import make_batch, without_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from zaya_train.model.zaya import ZayaModel
    from zaya_train.parallel.mesh import Mesh
    from zaya_train.parallel.sequence import Chunking
    from zaya_train.train.batch import PackedRow


def validation_losses(
    model: ZayaModel,
    rows_by_name: Mapping[str, Sequence[PackedRow]],
    mesh: Mesh,
    chunking: Chunking,
    device: torch.device,
    mark: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss per supervised token of each set of rows; equal on every rank.

    Rows are dealt to the data ranks. Every rank makes the same number of forward passes, because a
    sharded forward pass is collective: the last ones may supervise nothing on some ranks. `mark` is
    called before each.
    """
    results = {}
    for name, rows in rows_by_name.items():
        total = torch.zeros(2, dtype=torch.float64, device=device)
        for start in range(0, len(rows), mesh.layout.data):
            mark()
            index = start + mesh.data_rank
            batch = make_batch(
                [rows[min(index, len(rows) - 1)]], chunking, mesh.context_rank, device
            )
            if index >= len(rows):
                batch = without_labels(batch)
            with torch.no_grad():
                loss = model(batch.tokens, batch.labels, batch.layout).loss
            total += torch.stack([loss.double(), loss.new_tensor(batch.supervised).double()])
        total = sum_over(total)
        results[name] = float(total[0] / total[1].clamp_min(1))
    reshard(model)
    return results
