"""What a logged step tells beside its loss and load: residual stream, EDA gains, balancing biases,
memory of every rank.

Nothing is measured in steps that are not logged. A logged step pays for one norm per layer over its
first micro-batch, one small all-reduce and one copy to the host; no layer waits for the device.

Legend: B batch, S sequence, D hidden, L layers, C router classes.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from zaya_train.parallel.collectives import sum_over

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from zaya_train.model.zaya import ZayaModel
    from zaya_train.optim.optimizer import Optimizer

BIAS_DIGITS = 5  # softmax shares of fp32 differ by less than this between hardware
_DEPTH_SCALE = ".router.depth_scale"


class StreamWatch:
    """Squares of the residual stream before the first layer and behind every layer, over the valid
    tokens of the first micro-batch that passes."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._sums: list[Tensor] = []
        self._width = 0
        self._tokens: Tensor | None = None
        self._count = len(layers)
        self._handles = [layer.register_forward_hook(self._take) for layer in layers]
        self._waiting = dict(zip(layers, self._handles, strict=True))

    def _take(self, layer: nn.Module, given: tuple[Any, ...], made: tuple[Any, ...]) -> None:
        # Once per layer: the micro-batches that follow pass unseen.
        handle: RemovableHandle = self._waiting[layer]
        handle.remove()
        valid = given[2].valid
        if self._tokens is None:
            self._tokens = valid.sum().double()
            self._sums.append(_squares(given[0], valid))
            self._width = given[0].shape[-1]
        self._sums.append(_squares(made[0], valid))

    def close(self) -> None:
        """Take hooks off that nothing has passed; safe to call twice."""
        for handle in self._handles:
            handle.remove()

    def packed(self, device: torch.device) -> Tensor:
        """[L + 2] fp64: tokens times D, then the sums of squares; zeros where nothing passed."""
        if self._tokens is None:
            return torch.zeros(self._count + 2, dtype=torch.float64, device=device)
        return torch.stack([self._tokens * self._width, *self._sums])


def _squares(stream: Tensor, valid: Tensor) -> Tensor:
    """stream [B, S, D], valid [B, S] -> sum of squares over valid tokens."""
    # Row norms first: the square of the whole stream would be a second one in memory.
    norms = torch.linalg.vector_norm(stream.detach(), dim=-1)
    return (norms.double().square() * valid).sum()


@contextmanager
def watched(model: ZayaModel, wanted: bool) -> Iterator[StreamWatch | None]:
    """The watch over one step, None where the step is not logged."""
    watch = StreamWatch(model.layers) if wanted else None
    try:
        yield watch
    finally:
        if watch:
            watch.close()


@torch.no_grad()
def observations(
    watch: StreamWatch, optimizer: Optimizer, replicas: int, memory_bytes: int
) -> dict[str, Any]:
    """Fields of the metrics row, equal on every rank; collective.

    stream_rms: [L + 1] root mean square of the residual stream, before the first layer and behind
        every layer, over the first micro-batch of all ranks; NaN where no forward pass was made.
    eda_gain: [L - 1] mean over channels of the learned weight of the router state before, from the
        second layer on (2605.05365, II-A2).
    balancing_bias: [L][C] after the step, in units of probability.
    memory_bytes_ranks: smallest and largest peak of any rank.
    """
    biases = torch.stack(list(optimizer.balancing.biases))
    device = biases.device
    scales = [s for name, s in optimizer.shards.items() if name.endswith(_DEPTH_SCALE)]
    memory = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=device)
    memory[dist.get_rank()] = memory_bytes
    # Local shards partition a parameter over the ranks of a replica (step.global_norm).
    gains = [s.local.double().sum() / (s.parameter.numel() * replicas) for s in scales]
    stream = watch.packed(device)
    parts = sum_over(torch.cat([stream, *(gain.view(1) for gain in gains), memory]))
    host = torch.cat([parts, biases.double().flatten()]).tolist()
    layers = biases.shape[0]
    gain_end = layers + 2 + len(gains)
    count, squares = host[0], host[1 : layers + 2]
    memories = host[gain_end : gain_end + len(memory)]
    flat = [round(value, BIAS_DIGITS) for value in host[gain_end + len(memory) :]]
    classes = biases.shape[1]
    return {
        "stream_rms": [(s / count) ** 0.5 if count else float("nan") for s in squares],
        "eda_gain": host[layers + 2 : gain_end],
        "balancing_bias": [flat[i : i + classes] for i in range(0, len(flat), classes)],
        "memory_bytes_ranks": [int(min(memories)), int(max(memories))],
    }
