"""What a rehearsed step would allocate and send, counted where torch dispatches operations.

Floating-point tensors are fake: they have shapes and no numbers. Integers and flags (tokens,
positions, routing, indices, sizes) are real, so that everything whose shape depends on them has the
shape of a real run. A number read from a fake tensor is 1, a flag true: finite, nothing to clip.

Collectives are those of `torch.distributed` (operators of c10d). Any other namespace of operators
than the known ones is refused, since it may communicate past the count.

Integer collectives give this rank's own numbers for every other rank's, as if all did the same;
`answers` says what they give where ranks differ.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import ValuesView
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    in_kernel_invocation_manager,
    unset_fake_temporarily,
)
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode

from zaya_train.config.errors import ConfigError
from zaya_train.tools.rehearsal_places import SHAPES_ONLY, place_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

_aten = torch.ops.aten
_KINDS = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
}
_NAMESPACES = ("aten", "prim", "prims", "profiler", "c10d", "fsdp", "mkldnn")
"""Operators that move nothing between ranks, or that are counted."""


class UncountedError(ConfigError):
    """The step calls an operator that may communicate and is not counted."""

    @staticmethod
    def of(func: Any, known: Iterable[str]) -> UncountedError:
        """Not `__init__`: errors of one argument pass between processes."""
        return UncountedError(
            f"{func}: a rehearsal counts no such operator, it might communicate; known are "
            f"{', '.join(known)}"
        )


@dataclass
class Flow:
    """Collectives of one kind over one axis, of more than one rank."""

    calls: int = 0
    bytes: int = 0
    """Operands, as `parallel.traffic` defines them: what this rank contributes."""


@dataclass
class Peak:
    """The fullest moment of a stage."""

    bytes: int = 0
    components: dict[str, int] = field(default_factory=dict)


class Meter(TorchDispatchMode):
    """Counts while active, above a FakeTensorMode that allows real inputs.

    Args:
        axes: name of a process group -> what to call it.
        answers: name of a group -> what an all-gather of integers over it gives, if ranks differ.
    """

    def __init__(self, axes: Mapping[str, str], answers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.axes = axes
        self.answers = answers
        self.label: str | None = None
        """Component of everything allocated, in place of where the code stands."""
        self.live: Counter[str] = Counter()
        self.peaks: dict[str, Peak] = defaultdict(Peak)
        self.flows: dict[tuple[str, str], Flow] = defaultdict(Flow)
        self._total = 0
        self._storages: dict[int, tuple[weakref.ref, int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default and type(args[0]) is FakeTensor:
            return args[0].fake_device
        if func.namespace not in _NAMESPACES:
            raise UncountedError.of(func, _NAMESPACES)
        tensors = _tensors((args, kwargs.values()))
        if any(type(x) not in _KNOWN for x in tensors):
            # DTensor works on local tensors, which come here in turn.
            return NotImplemented
        fake = any(type(x) is FakeTensor or x.is_meta for x in tensors)
        if func.namespace == "c10d":
            self._send(func, args)
        if fake or not (tensors or _whole_numbers(func, args, kwargs)):
            out = _number(func, args) if func in _READS else self._shapes(func, args, kwargs)
        else:
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
                if func.namespace == "c10d":
                    self._answer(func, args)
        for x in _tensors((out,)):
            self._hold(x.untyped_storage())
        return out

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation on fake tensors. FakeTensorMode would do; it takes three times as long,
        most of it for caches and devices, of which there is one here."""
        mine = next((x for x in _tensors(args) if type(x) is FakeTensor), None)
        if mine is None or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        with in_kernel_invocation_manager(mine.fake_mode):
            out = func(*_as_meta(args), **kwargs)
        return _as_fake(out, mine)

    @contextmanager
    def counting(self) -> Iterator[Meter]:
        """Active, storages that change their size included: FSDP frees and refills its buffers."""
        original = torch.UntypedStorage.resize_

        def resize(storage: Any, size: int) -> None:
            original(storage, size)
            self._hold(storage)

        torch.UntypedStorage.resize_ = resize  # type: ignore[assignment, method-assign]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]

    @contextmanager
    def labelled(self, component: str) -> Iterator[None]:
        """Everything allocated within is of this component."""
        self.label = component
        try:
            yield
        finally:
            self.label = None

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        held = self._storages.get(key)
        if held is not None and held[1] == size:
            return
        stage, component = place_of(sys._getframe(2))
        if component == SHAPES_ONLY:
            return
        component = self.label or component
        self._release(key)
        self._storages[key] = (weakref.ref(storage, lambda _: self._release(key)), size, component)
        self.live[component] += size
        self._total += size
        peak = self.peaks[stage]
        if self._total > peak.bytes:
            peak.bytes, peak.components = self._total, dict(self.live)

    def _release(self, key: int) -> None:
        held = self._storages.pop(key, None)
        if held is not None:
            self.live[held[2]] -= held[1]
            self._total -= held[1]

    def _send(self, func: Any, args: Any) -> None:
        kind, group = _collective(func, args)
        if group.size() > 1:
            operand = args[0][0] if kind == "all_reduce" else args[1]
            flow = self.flows[kind, self.axes[group.group_name]]
            flow.calls += 1
            flow.bytes += operand.numel() * operand.element_size()

    def _answer(self, func: Any, args: Any) -> None:
        """Fill the output of a collective on real integers."""
        kind, group = _collective(func, args)
        if kind == "all_gather":
            out, own = args[0], args[1]
            same = own.repeat(group.size(), *[1] * (own.dim() - 1))
            out.copy_(self.answers.get(group.group_name, same).view(out.shape))
        elif kind == "all_to_all":
            mine = args[1].view(group.size(), -1)[group.rank()]
            args[0].copy_(mine.repeat(group.size()).view(args[0].shape))


_KNOWN = (torch.Tensor, torch.nn.Parameter, FakeTensor)
_READS = (_aten._local_scalar_dense.default, _aten.nonzero.default)


def _collective(func: Any, args: Any) -> tuple[str, ProcessGroup]:
    """Kind and group of a c10d operator's call."""
    kind = _KINDS.get(func._schema.name.split("::")[1])
    if kind is None:
        raise UncountedError.of(func, _KINDS)
    group = next(a for a in args if isinstance(a, torch.ScriptObject))
    return kind, ProcessGroup.unbox(group)


def _as_meta(values: Any) -> Any:
    """Arguments with shapes in place of real tensors."""
    if type(values) is torch.Tensor and not values.is_meta:
        return values.to("meta")
    if isinstance(values, list | tuple):
        return type(values)(_as_meta(value) for value in values)
    return values


def _as_fake(values: Any, like: FakeTensor) -> Any:
    """Results of an operation on shapes as fake tensors."""
    if isinstance(values, torch.Tensor) and type(values) is not FakeTensor:
        return FakeTensor(like.fake_mode, values, like.fake_device)
    if isinstance(values, list | tuple):
        return type(values)(_as_fake(value, like) for value in values)
    return values


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Those in nested lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, list | tuple | ValuesView):
            found += _tensors(value)
    return found


def _whole_numbers(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation without inputs makes integers or flags."""
    dtype = kwargs.get("dtype")
    if dtype is None:
        return func.overloadpacket is _aten.arange and all(isinstance(x, int) for x in args)
    return not (dtype.is_floating_point or dtype.is_complex)


def _number(func: Any, args: Any) -> Any:
    """What a fake tensor says when it is read."""
    if func is _aten.nonzero.default:
        # Only the step's stop signals are looked for among numbers: nobody sent one.
        return args[0].new_empty(0, args[0].dim(), dtype=torch.int64)
    return True if args[0].dtype == torch.bool else 1.0
