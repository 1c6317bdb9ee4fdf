"""Triton's interpreter as the workshop mends it: right for bf16, and strict about memory."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="the extra `triton` is not installed")
from triton import language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402
from zaya_kernels.workshop.interpreter import counting, races_allowed  # noqa: E402

pytestmark = pytest.mark.usefixtures("interpreter")


@triton.jit
def arithmetic(a, b, total, product, quotient, below, N: tl.constexpr):
    o = tl.arange(0, N)
    x, y = tl.load(a + o), tl.load(b + o)
    tl.store(total + o, x + y)
    tl.store(product + o, x * y)
    tl.store(quotient + o, (x.to(tl.float32) / y.to(tl.float32)).to(tl.bfloat16))
    tl.store(below + o, (x < y).to(tl.int32))


@triton.jit
def multiply(a, b, out, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    i, j, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    x = tl.load(a + i * K + k[None, :])
    y = tl.load(b + k[:, None] * N + j)
    tl.store(out + i * N + j, tl.dot(x, y, input_precision="ieee"))


@triton.jit
def copy(source, target, size, stride, shift, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < size
    tl.store(target + o, tl.load(source + o * stride + shift, mask=m), mask=m)


@triton.jit
def to_one_place(source, target, step):
    tl.store(target + tl.program_id(0) * step, tl.load(source + tl.program_id(0)))


@triton.jit
def pass_on(buffer):
    tl.store(buffer + tl.program_id(0) + 1, tl.load(buffer + tl.program_id(0)))


@triton.jit
def add_atomically(source, target):
    tl.atomic_add(target, tl.load(source + tl.program_id(0)))


def bf16(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def test_bf16_arithmetic_rounds_to_nearest_even() -> None:
    a, b = bf16(256, seed=1), bf16(256, seed=2)
    outs = [torch.empty_like(a) for _ in range(3)]
    below = torch.empty(256, dtype=torch.int32)
    arithmetic[(1,)](a, b, *outs, below, N=256)
    for found, expected in zip(outs, (a + b, a * b, a / b), strict=True):
        assert torch.equal(found, expected)
    assert torch.equal(below.bool(), a < b)


def test_bf16_products_accumulate_in_fp32() -> None:
    a, b = bf16(16, 64, seed=3), bf16(64, 32, seed=4)
    out = torch.empty(16, 32)
    multiply[(1,)](a, b, out, M=16, K=64, N=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-6)


def test_a_launch_within_its_tensors_is_counted() -> None:
    source, target = torch.arange(100.0), torch.empty(100)
    with counting() as counts:
        copy[(4,)](source, target, 100, 1, 0, BLOCK=32)
    assert torch.equal(source, target)
    (count,) = counts
    assert (count.kernel, count.programs) == ("copy", 4)
    assert (count.loaded_bytes, count.stored_bytes, count.distinct_bytes) == (400, 400, 800)


def test_products_are_counted() -> None:
    with counting() as counts:
        multiply[(1,)](bf16(16, 64, seed=3), bf16(64, 32, seed=4), torch.empty(16, 32), 16, 64, 32)
    assert counts[0].dot_operations == 2 * 16 * 64 * 32


@pytest.mark.parametrize(("size", "stride", "shift"), [(101, 1, 0), (100, 1, 1), (100, 2, 0)])
def test_an_access_outside_is_a_fault(size: int, stride: int, shift: int) -> None:
    """A mask off by one, a shifted pointer, a wrong stride; the storage behind would allow it."""
    room = torch.zeros(300)
    with pytest.raises(InterpreterError, match="outside every argument"):
        copy[(4,)](room[:100], torch.empty(100), size, stride, shift, BLOCK=32)


def test_the_gaps_of_a_strided_argument_are_outside() -> None:
    room = torch.zeros(40, 3)
    column = room[:, 1]
    copy[(2,)](column, torch.empty(40), 40, 3, 0, BLOCK=32)
    with pytest.raises(InterpreterError, match="outside every argument"):
        copy[(2,)](column, torch.empty(40), 40, 2, 0, BLOCK=32)


def test_two_programs_writing_one_address_are_a_fault() -> None:
    to_one_place[(4,)](torch.zeros(4), torch.zeros(4), 1)
    with pytest.raises(InterpreterError, match=r"program \(1, 0, 0\) writes what another program"):
        to_one_place[(4,)](torch.zeros(4), torch.zeros(4), 0)
    with races_allowed():
        to_one_place[(4,)](torch.zeros(4), torch.zeros(4), 0)


def test_reading_what_another_program_writes_is_a_fault() -> None:
    with pytest.raises(InterpreterError, match="reads what program 0 writes"):
        pass_on[(3,)](torch.zeros(4))


def test_atomics_may_meet() -> None:
    target = torch.zeros(1)
    add_atomically[(4,)](torch.ones(4), target)
    assert target.item() == 4


def run_without_environment(program: str) -> Any:
    return subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_process_that_imported_triton_otherwise_is_refused() -> None:
    done = run_without_environment(
        "from zaya_kernels.workshop.interpreter import install; install()"
    )
    assert "needs TRITON_INTERPRET=1 in the environment" in done.stderr
