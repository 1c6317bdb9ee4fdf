from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Before anything imports Triton: its kernels are interpreted in this suite's process. What compiles
# them (workshop.compile) runs in processes of its own.
os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
from zaya_kernels.launch import COMPUTE_UNITS, INTERPRETED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`make`, its result filled with NaN, or with an index no tensor has."""

    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        tensor = make(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype == torch.int64:
                tensor.fill_(-(2**40))
        return tensor

    return wrapper


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that an operation forgets to write shows up as NaN instead of as luck."""
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter with bf16 mended and memory watched, on a GPU of two compute units:
    kernels whose programs walk over rows then walk, also over few rows."""
    pytest.importorskip("triton", reason="the extra `triton` is not installed")
    from zaya_kernels.workshop.interpreter import install

    install()
    monkeypatch.setitem(COMPUTE_UNITS, INTERPRETED, 2)
