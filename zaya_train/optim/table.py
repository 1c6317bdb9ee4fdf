"""Which optimizer owns which parameter: every parameter matches exactly one row.

Muon gets the matrices, AdamW the embedding (which is the LM head), norms, biases and scales, as in
2605.05365. The report does not say what counts as a matrix where a tensor holds several or where a
convolution is meant; the views below are this project's choice:

- experts: each expert's gate and up projections together are one matrix, its down projection is
  another, never mixed with another expert's;
- the grouped convolution: head h is a linear map from the d x taps inputs it sees to d outputs, one
  matrix each. The tensor flattened to one matrix would treat a block-diagonal map as a full one;
- the depthwise convolution has one row of taps per channel, no map between channels: AdamW;
- the router's four matrices as they are, the rows of the last one being classes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor


@dataclass(frozen=True)
class MatrixView:
    """What counts as one matrix of a parameter."""

    words: str
    dims: int
    """Of the parameter: 2, it is one matrix [n, k]; 3, its first dimension counts matrices."""

    @property
    def is_stack(self) -> bool:
        return self.dims == 3

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x, whole or one rank's part along dim 0 -> its matrices, or its rows of the one matrix,
        as views [n, k] of the same storage."""
        return x.unbind(0) if self.is_stack else (x,)


MATRIX = MatrixView("one matrix", 2)
PER_EXPERT = MatrixView("one matrix per expert", 3)
PER_HEAD = MatrixView("one matrix [d, d taps] per head", 3)


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    pattern: str
    """Regular expression over the full parameter name."""
    optimizer: Literal["muon", "adamw"]
    decays: bool
    """Whether decoupled weight decay applies."""
    what: str
    view: MatrixView | None = None
    """Muon's."""


_LAYER = r"layers\.\d+\."

RULES = (
    Rule("embedding", "adamw", True, "tied embedding and LM head"),
    Rule(r"embedding_(scale|bias)", "adamw", False, "vector"),
    Rule(r"norm\.weight", "adamw", False, "vector"),
    Rule(_LAYER + r"(attention|moe)_norm\.weight", "adamw", False, "vector"),
    Rule(_LAYER + r"(attention|moe)_residual\..*", "adamw", False, "vector"),
    Rule(_LAYER + r"attention\.(q|k|v_now|v_delayed|out)_proj", "muon", True, "projection", MATRIX),
    Rule(_LAYER + r"attention\.conv_grouped", "muon", True, "convolution", PER_HEAD),
    Rule(_LAYER + r"attention\.conv_depthwise", "adamw", False, "taps per channel, no matrix"),
    Rule(_LAYER + r"attention\.conv_(depthwise|grouped)_bias", "adamw", False, "vector"),
    Rule(_LAYER + r"attention\.temperature", "adamw", False, "vector"),
    Rule(_LAYER + r"moe\.experts\.(gate_up|down)", "muon", True, "experts", PER_EXPERT),
    Rule(_LAYER + r"moe\.router\.(down|fc1|fc2|out)", "muon", True, "router", MATRIX),
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
    """One line per rule in use: optimizer, decay, tensors, elements, matrices, names, view."""
    lines = []
    for rule in RULES:
        names = [name for name, owner in table.items() if owner is rule]
        if names:
            elements = sum(math.prod(shapes[name]) for name in names)
            decay = "decay" if rule.decays else "no decay"
            words = f"{rule.what}, {rule.view.words}" if rule.view else rule.what
            matrices = sum(_matrices(rule, shapes[name]) for name in names)
            pattern = rule.pattern.replace(_LAYER, "layers.*.").replace("\\.", ".")
            lines.append(
                f"{rule.optimizer:5} {decay:8} {len(names):5} tensors {elements:15,} elements "
                f"{matrices:6,} matrices  {pattern}  ({words})"
            )
    return lines


def _matrices(rule: Rule, shape: tuple[int, ...]) -> int:
    if rule.view is None:
        return 0
    return shape[0] if rule.view.is_stack else 1
