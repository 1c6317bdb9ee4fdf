"""Agreement among ranks: what one rank finds or fails at, all ranks know."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar, cast

import torch.distributed as dist

from zaya_train.config.errors import StorageError, ZayaError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


@dataclass(frozen=True)
class Peers:
    """The processes that work on a checkpoint together; `group` None is this one alone."""

    group: dist.ProcessGroup | None = None

    @staticmethod
    def world() -> Peers:
        """All ranks of the job."""
        return Peers(cast("dist.ProcessGroup", dist.group.WORLD))

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group) if self.group else 0

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group) if self.group else 1

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.group is None:
            return [value]
        values: list[T | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return cast("list[T]", values)

    def everywhere(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank; if it fails on one, every rank raises that failure.

        Operating-system errors become StorageError; our own errors keep their class. Anything else
        is a bug and passes through on its own rank.
        """
        value: T | None = None
        failure: tuple[type[ZayaError], str] | None = None
        try:
            value = action()
        except OSError as error:
            failure = (StorageError, f"rank {self.rank}: {error}")
        except ZayaError as error:
            failure = (type(error), str(error))
        outcomes = self.gather((value, failure))
        for _, failed in outcomes:
            if failed:
                kind, text = failed
                raise kind(text)
        return [cast("T", result) for result, _ in outcomes]

    def first(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 only; its value or its failure reaches every rank."""
        results = self.everywhere(lambda: action() if self.rank == 0 else None)
        return cast("T", results[0])
