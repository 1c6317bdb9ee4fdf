"""What differs between two configurations given as plain dictionaries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

ABSENT = "absent"
"""Stands for the value of a key that one side lacks."""


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], path: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) of every key that differs, in the order of `new`.

    A mapping whose keys are the same but stand in another order differs as a whole, by its list of
    keys: the order of a plan's phases is the order of training.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*new, *(key for key in old if key not in new)]:
        before, now = old.get(key, ABSENT), new.get(key, ABSENT)
        name = f"{path}.{key}" if path else key
        if isinstance(before, dict) and isinstance(now, dict):
            found |= differences(before, now, name)
        elif before != now:
            found[name] = (before, now)
    if old.keys() == new.keys() and list(old) != list(new):
        found[path or "config"] = (list(old), list(new))
    return found
