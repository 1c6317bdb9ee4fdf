from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from zaya_kernels.newton_schulz.op import FIVE_QUINTICS, newton_schulz
from zaya_kernels.threads import over_matrices

from ..helpers.kernels import random

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("count", "share"), [(1, 4), (2, 2), (3, 1), (4, 1)])
def test_threads_are_shared_among_matrices(count: int, share: int) -> None:
    """As many at once as there are threads: none goes on before the others have begun."""
    at_once = threading.Barrier(count, timeout=60)
    seen: list[int] = []

    def run(matrix: Tensor) -> Tensor:
        at_once.wait()
        seen.append(torch.get_num_threads())
        return matrix * 2

    matrices = random(count, 3, 2, seed=1)
    assert torch.equal(torch.stack(over_matrices(run, matrices)), 2 * matrices)
    assert set(seen) == {share} and torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_an_error_comes_out_and_the_number_of_threads_comes_back() -> None:
    def run(matrix: Tensor) -> Tensor:
        raise ValueError("no such matrix")

    with pytest.raises(ValueError, match="no such matrix"):
        over_matrices(run, random(2, 3, 3, seed=1))
    assert torch.get_num_threads() == 4


@pytest.mark.usefixtures("four_threads")
def test_tensors_without_numbers_stay_in_their_thread() -> None:
    with FakeTensorMode():
        found = newton_schulz(torch.empty(3, 256, 260), FIVE_QUINTICS, torch.bfloat16, "gram")
    assert found.shape == (3, 256, 260)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_matrices_are_each_what_they_are_alone(dtype: torch.dtype) -> None:
    matrices = random(3, 256, 300, seed=1).float()
    together = newton_schulz(matrices, FIVE_QUINTICS, dtype, "gram")
    apart = [newton_schulz(x[None], FIVE_QUINTICS, dtype, "gram")[0] for x in matrices]
    assert torch.equal(together, torch.stack(apart))
