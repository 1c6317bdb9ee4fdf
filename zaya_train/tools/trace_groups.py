"""Where a step's time went: a trace of torch's profiler, summed by operation of the model.

What a kernel or a piece of host time belongs to is told by the innermost of: a named range around
it (the operations', the step's parts', FSDP's and the collectives' own), the operation whose
backward pass it is (the trace links the two), and what encloses it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zaya_kernels.backends import RANGE

from zaya_train.config.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

GROUPS = (
    "cca",
    "attention",
    "norm_residual",
    "router",
    "moe",
    "loss",
    "optimizer",
    "collectives",
    "other",
)
"""cca with the block's projections; moe with permutation and probabilities; collectives with what
FSDP does around them: copies, casts of weights, sums of gradients."""
STEP = f"{RANGE}step"

_OF_OPERATION = {
    **{name: name for name in ("cca", "attention", "norm_residual", "router", "moe", "optimizer")},
    "grouped_mlp": "moe",
    "moe_permute": "moe",
    "linear_cross_entropy": "loss",
    "newton_schulz": "optimizer",
}
_COLLECTIVES = (
    "c10d::", "_c10d_functional::", "record_param_comms", "gloo:", "nccl:", "FSDP::", "fsdp::",
)  # fmt: skip
_COLLECTIVE_KERNELS = ("nccl", "rccl")
_EVALUATION = "autograd::engine::evaluate_function"
_HOST = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class _Span:
    """A piece of one host thread's time."""

    name: str
    start: float
    microseconds: float
    parent: _Span | None = None
    children: list[_Span] = field(default_factory=list)
    forward: _Span | None = None
    """Whose backward pass this is."""

    @property
    def own(self) -> float:
        """Microseconds that no child accounts for."""
        return self.microseconds - sum(child.microseconds for child in self.children)

    @cached_property
    def group(self) -> str:
        # A loop: recursion would be as deep as autograd's chain of layers that are made again.
        span: _Span | None = self
        while span is not None:
            if known := _named(span.name):
                return known
            span = span.forward or _evaluated(span) or span.parent
        return "other"


@dataclass(frozen=True)
class Breakdown:
    """Seconds by group, of all steps in the trace."""

    seconds: dict[str, float]
    """Every one of GROUPS."""
    clock: str
    """device: of kernels and copies, side by side ones counted each; host: of the step's thread."""
    total_seconds: float
    """Measured apart from the groups: of all kernels and copies, or of the step's ranges."""
    step_seconds: float
    """From the first to the last moment of the steps, on the host."""


def time_by_group(trace: Mapping[str, Any]) -> Breakdown:
    """Of a chrome trace that holds ranges named STEP; DataError where there is none."""
    events = trace["traceEvents"]
    spans = _spans(events)
    _link(events, spans)
    steps = [s for thread in spans.values() for s in thread if s.name == STEP]
    if not steps:
        raise DataError(f"trace: holds no range named {STEP}")
    seconds = dict.fromkeys(GROUPS, 0.0)
    kernels = [e for e in events if e.get("ph") == "X" and e.get("cat") in _DEVICE]
    if kernels:
        places = _launches(events, spans)
        kernels = [kernel for kernel in kernels if _within(_place(kernel, places), steps)]
        for kernel in kernels:
            seconds[_group_of(kernel, places)] += kernel["dur"] / 1e6
        total = sum(kernel["dur"] for kernel in kernels) / 1e6
    else:
        for span in _below(steps):
            seconds[span.group] += span.own / 1e6
        total = sum(step.microseconds for step in steps) / 1e6
    return Breakdown(
        seconds=seconds,
        clock="device" if kernels else "host",
        total_seconds=total,
        step_seconds=sum(step.microseconds for step in steps) / 1e6,
    )


def _named(name: str) -> str | None:
    """What a span's own name says it is; other names say nothing."""
    if name.startswith(RANGE):
        return _OF_OPERATION.get(name.removeprefix(RANGE))
    return "collectives" if name.startswith(_COLLECTIVES) else None


def _evaluated(span: _Span) -> _Span | None:
    """The node that autograd's engine evaluates in this span, whose forward it tells."""
    if not span.name.startswith(_EVALUATION):
        return None
    return next((child.forward for child in span.children if child.forward), None)


def _spans(events: Iterable[Mapping[str, Any]]) -> dict[Any, list[_Span]]:
    """Host spans by thread, in the order of their starts, nested."""
    threads: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in _HOST:
            threads[event["tid"]].append(event)
    return {thread: _nested(own) for thread, own in threads.items()}


def _nested(events: list[Mapping[str, Any]]) -> list[_Span]:
    """Spans of one thread; of two that start together the longer encloses the other."""
    spans, around = [], list[_Span]()
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        span = _Span(event["name"], event["ts"], event["dur"])
        while around and around[-1].start + around[-1].microseconds <= span.start:
            around.pop()
        if around:
            span.parent = around[-1]
            span.parent.children.append(span)
        around.append(span)
        spans.append(span)
    return spans


def _link(events: Iterable[Mapping[str, Any]], spans: Mapping[Any, list[_Span]]) -> None:
    """Set `forward` where the trace has an arrow from an operation to its backward pass."""
    # Several spans may start together; the arrow is the innermost one's, which comes last.
    at = {(thread, span.start): span for thread, own in spans.items() for span in own}
    ends: dict[Any, dict[str, _Span]] = defaultdict(dict)
    for event in events:
        if event.get("cat") == "fwdbwd" and (span := at.get((event["tid"], event["ts"]))):
            ends[event["id"]][event["ph"]] = span
    for pair in ends.values():
        if "s" in pair and "f" in pair:
            pair["f"].forward = pair["s"]


def _launches(
    events: Iterable[Mapping[str, Any]], spans: Mapping[Any, list[_Span]]
) -> dict[int, _Span]:
    """Correlation number -> the host span that launched the kernel or copy."""
    at = {(thread, s.start, s.name): s for thread, own in spans.items() for s in own}
    return {
        event["args"]["correlation"]: at[event["tid"], event["ts"], event["name"]]
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver")
        and "correlation" in event.get("args", {})
    }


def _group_of(kernel: Mapping[str, Any], places: Mapping[int, _Span]) -> str:
    if kernel["name"].lower().startswith(_COLLECTIVE_KERNELS):
        return "collectives"
    place = _place(kernel, places)
    return place.group if place else "other"


def _place(kernel: Mapping[str, Any], places: Mapping[int, _Span]) -> _Span | None:
    return places.get(kernel.get("args", {}).get("correlation", -1))


def _within(place: _Span | None, steps: Iterable[_Span]) -> bool:
    """Whether it was launched in a step, by whatever thread; one that nobody launched counts."""
    return place is None or any(
        step.start <= place.start <= step.start + step.microseconds for step in steps
    )


def _below(spans: Iterable[_Span]) -> Iterable[_Span]:
    """The spans and everything nested in them."""
    waiting = list(spans)
    while waiting:
        span = waiting.pop()
        waiting += span.children
        yield span
