"""The routing trace: for some steps, everything the balancing controller saw and a sample of the
probabilities it acts on, so that `zaya router` can replay it under other gains without a GPU.

<run.dir>/routing/step-00000012.npz, one a step, written by the rank that writes the metrics:

counts         [L, C] int64   tokens per class of the whole step, all ranks
bias           [L, C] fp32    balancing biases the step chose with
first, second  [L, C] fp32    the controller's moments before its update
steps          []    int64    updates before it
probabilities  [L, T, C] fp32 of T valid tokens, spread over the rank's first micro-batch
choice         [L, T] int64   what those tokens chose
applied        []    bool     false: the step was skipped, and the controller with it

Legend: L layers, C router classes, T sampled tokens.
"""

from __future__ import annotations

import io
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from zaya_kernels.router.reference import router_probabilities

from zaya_train.config.errors import StorageError
from zaya_train.runtime.files import write_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

    from zaya_train.config.schema import LoggingConfig
    from zaya_train.model.router import Router
    from zaya_train.model.zaya import ZayaModel
    from zaya_train.optim.balancing import BalancingController
    from zaya_train.train.step import StepResult

log = logging.getLogger(__name__)

ROUTING = "routing"


class RoutingTrace:
    """Records the steps that the configuration names; only the process with `enabled` does."""

    def __init__(self, run_dir: Path, config: LoggingConfig, enabled: bool) -> None:
        self._folder = run_dir / ROUTING
        first = config.trace_first_step
        self._wanted = range(first, first + config.trace_steps) if enabled else range(0)
        self._tokens = config.trace_tokens
        self._refused = False

    @contextmanager
    def recording(
        self, model: ZayaModel, controller: BalancingController, step: int
    ) -> Iterator[Recorder | None]:
        """A recorder over the step, None where it is not to be recorded."""
        if step not in self._wanted or self._refused:
            yield None
            return
        recorder = Recorder(model, controller, self._tokens)
        try:
            yield recorder
        finally:
            recorder.close()

    def write(self, step: int, recorder: Recorder, result: StepResult) -> None:
        """Keep one step. A file system that refuses ends the trace, not the run."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **recorder.arrays(result))
        try:
            write_bytes(self._folder / f"step-{step:08d}.npz", buffer.getvalue())
        except StorageError as error:
            self._refused = True
            log.warning("no more routing is recorded: %s", error)


class Recorder:
    """Watches the routers over the first micro-batch of a step."""

    def __init__(self, model: ZayaModel, controller: BalancingController, tokens: int) -> None:
        self._tokens = tokens
        self._probabilities: dict[int, Tensor] = {}
        self._choices: dict[int, Tensor] = {}
        routers = [layer.get_submodule("moe.router") for layer in model.layers]
        self._numbers = {router: number for number, router in enumerate(routers)}
        self._handles = [router.register_forward_hook(self._take) for router in routers]
        self._before: dict[str, Any] = {
            "bias": torch.stack(list(controller.biases)).cpu().numpy().copy(),
            "first": controller.first.cpu().numpy().copy(),
            "second": controller.second.cpu().numpy().copy(),
            "steps": np.int64(controller.steps),
        }

    @torch.no_grad()
    def _take(self, router: Router, given: tuple[Any, ...], made: Any) -> None:
        number = self._numbers[router]
        if number in self._probabilities:
            return  # another micro-batch, or the same one made again for the backward pass
        x, previous, valid = given[:3]
        places = valid.flatten().nonzero().flatten()
        chosen = places[:: max(1, len(places) // self._tokens)][: self._tokens]
        before = None if previous is None else previous.flatten(0, 1)[chosen]
        rows = x.flatten(0, 1)[chosen]
        _, probabilities = router_probabilities(rows, before, router.weights(), router.eps)
        self._probabilities[number] = probabilities
        self._choices[number] = made.choice.flatten()[chosen]

    def close(self) -> None:
        """Take the hooks off; safe to call twice."""
        for handle in self._handles:
            handle.remove()

    def arrays(self, result: StepResult) -> dict[str, Any]:
        """What the module's docstring lists; no sample (T = 0) where no forward pass was made."""
        layers, classes = self._before["bias"].shape
        order = range(layers)
        some = len(self._probabilities) == layers
        probabilities = torch.stack([self._probabilities[n] for n in order]) if some else None
        choices = torch.stack([self._choices[n] for n in order]) if some else None
        return {
            **self._before,
            "counts": result.load.round().long().cpu().numpy(),
            "applied": np.bool_(result.applied),
            "probabilities": (
                np.zeros((layers, 0, classes), np.float32)
                if probabilities is None
                else probabilities.float().cpu().numpy()
            ),
            "choice": (
                np.zeros((layers, 0), np.int64) if choices is None else choices.cpu().numpy()
            ),
        }
