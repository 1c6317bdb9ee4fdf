"""The schema's default values as plain dictionaries, the base that YAML files are laid over.

With every key present, any key can be overridden on the command line without a `+`, and `--cfg job`
shows the whole run.
"""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

MISSING = "???"
"""Mandatory value, in OmegaConf's notation."""


def defaults(cls: type) -> dict[str, Any]:
    """Nested defaults of a dataclass; MISSING where a field has none."""
    hints = get_type_hints(cls)
    result: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            result[field.name] = defaults(hint)
        elif field.default is not dataclasses.MISSING:
            result[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            result[field.name] = field.default_factory()
        else:
            result[field.name] = {} if _is_mapping(hint) else MISSING
    return result


def _is_mapping(hint: Any) -> bool:
    return getattr(hint, "__origin__", None) is dict
