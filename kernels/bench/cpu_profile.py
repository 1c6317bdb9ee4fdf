"""Where the time of a forward and backward pass goes, by part of the model, for ZayaModel and for
transformers' ZayaForCausalLM alike.

Operators belong to the innermost named range around them, those of the backward pass to the range
of the forward operator that they answer (the profiler's sequence numbers). Products of weights
outside router, experts and loss are a part of their own.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch.profiler import ProfilerActivity, profile, record_function
from zaya_kernels.backends import named_in_profiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn
    from torch.autograd.profiler_util import FunctionEvent

OURS = {
    "zaya::attention": "attention",
    "zaya::cca": "CCA",
    "zaya::grouped_mlp": "experts",
    "zaya::moe_permute": "experts",
    "zaya::router": "router",
    "zaya::norm_residual": "norms, residuals",
    "zaya::linear_cross_entropy": "head, loss",
}
THEIRS = {
    "ZayaAttention": "attention",
    "ZayaCCAProjection": "CCA",
    "ZayaQKNorm": "CCA",
    "ZayaExperts": "experts",
    "ZayaSparseMoeBlock": "experts",
    "ZayaRouter": "router",
    "ZayaRMSNorm": "norms, residuals",
    "ZayaResidualScaling": "norms, residuals",
    "ZayaForCausalLM": "head, loss",
    "ZayaModel": "rest",
}
LINEAR = "linear layers"
_PRODUCTS = ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
_SHARED = ("attention", "CCA", "rest")
"""Parts whose weight products are counted as linear layers."""
_BACKWARD = "autograd::engine::evaluate_function"


def by_part(run: Callable[[], object], model: nn.Module) -> dict[str, float]:
    """Share of the profiled time of `run`, which passes through `model`, for each part."""
    with ExitStack() as stack:
        stack.enter_context(named_in_profiles())
        for handle in _ranges(model):
            stack.callback(handle.remove)
        recorded = stack.enter_context(profile(activities=[ProfilerActivity.CPU]))
        run()
    events = recorded.events()
    parts = _forward_parts(events)
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        seconds[_counted(event, _part(event, parts))] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {part: spent / total for part, spent in seconds.items()}


def _ranges(model: nn.Module) -> Iterable[Any]:
    """Hooks that put a range around the modules of THEIRS."""
    open_ranges: list[Any] = []

    def enter(module: nn.Module, *_: object) -> None:
        within = record_function(type(module).__name__)
        within.__enter__()
        open_ranges.append(within)

    def leave(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for module in model.modules():
        if type(module).__name__ in THEIRS:
            yield module.register_forward_pre_hook(enter)
            yield module.register_forward_hook(leave)


def _named(event: FunctionEvent) -> str | None:
    """Part of the innermost range around `event`; None outside any, "backward" in that pass."""
    at: FunctionEvent | None = event
    while at is not None:
        if at.name.startswith(_BACKWARD):
            return "backward"
        if at.name in OURS or at.name in THEIRS:
            return OURS.get(at.name) or THEIRS[at.name]
        at = at.cpu_parent
    return None


def _forward_parts(events: Iterable[FunctionEvent]) -> dict[int, str]:
    """Sequence number of a forward operator -> its part."""
    found = {}
    for event in events:
        part = _named(event)
        if event.sequence_nr >= 0 and part not in (None, "backward"):
            found[event.sequence_nr] = part
    return found


def _part(event: FunctionEvent, parts: dict[int, str]) -> str:
    named = _named(event)
    if named != "backward":
        return named or "rest"
    at = event
    while not at.name.startswith(_BACKWARD):
        at = at.cpu_parent
    return parts.get(at.sequence_nr, "rest")


def _counted(event: FunctionEvent, part: str) -> str:
    return LINEAR if part in _SHARED and event.name in _PRODUCTS else part
