"""Compressed Convolutional Attention block (arXiv 2510.04476; 2605.05365, II-A).

Legend: B batch, S sequence, D hidden, H query heads, K KV heads, d head dim, C = (H + K) d.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from zaya_kernels.attention.op import attention
from zaya_kernels.cca.op import CCAContext, CCAWeights, Projections, cca
from zaya_kernels.products import linear

from zaya_train.model.recompute import again, again_but_products, run

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_train.config.schema import ModelConfig
    from zaya_train.model.interfaces import Surroundings
    from zaya_train.model.layout import SequenceLayout
    from zaya_train.model.norm import RMSNorm

Rotation = tuple["Tensor", "Tensor"]


class CCA(nn.Module):
    """Attention in a compressed latent space, with q/k mixed by two causal convolutions."""

    def __init__(self, config: ModelConfig, around: Surroundings) -> None:
        super().__init__()
        self.config = config
        self.around = around
        heads = config.num_query_heads + config.num_kv_heads
        channels = heads * config.head_dim
        query, key = (n * config.head_dim for n in (config.num_query_heads, config.num_kv_heads))
        d, hidden = config.head_dim, config.hidden_size
        self.q_proj = nn.Parameter(torch.empty(query, hidden))
        self.k_proj = nn.Parameter(torch.empty(key, hidden))
        self.v_now_proj = nn.Parameter(torch.empty(key // 2, hidden))
        self.v_delayed_proj = nn.Parameter(torch.empty(key // 2, hidden))
        self.conv_depthwise = nn.Parameter(torch.empty(channels, config.conv_depthwise_taps))
        self.conv_depthwise_bias = nn.Parameter(torch.empty(channels))
        self.conv_grouped = nn.Parameter(torch.empty(heads, d, d * config.conv_grouped_taps))
        self.conv_grouped_bias = nn.Parameter(torch.empty(channels))
        self.temperature = nn.Parameter(torch.empty(config.num_kv_heads))
        self.out_proj = nn.Parameter(torch.empty(hidden, query))

    def forward(
        self, x: Tensor, norm: RMSNorm, layout: SequenceLayout, rotation: Rotation
    ) -> tuple[Tensor, Tensor]:
        """Stream x [B, S, D] before `norm` -> the block's output, and the stream as it is."""
        exchange, kernels = self.around.exchange, self.around.kernels
        selective = self.around.recompute == "selective"
        half = self.v_now_proj.shape[0]
        x, together = (again_but_products if selective else run)(self._project, x, norm)
        sizes = [together.shape[-1] - 2 * half, half, half]
        inputs = Projections(*together.split(sizes, dim=-1))
        context = self._context(inputs, layout, rotation)
        q, k, v = (again if selective else run)(self._mix, inputs, context)
        mixed = attention(q, *exchange.gather(k, v), layout.attention, kernels.attention)
        return linear(mixed.flatten(2), self.out_proj), x

    def _project(self, x: Tensor, norm: RMSNorm) -> tuple[Tensor, Tensor]:
        """The stream, and one product for all four projections."""
        parts = (self.q_proj, self.k_proj, self.v_now_proj, self.v_delayed_proj)
        x, normed = norm.beside(x)
        return x, linear(normed, torch.cat(parts))

    def _mix(self, inputs: Projections, context: CCAContext) -> tuple[Tensor, Tensor, Tensor]:
        return cca(inputs, self._weights(), context, self.around.kernels.cca)

    def _weights(self) -> CCAWeights:
        return CCAWeights(
            depthwise=self.conv_depthwise,
            depthwise_bias=self.conv_depthwise_bias,
            grouped=self.conv_grouped,
            grouped_bias=self.conv_grouped_bias,
            temperature=self.temperature,
        )

    def _context(
        self, inputs: Projections, layout: SequenceLayout, rotation: Rotation
    ) -> CCAContext:
        rows = self.config.conv_depthwise_taps + self.config.conv_grouped_taps - 2
        return CCAContext(
            num_query_heads=self.config.num_query_heads,
            positions=layout.positions,
            cos=rotation[0],
            sin=rotation[1],
            halo_qk=self.around.exchange.halo(inputs.qk, rows),
            halo_v=self.around.exchange.halo(inputs.v_delayed, 1),
        )
