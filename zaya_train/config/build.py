"""Plain dictionaries to frozen dataclasses, strictly: unknown keys, missing keys and wrong types
are ConfigErrors that name the key by its full path."""

from __future__ import annotations

import dataclasses
import difflib
import types
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from zaya_train.config.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], values: object, path: str = "") -> T:
    """An instance of the dataclass `cls` from nested dictionaries as YAML gives them.

    An int is taken where a float is asked for; nothing else is converted.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{path or 'config'}: expected a mapping, got {_show(values)}")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            raise ConfigError(f"{_join(path, key)}: unknown key{_suggest(str(key), fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and (
            field.default_factory is dataclasses.MISSING
        )
        if values.get(name, "???" if required else None) == "???":
            raise ConfigError(f"{_join(path, name)}: missing, and it has no default")
    built = {k: _convert(hints[k], v, _join(path, k)) for k, v in values.items()}
    return cls(**built)


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _show(value: object) -> str:
    return f"{type(value).__name__} {value!r}"


def _suggest(key: str, names: object) -> str:
    close = difflib.get_close_matches(key, list(names), n=1)  # type: ignore[call-overload]
    return f"; did you mean {close[0]}?" if close else ""


def _convert(hint: Any, value: object, path: str) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return build(hint, value, path)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _convert_optional(hint, value, path)
    if origin is Literal:
        choices = get_args(hint)
        if value not in choices:
            shown = ", ".join(map(str, choices))
            raise ConfigError(f"{path}: {_show(value)} is not one of {shown}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{path}: expected a list, got {_show(value)}")
        item = get_args(hint)[0]
        return tuple(_convert(item, v, f"{path}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path}: expected a mapping, got {_show(value)}")
        item = get_args(hint)[1]
        return {str(k): _convert(item, v, _join(path, k)) for k, v in value.items()}
    return _convert_scalar(hint, value, path)


def _convert_optional(hint: Any, value: object, path: str) -> Any:
    """The schema's unions are all `X | None`."""
    if value is None:
        return None
    (inner,) = (arg for arg in get_args(hint) if arg is not type(None))
    return _convert(inner, value, path)


def _convert_scalar(hint: type, value: object, path: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    # bool is an int to Python, but `num_layers: true` is a mistake.
    if isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{path}: expected {hint.__name__}, got {_show(value)}")


def to_dict(config: Any) -> dict[str, Any]:
    """The plain dictionary of a configuration; `build` of it gives an equal configuration. Lists,
    as JSON has them, for tuples."""
    plain: dict[str, Any] = _plain(dataclasses.asdict(config))
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
