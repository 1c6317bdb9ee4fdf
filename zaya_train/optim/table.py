"""Which optimizer owns which parameter: every parameter matches exactly one row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    pattern: str
    """Regular expression over the full parameter name."""
    optimizer: Literal["muon", "adamw"]
    decays: bool
    """Whether decoupled weight decay applies."""
    view: str
    """What counts as one matrix for Muon."""


_LAYER = r"layers\.\d+\."

RULES = (
    Rule("embedding", "adamw", True, "tied embedding and LM head"),
    Rule(r"embedding_(scale|bias)", "adamw", False, "vector"),
    Rule(r"norm\.weight", "adamw", False, "vector"),
    Rule(_LAYER + r"(attention|moe)_norm\.weight", "adamw", False, "vector"),
    Rule(_LAYER + r"(attention|moe)_residual\..*", "adamw", False, "vector"),
    Rule(_LAYER + r"attention\.(q|k|v_now|v_delayed|out)_proj", "muon", True, "matrix"),
    Rule(_LAYER + r"attention\.conv_grouped", "muon", True, "one matrix [d, d taps] per head"),
    Rule(_LAYER + r"attention\.conv_depthwise", "adamw", False, "taps per channel, no matrix"),
    Rule(_LAYER + r"attention\.conv_(depthwise|grouped)_bias", "adamw", False, "vector"),
    Rule(_LAYER + r"attention\.temperature", "adamw", False, "vector"),
    Rule(_LAYER + r"moe\.experts\.(gate_up|down)", "muon", True, "one matrix per expert"),
    Rule(_LAYER + r"moe\.router\.(down|fc1|fc2|out)", "muon", True, "matrix"),
    Rule(_LAYER + r"moe\.router\.(down|fc1|fc2)_bias", "adamw", False, "vector"),
    Rule(_LAYER + r"moe\.router\.(norm|depth_scale)", "adamw", False, "vector"),
)


def assign(names: Iterable[str]) -> dict[str, Rule]:
    """The rule of every parameter name; ValueError names one that matches none or several."""
    table = {}
    for name in names:
        matches = [rule for rule in RULES if re.fullmatch(rule.pattern, name)]
        if len(matches) != 1:
            rows = ", ".join(rule.pattern for rule in matches) or "none"
            raise ValueError(f"parameter {name} must match one row of the optimizer table: {rows}")
        table[name] = matches[0]
    return table


def summary(table: Mapping[str, Rule], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line per rule in use: optimizer, decay, parameters, elements, view."""
    lines = []
    for rule in RULES:
        names = [name for name, owner in table.items() if owner is rule]
        if names:
            elements = sum(_product(shapes[name]) for name in names)
            decay = "decay" if rule.decays else "no decay"
            lines.append(
                f"{rule.optimizer:5} {decay:8} {len(names):5} tensors {elements:15,} elements  "
                f"{rule.pattern.replace(_LAYER, 'layers.*.')}  ({rule.view})"
            )
    return lines


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
