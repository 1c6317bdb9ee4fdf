"""What somebody may have meant by a key or a name that does not exist."""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_MOST = 3


def unknown_key(root: type, key: str) -> str:
    """One line about a dotted key that is not in the configuration class `root`.

    A misspelt part gets the nearest name beside it; a name that exists elsewhere gets its places.
    """
    cls: Any = root
    parts = key.split(".")
    for position, part in enumerate(parts):
        if get_origin(cls) is dict:
            cls = get_args(cls)[1]
            continue
        if not dataclasses.is_dataclass(cls):
            break
        hints = get_type_hints(cls)
        if part in hints:
            cls = _inner(hints[part])
            continue
        close = difflib.get_close_matches(part, hints, n=1)
        if close:
            return f"{key}: unknown key; did you mean {'.'.join(_with(parts, position, close[0]))}?"
        places = [path for path in _paths(root) if path.split(".")[-1] == parts[-1]]
        meant = f"; there is {', '.join(places[:_MOST])}" if places else ""
        return f"{key}: unknown key{meant or '; `zaya train recipe=... --cfg job` prints all'}"
    return f"{key}: unknown key"


def unknown_name(name: str, known: Iterable[str]) -> str:
    """`; did you mean ...? (known: ...)` for a name that is not among `known`."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    meant = f"; did you mean {close[0]}?" if close else ""
    return f"{meant} (known: {', '.join(known) or 'none'})"


def _with(parts: list[str], position: int, name: str) -> list[str]:
    return [*parts[:position], name, *parts[position + 1 :]]


def _inner(hint: Any) -> Any:
    """The type without `| None`."""
    options = [arg for arg in get_args(hint) if arg is not type(None)]
    return options[0] if type(None) in get_args(hint) else hint


def _paths(cls: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a configuration class; entries of dictionaries are called NAME."""
    if get_origin(cls) is dict:
        yield from _paths(get_args(cls)[1], f"{prefix}NAME.")
    elif dataclasses.is_dataclass(cls):
        for name, hint in get_type_hints(cls).items():
            yield f"{prefix}{name}"
            yield from _paths(_inner(hint), f"{prefix}{name}.")
