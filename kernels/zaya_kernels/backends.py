"""Choosing a back end by name, without fallbacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

Implementation = TypeVar("Implementation")


def pick(op: str, table: Mapping[str, Implementation], name: str) -> Implementation:
    """The implementation called `name`; ValueError naming the op and its choices otherwise."""
    if name not in table:
        raise ValueError(f"kernels.{op}: no back end {name!r}; choose from {', '.join(table)}")
    return table[name]
