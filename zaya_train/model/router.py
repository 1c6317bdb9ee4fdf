"""MLP router with exponential depth averaging and biased top-1 choice (2605.05365, II-A2).

Legend: B batch, S sequence, D hidden, R router width, E experts, C classes (E, or E + 1 with skip).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import gelu
from zaya_kernels.norm_residual.op import rms_norm
from zaya_kernels.products import linear

from zaya_train.model.counts import count_classes
from zaya_train.model.recompute import RoutingTape

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_train.config.schema import ModelConfig
    from zaya_train.model.interfaces import Surroundings


@dataclass(frozen=True)
class Routing:
    """A forward pass's routing; made once, also when activations are recomputed."""

    choice: Tensor
    """[B, S] int64 class of each token; E is the skip class."""
    probability: Tensor
    """[B, S] fp32 unbiased probability of the choice; the only path of gradients to the router."""
    state: Tensor
    """[B, S, R] router latent after averaging, input of the next layer's router."""
    load: Tensor
    """[C] fp32 count of valid tokens per class."""


class Router(nn.Module):
    """Down-projection, depth averaging, norm, three-layer MLP, softmax, biased choice.

    The state, the MLP and the softmax are computed in fp32.
    """

    def __init__(self, config: ModelConfig, layer: int, around: Surroundings) -> None:
        super().__init__()
        size = config.router_size
        self.num_classes = config.num_experts + int(config.skip_class)
        self.eps = config.norm_eps
        self.backend = around.kernels.norm_residual
        self.down = nn.Parameter(torch.empty(size, config.hidden_size))
        self.down_bias = nn.Parameter(torch.empty(size))
        # Layer 0 has no earlier router to average with.
        self.depth_scale = nn.Parameter(torch.empty(size)) if layer > 0 else None
        self.norm = nn.Parameter(torch.empty(size))
        self.fc1 = nn.Parameter(torch.empty(size, size))
        self.fc1_bias = nn.Parameter(torch.empty(size))
        self.fc2 = nn.Parameter(torch.empty(size, size))
        self.fc2_bias = nn.Parameter(torch.empty(size))
        self.out = nn.Parameter(torch.empty(self.num_classes, size))
        self.balancing_bias: Tensor
        self.register_buffer("balancing_bias", torch.empty(self.num_classes))

    def forward(
        self,
        x: Tensor,
        previous: Tensor | None,
        valid: Tensor,
        tape: RoutingTape | None = None,
    ) -> Routing:
        """x [B, S, D] normalised, previous [B, S, R] or None, valid [B, S] bool. The choice is the
        tape's if that holds one, else written to it."""
        tape = tape or RoutingTape()
        state = _wide(linear(x, self.down, self.down_bias))
        if self.depth_scale is not None and previous is not None:
            state = torch.addcmul(state, previous, self.depth_scale.to(state.dtype))
        else:
            # Leaves the layer as an output of its own: FSDP hooks outputs, and a view of the
            # product (which `linear` gives) would make it warn about wrong gradients.
            state = state.clone()
        probabilities = self._logits(state).softmax(dim=-1)
        if tape.choice is None or tape.load is None:
            with torch.no_grad():
                tape.choice = (probabilities + self.balancing_bias).argmax(dim=-1)
                tape.load = count_classes(tape.choice, self.num_classes, valid).float()
        choice, load = tape.choice, tape.load
        probability = probabilities.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        return Routing(choice, probability, state, load)

    def _logits(self, state: Tensor) -> Tensor:
        """[B, S, R] -> [B, S, C], fp32 or higher."""
        dtype = state.dtype
        h = rms_norm(state, self.norm.to(dtype), self.eps, self.backend)
        h = gelu(linear(h, self.fc1.to(dtype), self.fc1_bias.to(dtype)))
        h = gelu(linear(h, self.fc2.to(dtype), self.fc2_bias.to(dtype)))
        return linear(h, self.out.to(dtype))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
