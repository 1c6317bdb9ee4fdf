"""Which activations are made again in the backward pass instead of being kept.

| `parallel.recompute` | kept per layer | made again |
|---|---|---|
| none | everything | nothing besides what kernels make again by themselves |
| selective | stream, weight products, attention, experts | norms, convolutions, router |
| full | the layer's inputs | the whole layer, its communication included |

In words, selective keeps the residual stream, the results of weight products, queries, keys, values
and output of attention, the dispatched rows and the experts' pre-activation; it makes again the
norms, CCA's convolutions, QK-norm and rotation, and the router's activations. It communicates
nothing.

Kernels of themselves make the SwiGLU activation and attention's probabilities again, under every
setting.

Routing happens once (contract 4 of the design). The forward pass writes its choice of experts, the
load and the route of the tokens to a `RoutingTape`; recomputation reads them. A balancing bias that
has moved meanwhile, or a product that rounds otherwise, cannot send a token elsewhere than its
activations came from; and load is counted once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from zaya_train.model.interfaces import Route

T = TypeVar("T")

# By name: a torch built without oneDNN has no such operator.
_PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")


@dataclass
class RoutingTape:
    """What one layer decided in one forward pass; empty until then."""

    choice: Tensor | None = None
    """[B, S] int64."""
    load: Tensor | None = None
    """[C] fp32."""
    route: Route | None = None


def run(function: Callable[..., T], *inputs: Any) -> T:
    """function(*inputs), keeping what autograd keeps."""
    return function(*inputs)


def again(function: Callable[..., T], *inputs: Any) -> T:
    """function(*inputs), keeping only `inputs` for the backward pass."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    # Nothing in the model draws random numbers.
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def again_but_products(function: Callable[..., T], *inputs: Any) -> T:
    """The same, keeping the results of matrix products too."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _policy),
    )


def _policy(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    kept = operation.name() in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
