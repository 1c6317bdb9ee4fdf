"""Small ZAYA models with every tensor random, and transformers' twin of each."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_type_hints

import torch
import transformers

from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.config.schema import KernelsConfig, ModelConfig, RecomputeKind
from zaya_train.hub.config import config_to_hf
from zaya_train.model import SequenceLayout, ZayaModel, initialise
from zaya_train.model.interfaces import Surroundings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

CPU = torch.device("cpu")


def every(backend: str) -> KernelsConfig:
    """All operations that have this back end by it, the others eager."""
    kinds = get_type_hints(KernelsConfig)
    names = {name: backend for name, kind in kinds.items() if f"'{backend}'" in str(kind)}
    return replace(KernelsConfig(), **names)  # type: ignore[arg-type]


REFERENCE = every("reference")
NATIVE = every("native")
TINY = ModelConfig(
    vocab_size=101,
    num_layers=3,
    hidden_size=32,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    expert_ffn_size=24,
    router_size=16,
    max_context_tokens=256,
    skip_output="zero",
)
ZAYA1_8B = ModelConfig(
    vocab_size=262_272,
    num_layers=40,
    hidden_size=2048,
    num_query_heads=8,
    num_kv_heads=2,
    head_dim=128,
    num_experts=16,
    expert_ffn_size=2048,
    router_size=256,
)

# What the parity tests run over: odd vocabularies and widths, 1 to 4 KV heads, 1 to 4 taps of
# either convolution, one layer (no depth averaging) to four, full and quarter rotation.
VARIANTS = {
    "one_kv_head": replace(TINY, vocab_size=257, num_kv_heads=1, num_layers=4),
    "no_taps": replace(TINY, conv_depthwise_taps=1, conv_grouped_taps=1, router_size=8),
    "three_kv_heads": replace(
        TINY, num_query_heads=6, num_kv_heads=3, conv_depthwise_taps=3, router_size=24
    ),
    "four_kv_heads": replace(TINY, num_kv_heads=4, conv_depthwise_taps=4, conv_grouped_taps=4),
    "one_layer": replace(TINY, num_layers=1, num_query_heads=8, conv_grouped_taps=3),
    "one_expert": replace(TINY, num_experts=1, conv_depthwise_taps=1, conv_grouped_taps=4),
    "odd_widths": replace(
        TINY, vocab_size=127, hidden_size=37, expert_ffn_size=19, router_size=11, head_dim=12
    ),
    "rotation": replace(TINY, rope_fraction=1.0, rope_base=5_000_000.0, norm_eps=1e-6),
    "quarter_rotation": replace(TINY, head_dim=16, rope_fraction=0.25, conv_depthwise_taps=3),
}


def randomise(model: nn.Module, seed: int) -> None:
    """Shift every parameter and buffer by noise, so that no scale is 1 and no bias 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                amount = 0.02 if "balancing" in name else 0.1
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * amount)


def random_model(
    config: ModelConfig,
    seed: int = 0,
    kernels: KernelsConfig | None = None,
    recompute: RecomputeKind = "none",
) -> ZayaModel:
    """A model as a training run would start it, then `randomise`d; fp32."""
    around = Surroundings(kernels=kernels or KernelsConfig(), recompute=recompute)
    model = ZayaModel(config, around)
    initialise(model, seed)
    randomise(model, seed)
    return model


def with_kernels(model: ZayaModel, kernels: KernelsConfig) -> ZayaModel:
    """The same weights behind other back ends."""
    other = ZayaModel(model.config, Surroundings(kernels=kernels))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return other.to(model.embedding.dtype)


def random_twin(config: ModelConfig, seed: int = 0) -> transformers.ZayaForCausalLM:
    """transformers' model of that shape with random weights; no padding id, for transformers'
    embedding drops the gradient of its padding token."""
    settings = config_to_hf(config) | {"pad_token_id": None}
    torch.manual_seed(seed)
    # Its grouped products refuse odd widths, hence eager experts.
    settings["experts_implementation"] = "eager"
    twin = transformers.ZayaForCausalLM(transformers.ZayaConfig(**settings))
    randomise(twin, seed)
    # transformers starts the key temperature at zero, which hides whatever the keys are.
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith(".temp"):
                parameter.add_(1.0)
    return twin


def blocks(model: ZayaModel) -> list[Any]:
    """The layers; a ModuleList yields what type checkers take for any module."""
    return list(model.layers)


def random_tokens(config: ModelConfig, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, shape, generator=generator)


def next_tokens(tokens: Tensor) -> Tensor:
    """Labels of rows that are one document each."""
    return torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE_LABEL)


def packed(documents: Sequence[Sequence[int]], row_tokens: int) -> SequenceLayout:
    return SequenceLayout.of_documents(documents, row_tokens, CPU)
