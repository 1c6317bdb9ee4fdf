"""Top-1 mixture of SwiGLU experts with an optional skip class (2605.05365, II-A2).

Legend: B batch, S sequence, D hidden, E experts, F expert width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from zaya_kernels.grouped_mlp.op import grouped_mlp

from zaya_train.model.recompute import RoutingTape, again_but_products, run
from zaya_train.model.router import Router

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from zaya_kernels.router.op import Routed

    from zaya_train.config.schema import ModelConfig
    from zaya_train.model.interfaces import Surroundings


class Experts(nn.Module):
    """The SwiGLU experts' weights. A module of its own, so that they can be sharded over other
    ranks than the rest of the layer."""

    def __init__(self, config: ModelConfig, around: Surroundings) -> None:
        super().__init__()
        experts, width, hidden = config.num_experts, config.expert_ffn_size, config.hidden_size
        self.around = around
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [R, D] sorted by local expert, counts [E_local], see Route -> [R, D]."""
        own = self.around.dispatcher.own_experts
        kernels = self.around.kernels
        return grouped_mlp(
            rows, counts, own(self.gate_up), own(self.down), kernels.grouped_mlp,
            recompute=kernels.grouped_mlp_recompute, main=self.around.main_gradients(self),
            fp8=self.around.fp8_experts,
        )  # fmt: skip


class MoE(nn.Module):
    """Router and experts; the output is the chosen expert's, times its unbiased probability."""

    def __init__(self, config: ModelConfig, layer: int, around: Surroundings) -> None:
        super().__init__()
        self.config = config
        self.around = around
        self.router = Router(config, layer, around)
        self.experts = Experts(config, around)

    def forward(
        self,
        enter: Callable[[], tuple[Tensor, Tensor]],
        previous: Tensor | None,
        valid: Tensor,
        tape: RoutingTape,
    ) -> tuple[Tensor, Tensor, Routed]:
        """`enter` makes the stream [B, S, D] and its norm; previous router state, valid [B, S].

        Returns the block's output [B, S, D], the stream, and the routing. `enter` is called where
        the norm may be made again in the backward pass.
        """
        make = again_but_products if self.around.recompute == "selective" else run
        stream, normed, routing = make(self._choose, enter, previous, valid, tape)
        dispatcher = self.around.dispatcher
        if tape.route is None:
            tape.route = dispatcher.route(
                routing.choice.flatten(), self.config.num_experts, self.around.kernels
            )
        route = tape.route
        going = dispatcher.start_dispatch(normed.flatten(0, 1), route)
        arrived = dispatcher.finish_dispatch(going)
        leaving = dispatcher.start_combine(self.experts(arrived, route.counts), route)
        identity = self.config.skip_class and self.config.skip_output == "identity"
        base = going.tokens if identity else None
        out = dispatcher.finish_combine(leaving, base, routing.probability.flatten())
        return out.view_as(normed), stream, routing

    def _choose(
        self,
        enter: Callable[[], tuple[Tensor, Tensor]],
        previous: Tensor | None,
        valid: Tensor,
        tape: RoutingTape,
    ) -> tuple[Tensor, Tensor, Routed]:
        """The stream, the normalised input and its routing."""
        stream, normed = enter()
        return stream, normed, self.router(normed, previous, valid, tape)
