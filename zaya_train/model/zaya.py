"""The ZAYA language model on one device (2605.05365, II).

Legend: B batch, S sequence, D hidden, L layers, C router classes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import embedding
from zaya_kernels.linear_cross_entropy.op import linear_cross_entropy_and_z

from zaya_train.model.cca import CCA, Rotation
from zaya_train.model.interfaces import Surroundings, WholeRows
from zaya_train.model.layout import SequenceLayout
from zaya_train.model.moe import MoE
from zaya_train.model.norm import ResidualScaling, RMSNorm
from zaya_train.model.recompute import RoutingTape, again, run
from zaya_train.model.rope import rotary_tables

if TYPE_CHECKING:
    from torch import Tensor

    from zaya_train.config.schema import ModelConfig


@dataclass(frozen=True)
class ModelOutput:
    """What a training step takes from a forward pass."""

    loss: Tensor
    """Scalar fp32 to differentiate: negative log-likelihood summed over supervised tokens, and
    `z_loss`."""
    z_loss: Tensor
    """Scalar fp32 without gradients; 0 where none was asked for."""
    load: Tensor
    """[L, C] fp32: valid tokens per layer and router class."""


class Layer(nn.Module):
    """CCA block, then MoE block, each behind a norm and a residual scaling."""

    def __init__(self, config: ModelConfig, layer: int, around: Surroundings) -> None:
        super().__init__()
        self.around = around
        backend = around.kernels.norm_residual
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, backend)
        self.attention = CCA(config, around)
        self.attention_residual = ResidualScaling(config.hidden_size, backend)
        self.moe_norm = RMSNorm(config.hidden_size, config.norm_eps, backend)
        self.moe = MoE(config, layer, around)
        self.moe_residual = ResidualScaling(config.hidden_size, backend)

    def forward(
        self, x: Tensor, state: Tensor | None, layout: SequenceLayout, rotation: Rotation
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, S, D] fp32 stream, state [B, S, R] -> stream, router state, load [C]."""
        make = again if self.around.recompute == "full" else run
        return make(self._compute, x, state, layout, rotation, RoutingTape())

    def _compute(
        self,
        x: Tensor,
        state: Tensor | None,
        layout: SequenceLayout,
        rotation: Rotation,
        tape: RoutingTape,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed, x = self.attention(x, self.attention_norm, layout, rotation)
        enter = partial(self.attention_residual.before, self.moe_norm, x, mixed)
        routed, x, routing = self.moe(enter, state, layout.valid, tape)
        return self.moe_residual(x, routed), routing.state, routing.load


class ZayaModel(nn.Module):
    """Decoder-only ZAYA model with tied embedding and LM head.

    Parameters are created uninitialised (also on the meta device); `model.init.initialise` or
    `hub.from_hf` fills them.
    """

    def __init__(self, config: ModelConfig, around: Surroundings | None = None) -> None:
        super().__init__()
        around = around or Surroundings()
        self.config = config
        self.around = around
        self.embedding = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.embedding_scale = nn.Parameter(torch.empty(config.hidden_size))
        self.embedding_bias = nn.Parameter(torch.empty(config.hidden_size))
        self.layers = nn.ModuleList(Layer(config, i, around) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps, around.kernels.norm_residual)

    def forward(
        self, tokens: Tensor, labels: Tensor, layout: SequenceLayout, z_loss: float = 0.0
    ) -> ModelOutput:
        """tokens and labels [B, S] int64 (labels already shifted; IGNORE_LABEL unsupervised);
        `z_loss` is optim.z_loss where the loss is trained on."""
        hidden, load = self._hidden(tokens, layout)
        backend = self.around.kernels.linear_cross_entropy
        loss, z = linear_cross_entropy_and_z(
            hidden.flatten(0, 1), self.embedding, labels.flatten(), backend, z_loss
        )
        return ModelOutput(loss, z, load)

    def logits(self, tokens: Tensor, layout: SequenceLayout | None = None) -> Tensor:
        """tokens [B, S] int64 -> [B, S, V] fp32; without a layout every row is one document.

        Ranks that share rows need the layout of their part: ValueError without one.
        """
        batch, sequence = tokens.shape
        if layout is None and not isinstance(self.around.exchange, WholeRows):
            raise ValueError("ranks that share rows need a layout: nothing says which part this is")
        layout = layout or SequenceLayout.whole_rows(batch, sequence, tokens.device)
        hidden, _ = self._hidden(tokens, layout)
        work = torch.promote_types(hidden.dtype, torch.float32)
        return hidden.to(work) @ self.embedding.to(work).t()

    def _hidden(self, tokens: Tensor, layout: SequenceLayout) -> tuple[Tensor, Tensor]:
        """Normalised last hidden states [B, S, D] and load [L, C]."""
        x = (embedding(tokens, self.embedding) + self.embedding_bias) * self.embedding_scale
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        rotation = self._rotation(layout)
        state, loads = None, []
        for layer in self.layers:
            x, state, load = layer(x, state, layout, rotation)
            loads.append(load)
        return self.norm(x), torch.stack(loads)

    def _rotation(self, layout: SequenceLayout) -> Rotation:
        rotated = int(self.config.head_dim * self.config.rope_fraction)
        return rotary_tables(layout.positions, self.config.rope_base, rotated)
