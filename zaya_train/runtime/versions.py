"""Which program computes: its sources, torch and the device."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from zaya_train.runtime.device import describe

if TYPE_CHECKING:
    import torch

_COMPUTING = (
    "config",
    "data",
    "hub",
    "model",
    "optim",
    "parallel",
    "phases",
    "train",
    "runtime/seeds.py",
    "run.py",
)
"""Of zaya_train what a step's numbers may depend on: the steps, the weights they begin with (hub)
and random numbers; besides these, the kernels."""


def versions(device: torch.device) -> dict[str, str]:
    """`code` (hash of the sources that compute), `torch` with its build, `device` by name."""
    facts = describe(device)
    return {"code": code_hash(), "torch": facts.torch_version, "device": facts.name}


@cache
def code_hash() -> str:
    """Short sha256 over names and contents of the sources that compute: tells an edited checkout
    from a clean one, and needs no git."""
    kernels = find_spec("zaya_kernels")
    found = kernels is not None and kernels.origin
    return sources_hash(Path(__file__).parents[1], Path(found).parent if found else None)


def sources_hash(package: Path, kernels: Path | None) -> str:
    """`code_hash` of zaya_train and zaya_kernels in these folders."""
    places = [(package, package / name) for name in _COMPUTING]
    if kernels is not None:
        places.append((kernels.parent, kernels))
    digest = hashlib.sha256()
    for root, place in places:
        files = [place] if place.is_file() else sorted(place.rglob("*.py"))
        for file in files:
            digest.update(f"{file.relative_to(root).as_posix()}\n".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
