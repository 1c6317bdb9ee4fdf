"""CPU threads over independent items instead of within each operation.

Threads that share one product wait for each other at its end, a hundred times per matrix, and spin
meanwhile: on two cores with other work beside, Newton-Schulz by Gram matrices took three times the
CPU seconds of one thread alone.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor


def over_matrices(run: Callable[[Tensor], Tensor], matrices: Tensor) -> list[Tensor]:
    """`run` of each of `matrices` [N, ...], in order; on a CPU several at once, each on its share
    of torch's threads. Outside autograd. Meanwhile torch's number of threads is that share."""
    threads = torch.get_num_threads()
    workers = min(threads, len(matrices))
    # Tensors without numbers follow modes that other threads do not have.
    plain = type(matrices) is torch.Tensor and matrices.device.type == "cpu"
    if workers < 2 or not plain:
        return [run(matrix) for matrix in matrices]
    # New threads take torch's number over as it is when they start.
    with _num_threads(threads // workers), ThreadPoolExecutor(workers) as pool:
        return list(pool.map(run, matrices))


@contextmanager
def _num_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
