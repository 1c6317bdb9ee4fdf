"""Triton's interpreter made right for bf16, and made strict about memory.

Triton 3.7.1 keeps bf16 values as their 16 bits and computes with the bit patterns; conversions to
bf16 truncate. Here every operation on bf16 is done in fp32 and rounded to nearest even
(triton-lang/triton issue 11584; to be removed when that is solved in the pinned version).

Checked on every access, which no GPU does: the address must be an element of a tensor that the
launch was given (strides included, so a wrong stride shows), and no program may write what another
program of the launch reads or writes. Bytes and products are counted on the way.

TRITON_INTERPRET=1 must be set before Triton is first imported.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_NOBODY = -1
_MANY = -2


class MemoryFault(Exception):
    """A kernel touched memory that is not its own, or that another program writes."""


@dataclass
class Counts:
    """What one launch did."""

    kernel: str
    programs: int
    loaded_bytes: int = 0
    """Summed over all accesses."""
    stored_bytes: int = 0
    distinct_bytes: int = 0
    """Every byte read counted once, every byte written once: traffic with a perfect cache."""
    dot_operations: int = 0
    """Two for each multiply-add of tl.dot."""


@dataclass
class _Region:
    """One tensor argument and which program touched each of its elements last."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    reader: np.ndarray | None
    """None: nobody keeps track."""
    writer: np.ndarray | None

    @classmethod
    def of(cls, tensor: Tensor, tracked: bool) -> _Region:
        # A broadcast dim has stride 0: its elements are one. The stride of a dim of 1 says nothing.
        every = zip(tensor.shape, tensor.stride(), strict=True)
        dims = [(n, s) for n, s in every if s != 0 and n != 1]
        dims.sort(key=lambda dim: -dim[1])
        count = int(np.prod([n for n, _ in dims], dtype=np.int64))
        return cls(
            start=tensor.data_ptr(),
            shape=tuple(n for n, _ in dims),
            strides=tuple(s for _, s in dims),
            itemsize=tensor.element_size(),
            reader=np.full(count, _NOBODY, dtype=np.int32) if tracked else None,
            writer=np.full(count, _NOBODY, dtype=np.int32) if tracked else None,
        )

    def elements(self, addresses: np.ndarray) -> np.ndarray:
        """Index of the element at each address, -1 where there is none."""
        offset = addresses.astype(np.int64) - self.start
        inside = (offset >= 0) & (offset % self.itemsize == 0)
        offset = offset // self.itemsize
        index = np.zeros_like(offset)
        for size, stride in zip(self.shape, self.strides, strict=True):
            step = offset // stride
            inside &= step < size
            index = index * size + step
            offset = offset - step * stride
        inside &= (offset == 0) & (0 not in self.shape)
        return np.where(inside, index, -1)


@dataclass
class _Watch:
    """State of the checks: the launch in progress and the counts of those that ended."""

    races: bool = True
    tracked: bool = True
    """Whether it is kept who touched what; without, there are no races and no distinct bytes."""
    regions: list[_Region] = field(default_factory=list)
    counts: Counts | None = None
    finished: list[Counts] = field(default_factory=list)


_watch = _Watch()


@contextlib.contextmanager
def counting() -> Iterator[list[Counts]]:
    """Collect the counts of every launch within."""
    _watch.finished = []
    yield _watch.finished
    _watch.finished = []


@contextlib.contextmanager
def races_allowed() -> Iterator[None]:
    """For kernels whose programs communicate through memory on purpose."""
    _watch.races = False
    try:
        yield
    finally:
        _watch.races = True


@contextlib.contextmanager
def addresses_only() -> Iterator[None]:
    """For tensors of which no table of who touched what would fit."""
    _watch.tracked = False
    try:
        yield
    finally:
        _watch.tracked = True


def install() -> None:
    """Mend and watch the interpreter of this process, once; RuntimeError if Triton was imported
    without TRITON_INTERPRET=1."""
    # Triton's own library functions show how jit was set when it was imported.
    if not isinstance(tl.standard.sum, InterpretedFunction):
        raise RuntimeError(
            "the interpreter needs TRITON_INTERPRET=1 in the environment before triton is imported"
        )
    if not getattr(InterpreterBuilder, "zaya_mended", False):
        _mend_numerics()
        _watch_memory()
        InterpreterBuilder.zaya_mended = True


def _is_bf16(handle: TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _wide(bits: np.ndarray) -> np.ndarray:
    """bf16 bits to fp32 values, exactly."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def _narrow(values: np.ndarray) -> np.ndarray:
    """fp32 values to bf16 bits, to nearest even."""
    source = np.ascontiguousarray(values, dtype=np.float32)
    rounded = torch.from_numpy(source.reshape(-1)).to(torch.bfloat16).view(torch.int16)
    return rounded.numpy().view(np.uint16).reshape(source.shape)


def _up(handle: Any) -> Any:
    if isinstance(handle, TensorHandle) and _is_bf16(handle):
        return TensorHandle(_wide(handle.data), tl.float32)
    return handle


def _through_fp32(method: Callable[..., Any]) -> Callable[..., Any]:
    """A builder operation whose bf16 operands are widened and whose result is rounded back."""

    @wraps(method)
    def mended(self: Any, *operands: Any) -> Any:
        if not any(isinstance(x, TensorHandle) and _is_bf16(x) for x in operands):
            return method(self, *operands)
        result = method(self, *(_up(x) for x in operands))
        if result.data.dtype == bool:
            return TensorHandle(result.data, tl.int1)
        return TensorHandle(_narrow(result.data), tl.bfloat16)

    return mended


def _cast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Conversions from and to bf16; truncation only where the kernel asks for it."""

    @wraps(method)
    def mended(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        source = _up(source)
        if target.scalar != tl.bfloat16:
            same = source.dtype.scalar == target.scalar
            return source if same else method(self, source, target, *rounding)
        wide = source.data.astype(np.float32)
        if rounding and rounding[0] == ir.ROUNDING_MODE.RTZ:
            bits = np.ascontiguousarray(wide).view(np.uint32)
            return TensorHandle((bits >> 16).astype(np.uint16), tl.bfloat16)
        return TensorHandle(_narrow(wide), tl.bfloat16)

    return mended


def _dot(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def mended(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        if _watch.counts:
            batch = int(np.prod(a.data.shape[:-2], dtype=np.int64))
            rows, inner = a.data.shape[-2:]
            _watch.counts.dot_operations += 2 * batch * rows * inner * b.data.shape[-1]
        if _is_bf16(accumulator):
            raise TypeError("tl.dot accumulates in bf16; ask for fp32")
        return method(self, _up(a), _up(b), accumulator, *options)

    return mended


def _reduce(method: Callable[..., Any]) -> Callable[..., Any]:
    """Sums, minima and scans of a bf16 block."""

    @wraps(method)
    def mended(self: Any, operand: Any, *rest: Any, **named: Any) -> Any:
        first = operand[0] if isinstance(operand, tuple) else operand
        if not _is_bf16(first.handle):
            return method(self, operand, *rest, **named)
        raise TypeError("a reduction of a bf16 block; convert it to fp32 first")

    return mended


def _mend_numerics() -> None:
    builder = InterpreterBuilder
    # unary_op and binary_op are what all elementwise operations call, bit operations never on bf16.
    for name in ("binary_op", "unary_op", "create_rsqrt", "create_fma", "create_erf"):
        setattr(builder, name, _through_fp32(getattr(builder, name)))
    for name in ("create_clampf", "create_precise_sqrt"):
        setattr(builder, name, _through_fp32(getattr(builder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(builder, name, _cast(getattr(builder, name)))
    builder.create_dot = _dot(builder.create_dot)
    for name in ("sum", "min_max", "generic_reduce"):
        setattr(interpreter.ReduceOps, name, _reduce(getattr(interpreter.ReduceOps, name)))
    for name in ("cumsum", "cumprod", "generic_scan"):
        setattr(interpreter.ScanOps, name, _reduce(getattr(interpreter.ScanOps, name)))


def _watch_memory() -> None:
    builder = InterpreterBuilder
    builder.create_masked_load = _watched_load(builder.create_masked_load)
    builder.create_masked_store = _watched_store(builder.create_masked_store)
    builder.create_atomic_rmw = _watched_atomic(builder.create_atomic_rmw, 3)
    builder.create_atomic_cas = _watched_atomic(builder.create_atomic_cas, None)
    executor = interpreter.GridExecutor
    executor._init_args_hst = _registering(executor._init_args_hst)
    executor.__call__ = _launching(executor.__call__)


def _registering(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def mended(self: Any, arguments: Any, keywords: Any) -> Any:
        found = method(self, arguments, keywords)
        tensors = [x for x in (*found[0], *found[1].values()) if isinstance(x, torch.Tensor)]
        _watch.regions = [_Region.of(tensor, _watch.tracked) for tensor in tensors]
        return found

    return mended


def _launching(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def mended(self: Any, *arguments: Any, **keywords: Any) -> None:
        programs = int(np.prod(self.grid)) if isinstance(self.grid, tuple) else 0
        counts = _watch.counts = Counts(self.fn.__name__, programs)
        try:
            method(self, *arguments, **keywords)
            counts.distinct_bytes = sum(
                region.itemsize * int((touched != _NOBODY).sum())
                for region in _watch.regions
                for touched in (region.reader, region.writer)
                if touched is not None
            )
            _watch.finished.append(counts)
        finally:
            _watch.regions, _watch.counts = [], None

    return mended


def _program() -> tuple[int, tuple[int, int, int]]:
    builder = interpreter.interpreter_builder
    x, y, z = builder.grid_idx
    _, columns, layers = builder.grid_dim
    return (x * columns + y) * layers + z, (x, y, z)


def _touched(pointers: TensorHandle, mask: np.ndarray | None) -> list[tuple[_Region, np.ndarray]]:
    """Elements that an access reaches, by argument; MemoryFault where it reaches none."""
    addresses = pointers.data
    if mask is not None:
        addresses = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))
        addresses = addresses[np.broadcast_to(mask.astype(bool), addresses.shape)]
    addresses = addresses.reshape(-1)
    found: list[tuple[_Region, np.ndarray]] = []
    for region in _watch.regions:
        if not addresses.size:
            return found
        index = region.elements(addresses)
        hit = index >= 0
        if hit.any():
            found.append((region, index[hit]))
            addresses = addresses[~hit]
    if addresses.size:
        nearest = min(
            (int(a) - r.start for r in _watch.regions for a in addresses[:1]), key=abs, default=0
        )
        raise MemoryFault(
            f"program {_program()[1]}: {addresses.size} accesses outside every argument, the first "
            f"{nearest} bytes from the start of the nearest one"
        )
    return found


def _watched_load(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def mended(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        program, place = _program()
        for region, index in _touched(pointers, mask.data):
            if _watch.counts:
                _watch.counts.loaded_bytes += region.itemsize * index.size
            if region.reader is None or region.writer is None:
                continue
            others = region.writer[index]
            if _watch.races and ((others != _NOBODY) & (others != program)).any():
                raise MemoryFault(f"program {place} reads what program {others.max()} writes")
            seen = region.reader[index]
            alone = (seen == _NOBODY) | (seen == program)
            region.reader[index] = np.where(alone, program, _MANY)
        return method(self, pointers, mask, *rest)

    return mended


def _watched_store(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def mended(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        program, place = _program()
        for region, index in _touched(pointers, mask.data):
            if _watch.counts:
                _watch.counts.stored_bytes += region.itemsize * index.size
            if region.reader is None or region.writer is None:
                continue
            if _watch.races:
                for table, deed in ((region.writer, "writes"), (region.reader, "reads")):
                    _refuse_others(table[index], deed, program, place)
                if np.unique(index).size != index.size:
                    raise MemoryFault(f"program {place} writes one address twice in one store")
            region.writer[index] = program
        return method(self, pointers, value, mask, *rest)

    return mended


def _refuse_others(
    others: np.ndarray, deed: str, program: int, place: tuple[int, int, int]
) -> None:
    if ((others != _NOBODY) & (others != program)).any():
        raise MemoryFault(f"program {place} writes what another program {deed}")


def _watched_atomic(method: Callable[..., Any], mask_at: int | None) -> Callable[..., Any]:
    @wraps(method)
    def mended(self: Any, *operands: Any) -> Any:
        pointers = operands[0] if mask_at is None else operands[1]
        mask = None if mask_at is None else operands[mask_at].data
        for region, index in _touched(pointers, mask):
            if _watch.counts:
                _watch.counts.loaded_bytes += region.itemsize * index.size
                _watch.counts.stored_bytes += region.itemsize * index.size
            if region.reader is not None and region.writer is not None:
                region.reader[index] = region.writer[index] = _MANY
        return method(self, *operands)

    return mended
