"""What steps of one model take on one machine without a data sheet, fitted to steps it made.

    seconds = step + micro-batches x (each + tokens x token + pairs x pair + shared x context)

`shared` is the tokens a micro-batch has under context parallelism, 0 without. Good for any phase,
context, batch and document length of the same model, precision, kernels and number of ranks on the
same processor, by the same torch and code: these are in the file's name.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from zaya_train.config.build import to_dict
from zaya_train.config.derive import hash_of
from zaya_train.config.errors import ConfigError
from zaya_train.planning.time import StepTime, Term, pairs_of
from zaya_train.runtime.files import write_json
from zaya_train.runtime.versions import code_hash

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig
    from zaya_train.planning.case import Case

PARTS = ("step", "micro_batch", "token", "pair", "context")


@dataclass(frozen=True)
class Calibration:
    """Seconds of each part, none negative."""

    device: str
    ranks: int
    step: float
    micro_batch: float
    token: float
    pair: float
    context: float
    largest_error: float
    """Of the fit, relative, over the steps it was made from."""


def features(case: Case, document_tokens: float) -> tuple[float, ...]:
    """How often a step has each of `PARTS`, on one rank."""
    micro, tokens = case.micro_batches, case.tokens
    shared = tokens if case.layout.context > 1 else 0
    return (1.0, micro, micro * tokens, micro * pairs_of(case, document_tokens), micro * shared)


def calibrated_time(case: Case, found: Calibration, document_tokens: float) -> StepTime:
    """Of a full step of `case`."""
    source = f"measured on {found.device}, {found.ranks} ranks"
    terms = []
    for part, count in zip(PARTS, features(case, document_tokens), strict=True):
        each = getattr(found, part)
        formula = f"{count:,.6g} x {each:.4g} s"
        terms.append(Term(part.replace("_", "-"), count * each, formula, source))
    return StepTime(case, tuple(term for term in terms if term.seconds))


def file_of(config: TrainConfig, device: str, ranks: int) -> Path:
    """Where the calibration of a model on a device is kept: below $XDG_CACHE_HOME, else ~/.cache.
    Settings that differ have files of their own."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    values = to_dict(config)
    model = {k: v for k, v in values["model"].items() if k not in ("rope_base", "init_std")}
    parallel = {k: v for k, v in values["parallel"].items() if not k.startswith("context_parallel")}
    kinds = {"model": model, "parallel": parallel, "device": device, "ranks": ranks}
    kinds |= {key: values[key] for key in ("precision", "kernels")}
    kinds["newton_schulz"] = values["optim"]["muon"]["newton_schulz_dtype"]
    kinds["threads"] = values["runtime"]["threads"]
    # Measured by one torch and this code; another has other seconds.
    kinds |= {"torch": torch.__version__, "code": code_hash()}
    return Path(base) / "zaya-train" / f"calibration-{hash_of(kinds)}.json"


def load(config: TrainConfig, device: str, ranks: int) -> Calibration | None:
    """What was kept, or None. ConfigError for a file that is none."""
    path = file_of(config, device, ranks)
    if not path.exists():
        return None
    try:
        return Calibration(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: not a calibration ({error!r}); `zaya plan --calibrate` makes it again"
        ) from error


def keep(config: TrainConfig, found: Calibration) -> Path:
    """Write it where `load` looks."""
    path = file_of(config, found.device, found.ranks)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(found))
    return path
