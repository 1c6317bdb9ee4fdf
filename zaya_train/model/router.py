"""MLP router with exponential depth averaging and biased top-1 choice (2605.05365, II-A2).

Legend: B batch, S sequence, D hidden, R router width, E experts, C classes (E, or E + 1 with skip).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from zaya_kernels.router.op import Routed, RouterContext, RouterWeights, router

from zaya_train.model.recompute import RoutingTape

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_train.config.schema import ModelConfig
    from zaya_train.model.interfaces import Surroundings


class Router(nn.Module):
    """Down-projection, depth averaging, norm, three-layer MLP, softmax, biased choice.

    Parameters and the balancing bias of one layer; the operation is `zaya_kernels.router`.
    """

    def __init__(self, config: ModelConfig, layer: int, around: Surroundings) -> None:
        super().__init__()
        size = config.router_size
        self.num_classes = config.num_experts + int(config.skip_class)
        self.eps = config.norm_eps
        self.backend = around.kernels.router
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
    ) -> Routed:
        """x [B, S, D] normalised, previous [B, S, R] or None, valid [B, S] bool. The choice is the
        tape's if that holds one, else written to it."""
        tape = tape or RoutingTape()
        context = RouterContext(self.balancing_bias, valid, self.eps, tape.choice, tape.load)
        routed = router(x, previous, self.weights(), context, self.backend)
        tape.choice, tape.load = routed.choice, routed.load
        return routed

    def weights(self) -> RouterWeights:
        """The parameters as the operation takes them."""
        return RouterWeights(
            self.down,
            self.down_bias,
            self.depth_scale,
            self.norm,
            self.fc1,
            self.fc1_bias,
            self.fc2,
            self.fc2_bias,
            self.out,
        )
