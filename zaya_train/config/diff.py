"""What differs between two configurations given as plain dictionaries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

MODEL_MAY_CHANGE = frozenset({"rope_base", "max_context_tokens", "init_std"})
"""Model fields in which two stages of one model may differ: phases set the RoPE base and thereby
the context, and the initialisation is over."""
_ORDERED = frozenset({"plan.phases"})
"""Mappings whose order is the order of training."""
ABSENT = "absent"
"""Stands for the value of a key that one side lacks."""


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], path: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (old value, new value) of every key that differs, in the order of `new`.

    Where the order of keys means something, another order of the same ones is a difference too, of
    the lists of keys.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in [*new, *(key for key in old if key not in new)]:
        before, now = old.get(key, ABSENT), new.get(key, ABSENT)
        name = f"{path}.{key}" if path else key
        if isinstance(before, dict) and isinstance(now, dict):
            found |= differences(before, now, name)
        elif before != now:
            found[name] = (before, now)
    if path in _ORDERED and old.keys() == new.keys() and list(old) != list(new):
        found[path] = (list(old), list(new))
    return found


def model_differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], unsaid: frozenset[str] = frozenset()
) -> list[str]:
    """What makes two model configurations two models, a line for each field; equal shapes do not
    make equal models (norm_eps, rope_fraction).

    unsaid: fields that the other side cannot express.
    """
    return [
        f"{name} is {there} there, {here} here"
        for name, (there, here) in sorted(differences(theirs, ours).items())
        if name not in MODEL_MAY_CHANGE | unsaid
    ]
