"""The user's kernel back ends against the reference in float64, on the user's widths.

A back end may err as much as the reference does in the same precision, times `SLACK`: kernels add
up in other orders, they do not compute something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from zaya_kernels.backends import chosen
from zaya_kernels.dtypes import DTYPES
from zaya_kernels.workshop.cases import Case, error, passed

from zaya_train.config.kernel_rules import PACKAGES
from zaya_train.config.newton_schulz import polynomials
from zaya_train.tools.kernel_cases import Most, operations_at
from zaya_train.tools.kernel_shapes import Shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from zaya_train.config.schema import TrainConfig
    from zaya_train.tools.kernel_shapes import Timed

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TOKENS = 96
"""Of them two are padding."""
_SHAPE = Shape("doctor", "", ((40, 1, 23, 30),), padding=2)
SLACK = 4.0
FLOOR = {"fp32": 1e-6, "bf16": 8e-3}
"""Errors below two units of a precision are rounding whatever the reference's."""
_MOST = Most(experts=2, vocabulary=4096, matrix=256)
LIBRARIES = ("flash_attn", "aiter", "transformer_engine")


@dataclass(frozen=True)
class Check:
    """An operation, and the back end to run it."""

    timed: Timed
    backend: str

    @property
    def widths(self) -> str:
        """Of the largest input, without its tokens."""
        shapes = [x.shape[x.shape[:2].index(TOKENS) + 1 if TOKENS in x.shape[:2] else 0 :]
                  for x in self.timed.inputs.values()]  # fmt: skip
        return " x ".join(f"{size:,}" for size in max(shapes, key=lambda shape: shape.numel()))


@dataclass(frozen=True)
class Agreement:
    """Largest relative error over outputs and gradients."""

    op: str
    backend: str
    shape: str
    error: float
    reference_error: float
    """Of the reference in the same precision."""
    limit: float
    worst: str

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


def compare_kernels(config: TrainConfig) -> list[Agreement]:
    """Every operation of a step in the configuration's compute precision; besides, in bf16 on the
    GPU, every library that is installed there and has an operation."""
    precision = config.precision.compute_dtype
    libraries = [_library(config, name) for name in libraries_here()]
    return [_agreement(check, precision, CPU) for check in _checks(config)] + [
        _agreement(check, "bf16", GPU) for check in libraries
    ]


def libraries_here() -> list[str]:
    """Back ends by libraries whose packages are installed, where there is a GPU to run them."""
    there = torch.cuda.is_available()
    return [name for name in LIBRARIES if there and find_spec(PACKAGES[name][0])]


def _agreement(check: Check, precision: str, device: torch.device) -> Agreement:
    timed = check.timed
    rounded = timed.rounded(DTYPES[precision])

    def run(name: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        return timed.call(chosen(timed.op.split(" ")[0], timed.backends, name), x)

    case = Case(timed.op, run, timed.inputs, timed.differentiable)
    exact = passed(case, "reference", {n: v.double() for n, v in rounded.items()})
    places = {"reference": rounded}
    places[check.backend] = {name: value.to(device) for name, value in rounded.items()}
    errors = {
        name: {key: error(x.cpu(), exact[key]) for key, x in passed(case, name, where).items()}
        for name, where in places.items()
    }
    own, reference = errors[check.backend], max(errors["reference"].values())
    worst = max(own, key=lambda key: own[key] if own[key] == own[key] else float("inf"))
    limit = max(SLACK * reference, FLOOR[precision])
    return Agreement(case.name, check.backend, check.widths, own[worst], reference, limit, worst)


def _checks(config: TrainConfig) -> list[Check]:
    operations = operations_at(config.model, _SHAPE, CPU, polynomials(config.optim.muon), _MOST)
    # An operation of several parts goes by one key.
    return [Check(timed, getattr(config.kernels, timed.op.split(" ")[0])) for timed in operations]


def _library(config: TrainConfig, name: str) -> Check:
    (op,) = (check for check in _checks(config) if name in check.timed.backends)
    return Check(op.timed, name)
