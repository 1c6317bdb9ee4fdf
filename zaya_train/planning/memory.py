"""Memory of rank 0 by component, from the configuration alone: `zaya plan --rehearse` without a
rehearsal.

A step's fullest moment is one of a few, each a sum of components:

    gathered           the last layer's weights are unpacked, the layer before's still lie there
    loss               the forward pass has ended, the loss makes logits and both gradients
    loss backward      the LM head's gradients meet all activations
    layer backward     a layer's experts, counted for the last layers and for the first one
    gathered again     the first layer's weights are unpacked, gradients of the second are sent
    sent               the last layer's whole gradients lie beside what is sent of them
    norm               every shard squared in fp64 for the global norm
    Muon               updates on their way to all replicas

tests/unit/test_forecast.py holds the peak against rehearsals.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from zaya_kernels.dtypes import DTYPES
from zaya_kernels.linear_cross_entropy.eager import VOCAB_BLOCK, chunk_rows

from zaya_train.model.shapes import parameter_shapes
from zaya_train.planning.activations import entry_parts, kept_parts, layer_parts, total
from zaya_train.planning.components import (
    ACTIVATIONS,
    AGAIN,
    BACKWARD,
    BUFFERS,
    FULL_GRADIENTS,
    GATHERED,
    GRADIENTS,
    LOSS,
    STATE,
    STEP,
    WEIGHTS,
)
from zaya_train.planning.muon import round_bytes
from zaya_train.planning.weights import Weights, weights_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from zaya_train.config.schema import ModelConfig
    from zaya_train.planning.activations import Part
    from zaya_train.planning.case import Case

_FP32, _FP64 = 4, 8


@dataclass(frozen=True)
class Moment:
    """One candidate for a step's peak."""

    name: str
    stage: str
    """forward, backward or optimizer."""
    components: Mapping[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.components.values())


@dataclass(frozen=True)
class Forecast:
    """What a step of one phase takes on rank 0."""

    case: Case
    moments: tuple[Moment, ...]

    @property
    def peak(self) -> Moment:
        return max(self.moments, key=lambda moment: moment.bytes)

    def stage(self, name: str) -> int:
        """Most bytes of a stage."""
        return max(moment.bytes for moment in self.moments if moment.stage == name)


def forecast(case: Case) -> Forecast:
    """Memory of a step of `case`, whose configuration has passed `config.check`."""
    kept = kept_parts(case, case.parallel.recompute)
    step = _Step(case, weights_of(case.model, case.layout), kept)
    layers = sorted({case.model.num_layers - 1, max(0, case.model.num_layers - 2), 0})
    moments = [step.loss(), step.loss_backward(), *(step.layer_backward(i) for i in layers)]
    if case.layout.fsdp > 1:
        moments += [step.gathered(), *step.gathered_again(), *step.sent()]
    if case.micro_batches > 1 and case.parallel.accumulation != "keep_unsharded":
        moments += [step.layer_backward(i, last=False) for i in layers]
    return Forecast(case, (*moments, step.norm(), step.muon()))


def least_bytes(case: Case) -> int:
    """What a step takes by whatever kernels: weights, state, gradients and the residual stream, the
    global norm, Muon's exchange."""
    kept = kept_parts(case, case.parallel.recompute)
    stream = tuple(part for part in kept if part.name == "residual stream")
    step = _Step(case, weights_of(case.model, case.layout), stream)
    return max(step.stream_bytes(), step.norm().bytes, step.muon().bytes)


@dataclass(frozen=True)
class _Step:
    """The moments of one step."""

    case: Case
    weights: Weights
    kept: tuple[Part, ...]
    """By a layer."""

    @property
    def _accumulates(self) -> bool:
        return self.case.micro_batches > 1

    @property
    def _keeps_full(self) -> bool:
        return self.case.parallel.accumulation == "keep_unsharded" and self._accumulates

    def _standing(self) -> Counter[str]:
        """What lives from step to step."""
        case, weights = self.case, self.weights
        momentum = DTYPES[case.config.optim.muon.momentum_dtype].itemsize
        state = weights.muon * momentum + (weights.local - weights.muon) * 2 * _FP32
        return Counter({WEIGHTS: _FP32 * weights.local, STATE: state})

    def _before_backward(self) -> Counter[str]:
        """Standing, gathered weights and the gradients of earlier micro-batches."""
        case, weights = self.case, self.weights
        parts = self._standing()
        parts[GATHERED] = case.compute_bytes * (
            weights.root.padded if case.parallel.reshard_after_forward else weights.padded
        )
        if self._keeps_full:
            parts[FULL_GRADIENTS] = _FP32 * weights.whole
        elif self._accumulates:
            parts[GRADIENTS] = _FP32 * weights.local
        return parts

    def _activations(self, layers: int) -> int:
        return total(entry_parts(self.case)) + layers * total(self.kept)

    def stream_bytes(self) -> int:
        """When the forward pass has ended, of `kept` alone."""
        kept = self.case.model.num_layers * total(self.kept)
        return sum(self._before_backward().values()) + kept

    def gathered(self) -> Moment:
        """The last layer's weights while they are unpacked; what the layer before's were unpacked
        from is freed behind them. Weights that are kept are gathered in the first micro-batch,
        before there are gradients."""
        case, layers = self.case, self.weights.layers
        again = case.parallel.reshard_after_forward
        parts = self._before_backward() if again else self._standing()
        last = case.compute_bytes * layers[-1].padded
        parts[GATHERED] = case.compute_bytes * self.weights.root.padded + last
        if not again:
            parts[GATHERED] = case.compute_bytes * self.weights.padded
        parts[BUFFERS] = case.compute_bytes * sum(unit.padded for unit in layers[-2:])
        parts[ACTIVATIONS] = self._activations(len(layers) - 1)
        return Moment("gathered", "forward", parts)

    def gathered_again(self) -> Iterator[Moment]:
        """The first layer's weights while they are unpacked in the backward pass."""
        case = self.case
        if not case.parallel.reshard_after_forward:
            return
        parts = self._before_backward()
        self._gathered(parts, 0, last=True)
        parts[BUFFERS] = case.compute_bytes * self.weights.layers[0].padded
        self._reduced(parts, 0)
        self._between_layers(parts, 1)
        yield Moment("gathered again", "backward", parts)

    def sent(self) -> Iterator[Moment]:
        """The last layer's gradients of all micro-batches, whole and copied to be sent; its weights
        are freed."""
        case, layers = self.case, self.weights.layers
        if not self._keeps_full:
            return
        parts, again = self._before_backward(), case.parallel.reshard_after_forward
        if not again:
            parts[GATHERED] -= case.compute_bytes * layers[-1].padded
        elif len(layers) > 1:
            parts[BUFFERS] = case.compute_bytes * layers[-2].padded
        parts[GRADIENTS] = DTYPES[case.config.precision.reduce_dtype].itemsize * layers[-1].padded
        self._between_layers(parts, len(layers) - 1)
        yield Moment("sent", "backward", parts)

    def _between_layers(self, parts: Counter[str], layers: int) -> None:
        """`layers` are left; gradients of the stream, of the router's state and of the LM head."""
        model = self.case.model
        parts[ACTIVATIONS] = self._activations(layers)
        parts[BACKWARD] = _FP32 * (model.hidden_size + model.router_size) * self.case.tokens
        parts[LOSS] = self.case.compute_bytes * model.vocab_size * model.hidden_size

    def loss(self) -> Moment:
        """Logits and their log-softmax beside both gradients."""
        case, weights = self.case, self.weights
        m, t, c = case.model, case.tokens, case.compute_bytes
        parts = self._before_backward()
        # The last norm's output and its copy in fp32.
        parts[ACTIVATIONS] = self._activations(m.num_layers) + c * m.hidden_size * t
        logits = _FP32 * m.vocab_size * min(t, chunk_rows(m.vocab_size, _FP32))
        block = _FP32 * m.hidden_size * min(m.vocab_size, VOCAB_BLOCK)
        blocks = min(2, -(-m.vocab_size // VOCAB_BLOCK)) if c != _FP32 else 0
        beside = max(logits, blocks * block)
        parts[LOSS] = 2 * _FP32 * m.hidden_size * t + _FP32 * m.vocab_size * m.hidden_size
        parts[LOSS] += logits + beside
        if case.layout.fsdp > 1 and (case.parallel.reshard_after_forward or not self._accumulates):
            parts[BUFFERS] = c * weights.layers[-1].padded
        return Moment("loss", "forward", parts)

    def loss_backward(self) -> Moment:
        """The LM head's gradients, in fp32 and in the compute dtype."""
        m, t, c = self.case.model, self.case.tokens, self.case.compute_bytes
        parts = self._before_backward()
        parts[ACTIVATIONS] = self._activations(m.num_layers)
        vocabulary = m.vocab_size * m.hidden_size
        parts[LOSS] = _FP32 * (2 * m.hidden_size * t + vocabulary)
        if c != _FP32:
            parts[LOSS] += c * (m.hidden_size * t + vocabulary)
        return Moment("loss backward", "backward", parts)

    def layer_backward(self, layer: int, last: bool = True) -> Moment:
        """The experts of `layer`, while gradients of the layer above are being reduced; in the
        step's last micro-batch or, where every one reduces, in one before it."""
        case, weights = self.case, self.weights
        m, t, c, rows = case.model, case.tokens, case.compute_bytes, case.received
        parts = self._before_backward()
        self._gathered(parts, layer, last)
        self._reduced(parts, layer)
        if not last and case.micro_batches == 2:
            # The first has no gradients before it.
            parts[GRADIENTS] -= _FP32 * sum(unit.local for unit in weights.units[: layer + 2])
        again = sum(part.bytes for part in layer_parts(case) if not part.last)
        if case.parallel.recompute == "full":
            parts[ACTIVATIONS] = self._activations(layer)
            parts[AGAIN] = again - _FP32 * m.hidden_size * t
        else:
            freed = sum(part.bytes for part in self.kept if part.last)
            # The layer's own result has been used.
            parts[ACTIVATIONS] = self._activations(layer + 1) - freed - _FP32 * m.hidden_size * t
        big, width = m.hidden_size, m.expert_ffn_size
        # In SwiGLU's gradient, or with the weights' gradients behind it.
        weight_gradients = c * (2 * big + 4 * width) * rows + c * weights.layers[layer].experts
        temporary = max(c * (big + 7 * width) * rows, weight_gradients)
        parts[BACKWARD] = temporary + (_FP32 + c) * big * t
        parts[LOSS] = c * m.vocab_size * big
        return Moment(f"layer {layer} backward", "backward", parts)

    def _gathered(self, parts: Counter[str], layer: int, last: bool) -> None:
        """Weights at hand: in the last micro-batch those of the layers above are freed."""
        c, layers = self.case.compute_bytes, self.weights.layers
        if not self.case.parallel.reshard_after_forward:
            if last:
                parts[GATHERED] -= c * sum(unit.padded for unit in layers[layer + 1 :])
            return
        parts[GATHERED] += c * layers[layer].padded
        if layer:
            # Gathered ahead.
            kind = BUFFERS if self.case.layout.fsdp > 1 else GATHERED
            parts[kind] += c * layers[layer - 1].padded

    def _reduced(self, parts: Counter[str], layer: int) -> None:
        """Gradients of the layers above `layer` in the step's last micro-batch."""
        case, above = self.case, self.weights.layers[layer + 1 :]
        if not above or case.layout.fsdp == 1:
            return
        done = _FP32 * sum(unit.local for unit in above)
        sending = DTYPES[case.config.precision.reduce_dtype].itemsize * above[0].padded
        if self._keeps_full:
            parts[FULL_GRADIENTS] -= _FP32 * sum(unit.whole for unit in above)
        if self._keeps_full or not self._accumulates:
            parts[GRADIENTS] += done
        elif case.parallel.accumulation == "reduce_each":
            # Not yet added to those of earlier micro-batches.
            parts[GRADIENTS] += _FP32 * above[0].local
        parts[GRADIENTS] += sending

    def norm(self) -> Moment:
        """The largest shard in fp64, and its squares."""
        parts = self._with_gradients()
        parts[STEP] = 2 * _FP64 * max(unit.largest for unit in self.weights.units)
        return Moment("norm", "optimizer", parts)

    def muon(self) -> Moment:
        """The fullest round."""
        parts = self._with_gradients()
        degrees, dtype = self.case.layout, self.case.config.optim.muon.newton_schulz_dtype
        grid = (degrees.replicate, degrees.fsdp, degrees.expert)
        parts[STEP] = _muon_bytes(self.case.model, grid, dtype)
        return Moment("Muon", "optimizer", parts)

    def _with_gradients(self) -> Counter[str]:
        parts = self._standing()
        parts[GRADIENTS] = _FP32 * self.weights.local
        return parts


@lru_cache(maxsize=64)
def _muon_bytes(model: ModelConfig, grid: tuple[int, int, int], dtype: str) -> int:
    """grid: replicas, shards, expert ranks."""
    return round_bytes(parameter_shapes(model), grid, DTYPES[dtype].itemsize)
