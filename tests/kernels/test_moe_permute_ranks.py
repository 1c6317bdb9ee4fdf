"""Rows moved by the permutation in C or in Triton between ranks that divide the experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ..dist.test_experts import against_the_local_one
from ..helpers.distributed import run_ranks

if TYPE_CHECKING:
    from zaya_train.config.schema import NativeKernelName

pytest.importorskip("triton", reason="the extra `triton` is not installed")


@pytest.mark.parametrize("backend", ["native", "triton"])
@pytest.mark.parametrize("name", ["mixed", "a rank without tokens", "everything skips"])
def test_they_arrive_as_the_local_dispatchers(name: str, backend: NativeKernelName) -> None:
    for errors in run_ranks(against_the_local_one, 2, name, backend):
        assert errors and {n: e for n, e in errors.items() if e > 1e-4} == {}
