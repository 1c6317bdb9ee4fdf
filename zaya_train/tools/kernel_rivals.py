"""What an operation's back ends are timed against: torch.compile, and libraries that have it.

A library's form takes what a back end of the operation takes. One that cannot run here says why.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from zaya_train.config.kernel_rules import PACKAGES
from zaya_train.tools.kernel_cases import NORM

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from zaya_kernels.newton_schulz.types import Polynomials

    from zaya_train.tools.kernel_shapes import Timed


@dataclass(frozen=True)
class Contender:
    """One back end of an operation; without `run` it cannot run here."""

    name: str
    run: Callable[..., Any] | None
    reason: str = ""


def contenders(timed: Timed, device: torch.device) -> list[Contender]:
    """Our back ends, torch.compile of the eager one, and every library known to have the
    operation, whether it can run on `device` or not."""
    ours = [_own(name, run, device) for name, run in timed.backends.items()]
    libraries = [_library(*entry) for entry in _LIBRARIES.get(timed.op, ())]
    return [*ours, _compiled(timed, device), *libraries]


def _own(name: str, run: Callable[..., Any], device: torch.device) -> Contender:
    if name in PACKAGES and find_spec(PACKAGES[name][0]) is None:
        return Contender(name, None, f"{PACKAGES[name][0]} is not installed")
    if name in PACKAGES and device.type != "cuda":
        return Contender(name, None, "needs a GPU")
    if name == "native" and device.type != "cpu":
        return Contender(name, None, "computes on a CPU")
    if name == "reference" and device.type == "cuda":
        return Contender(name, None, "written to be read; timed on a CPU only")
    return Contender(name, run)


def _compiled(timed: Timed, device: torch.device) -> Contender:
    if device.type != "cuda" and not (shutil.which("g++") or shutil.which("clang++")):
        return Contender("compile", None, "torch.compile needs a C++ compiler here")

    @cache
    def compiled() -> Callable[..., Any]:
        return torch.compile(timed.backends["eager"], dynamic=False)

    return Contender("compile", lambda *inputs: compiled()(*inputs))


def _library(name: str, package: str, run: Callable[..., Any]) -> Contender:
    if find_spec(package) is None:
        return Contender(name, None, f"{package} is not installed")
    return Contender(name, run)


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(weight.dtype)


def _whole_logits(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, z_loss: float
) -> tuple[Tensor, float]:
    logits = functional.linear(hidden, weight).float()
    loss = functional.cross_entropy(logits, labels, ignore_index=ignore, reduction="sum")
    return loss, _no_z(z_loss)


def _liger_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore: int, z_loss: float
) -> tuple[Tensor, float]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(ignore_index=ignore, reduction="sum")
    return loss(weight, hidden, labels), _no_z(z_loss)


def _no_z(z_loss: float) -> float:
    if z_loss:
        raise ValueError(f"libraries' losses are timed without z-loss, not with {z_loss}")
    return 0.0


def _muon(matrices: Tensor, polynomials: Polynomials, dtype: torch.dtype) -> Tensor:
    """torch's works in bf16, one matrix at a time, by one polynomial."""
    # A private name of torch's: without it this one back end is absent.
    from torch.optim._muon import _zeropower_via_newtonschulz

    if dtype != torch.bfloat16:
        raise ValueError(f"torch.optim.Muon orthogonalises in bf16, not in {dtype}")
    (polynomial,) = set(polynomials)
    steps = len(polynomials)
    done = [_zeropower_via_newtonschulz(x, polynomial, steps, 1e-7) for x in matrices]
    return torch.stack(done).float()


_LIBRARIES: dict[str, Sequence[tuple[str, str, Callable[..., Any]]]] = {
    # Name, package, the operation in it.
    NORM: (("torch.rms_norm", "torch", _rms_norm),),
    "linear_cross_entropy": (
        ("torch.whole_logits", "torch", _whole_logits),
        ("liger", "liger_kernel", _liger_loss),
    ),
    "newton_schulz": (("torch.optim.Muon", "torch", _muon),),
}
