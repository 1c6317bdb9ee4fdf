"""docs/reference/configuration.md, written from the dataclasses of zaya_train/config.

    python -m tests.helpers.config_reference

writes the page; tests/docs/test_reference.py compares it with what the code says now.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from tests.helpers.paths import REPOSITORY
from zaya_train.config.build import to_dict
from zaya_train.config.cluster import SubmitConfig
from zaya_train.config.kinds import kind_of, leaves, nameable
from zaya_train.config.schema import TrainConfig
from zaya_train.main import compose, compose_submission

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = REPOSITORY / "docs" / "reference" / "configuration.md"
NAME = "NAME"
"""Stands for a name of the user's: a phase, a source, a variable."""


@dataclass(frozen=True)
class Key:
    """One key of a section. `key` is dotted, names of the user's as NAME."""

    key: str
    kind: str
    default: str
    tag: str
    meaning: str


@dataclass(frozen=True)
class Section:
    """A dataclass: its keys and what its docstring says."""

    path: str
    meaning: str
    keys: tuple[Key, ...]


def recipes() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in (REPOSITORY / "configs" / "recipe").glob("*.yaml"))


def sections(cls: type, path: str = "") -> Iterator[Section]:
    """`cls` and every dataclass below it, in the order of the fields."""
    hints = get_type_hints(cls)
    helps = field_docs(cls)
    keys, below = [], []
    for field in dataclasses.fields(cls):
        key = f"{path}.{field.name}".lstrip(".")
        inner, key_below = _dataclass_in(hints[field.name], key)
        if inner is None:
            keys.append(_key(key, hints[field.name], field, helps.get(field.name, "")))
        else:
            below.append((inner, key_below))
    # A dataclass without a docstring is given its signature as one.
    said = "" if (cls.__doc__ or "").startswith(f"{cls.__name__}(") else cls.__doc__ or ""
    yield Section(path, " ".join(said.split()), tuple(keys))
    for inner, key_below in below:
        yield from sections(inner, key_below)


def _dataclass_in(hint: Any, key: str) -> tuple[type | None, str]:
    """The dataclass that a field holds, under user's names or none, and its path."""
    for part in (hint, *get_args(hint)):
        if isinstance(part, type) and dataclasses.is_dataclass(part):
            return part, f"{key}.{NAME}" if get_origin(hint) is dict else key
    return None, key


def _key(key: str, hint: Any, field: dataclasses.Field[Any], meaning: str) -> Key:
    pattern = key.replace(NAME, "*") + (".*" if get_origin(hint) is dict else "")
    tag = kind_of(pattern) or ""
    return Key(key, _kind(hint), _default(field), tag, meaning)


def _kind(hint: Any) -> str:
    """The type as a reader would say it; the choices of a Literal are its type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f"`{choice}`" for choice in inner)
    if origin in (Union, UnionType):
        return " or ".join("`null`" if part is NoneType else _kind(part) for part in inner)
    if origin is dict:
        return f"{_kind(inner[1])} by name"
    if origin is tuple:
        return f"list of {_kind(inner[0])}"
    return {"int": "integer", "float": "number", "str": "text", "bool": "true or false"}[
        hint.__name__
    ]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return shown(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return shown(field.default_factory())
    return ""


def shown(value: Any) -> str:
    """A value as YAML would have it, short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return f"{value:_}" if value >= 100_000 else str(value)
    if isinstance(value, float):
        return f"{value:_.0f}" if value >= 10_000 else f"{value:g}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {shown(part)}" for name, part in value.items()) + "}"
    return str(value) or "''"


def field_docs(cls: type) -> dict[str, str]:
    """The string literal below each field, as one line."""
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, doc in zip(body.body, body.body[1:], strict=False):
        is_text = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            assert isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            found[field.target.id] = " ".join(str(doc.value.value).split())
    return found


def values_of(recipe: str) -> dict[str, Any]:
    """Dotted key -> value of a shipped recipe."""
    return dict(leaves(to_dict(compose([f"recipe={recipe}"]))))


def page() -> str:
    """The whole page."""
    values = {recipe: values_of(recipe) for recipe in recipes()}
    parts = [_HEAD]
    for section in sections(TrainConfig):
        parts += _section(section, values)
    parts += ["## Phases of the recipes", _phases(), "## zaya submit", _SUBMIT]
    for section in sections(SubmitConfig):
        parts += _section(section, {}, level="###")
    parts.append(_clusters())
    return "\n\n".join(parts) + "\n"


def _section(section: Section, values: dict[str, dict[str, Any]], level: str = "##") -> list[str]:
    if not section.keys:
        return []
    title = f"{level} {section.path}" if section.path else ""
    lines = "\n".join(_line(key, values) for key in section.keys)
    return [part for part in (title, section.meaning, lines) if part]


def _line(key: Key, values: dict[str, dict[str, Any]]) -> str:
    facts = [key.kind, f"default `{key.default}`" if key.default else "required"]
    if key.tag:
        facts.append(f"*{key.tag}*")
    if nameable(key.key.replace(NAME, "*")):
        facts.append("nameable")
    given = {
        recipe: shown(found[key.key])
        for recipe, found in values.items()
        if key.key in found and shown(found[key.key]) != key.default
    }
    return f"- **`{key.key}`**: {', '.join(facts)}. {key.meaning}{_given(given)}".rstrip()


def _given(given: dict[str, str]) -> str:
    if not given:
        return ""
    by_value: dict[str, list[str]] = {}
    for recipe, value in given.items():
        by_value.setdefault(value, []).append(recipe)
    texts = [f"{', '.join(names)} `{value}`" for value, names in by_value.items()]
    return f" Recipes: {'; '.join(texts)}."


def _phases() -> str:
    fields: tuple[str, ...] = ("tokens", "context_tokens", "rope_base", "global_batch_tokens")
    fields += ("micro_batch_sequences", "context_parallel", "learning_rate_scale")
    columns = ("recipe", "phase", *(field.replace("_", " ") for field in fields), "mixture")
    rows = [columns, tuple("---" for _ in columns)]
    for recipe in recipes():
        for name, phase in compose([f"recipe={recipe}"]).plan.phases.items():
            cells = [shown(getattr(phase, field)) for field in fields]
            rows.append((recipe, name, *cells, shown(phase.mixture).strip("{}")))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _clusters() -> str:
    """What the shipped files of configs/cluster set."""
    lines = []
    for path in sorted((REPOSITORY / "configs" / "cluster").glob("*.yaml")):
        submit, _ = compose_submission([f"cluster={path.stem}", "nodes=1"])
        variables = ", ".join(f"`{name}={v.value}`" for name, v in submit.environment.items())
        size = f"{submit.tasks_per_node} ranks, {submit.gpus_per_node} GPUs a node"
        lines.append(f"- **`cluster={path.stem}`**: {size}; {variables}")
    return "\n".join(["### Shipped clusters", "", *lines])


_HEAD = """# Configuration

<!-- written by `python -m tests.helpers.config_reference`; do not edit -->

Every key that a YAML file of `configs/` or a command line may set, written from the dataclasses in
`zaya_train/config`. `zaya train recipe=NAME --cfg job` prints a composed run. *math*: another
value may give another loss curve; *speed*: the same sums in another order or place; *io*: neither
([identity](../identity.md)). Nameable: a run may be resumed with another value, if
`checkpoint.allow_changed` names the key. "Recipes" are values that differ from the default.
"report" is the ZAYA1-8B report, arXiv 2605.05365; [published choices](published.md) has its tables
by key."""

_SUBMIT = """Keys of a submission stand beside those of the run: `zaya submit recipe=zaya1_8b
nodes=128 partition=gpu` ([cluster](../cluster.md))."""


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
