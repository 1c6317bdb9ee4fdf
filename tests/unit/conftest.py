"""Fixtures of the unit tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from zaya_train.optim.exchange import Groups

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="module")
def alone() -> Iterator[Groups]:
    """One rank."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    yield Groups(group, group)
    dist.destroy_process_group()
