"""What a run expects of its phases, written beside what it measures, and whether it may start."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from zaya_train.config.errors import ConfigError
from zaya_train.model.flops import train_flops_per_token
from zaya_train.planning.calibration import calibrated_time, load
from zaya_train.planning.case import cases_of
from zaya_train.planning.components import GB, in_gb
from zaya_train.planning.fitting import TARGET, Budget, judge
from zaya_train.planning.machine import LINKS, machine_of
from zaya_train.planning.memory import forecast
from zaya_train.planning.time import step_time
from zaya_train.runtime.peaks import row_of

if TYPE_CHECKING:
    from zaya_train.config.schema import TrainConfig
    from zaya_train.planning.case import Case
    from zaya_train.planning.machine import Machine
    from zaya_train.planning.time import StepTime

log = logging.getLogger(__name__)

_LONG_SECONDS = 300.0
"""The published run's steps take seconds; what takes minutes was meant for another machine."""


def known_device(name: str, units: int | None = None) -> str | None:
    """The device table's name for what torch calls a device; None for a partition of one."""
    row = row_of(name, units)
    known = row.name.strip("$") if row else None
    return known if known in LINKS else None


def expected_time(
    case: Case,
    device: str,
    node_ranks: int,
    document_tokens: float | None,
    units: int | None = None,
) -> tuple[StepTime | None, str]:
    """A step on `device`, as torch names it, of so many `units`, and by what; None where neither a
    data sheet nor a calibration is known. Documents of unknown length fill the context."""
    tokens = document_tokens or case.phase.context_tokens
    known = known_device(device, units)
    if known is not None:
        machine = machine_of(known, case.config.precision, node_ranks)
        return step_time(case, machine, tokens), f"data sheet of {known}, shares assumed"
    try:
        found = load(case.config, device, case.ranks)
    except ConfigError as error:
        # No reason to stop a run.
        return None, str(error)
    if found is not None:
        return calibrated_time(case, found, tokens), "calibration of this machine"
    return None, f"no data sheet and no calibration of {device}"


def expectation(
    case: Case,
    device: str,
    node_ranks: int,
    document_tokens: float | None,
    units: int | None = None,
) -> dict[str, Any]:
    """Fields of a phase's first row in the metrics: `expected_peak_bytes` of rank 0,
    `expected_step_seconds` of a full batch or null, `expected_batch_tokens` of that batch,
    `expected_by`; also said in the log."""
    peak = forecast(case).peak
    time, source = expected_time(case, device, node_ranks, document_tokens, units)
    said = f"{time.seconds:.4g} s a step" if time else "no time"
    log.info(
        "%s: expected %.3f GB at most (%s) and %s (%s)",
        case.name, peak.bytes / GB, peak.name, said, source,
    )  # fmt: skip
    return {
        "expected_peak_bytes": peak.bytes,
        "expected_step_seconds": time.seconds if time else None,
        "expected_batch_tokens": case.phase.global_batch_tokens,
        "expected_by": source,
    }


def check_memory(
    config: TrainConfig, ranks: int, node_ranks: int, device_gb: float | None, device: str
) -> str:
    """`fitting.judge` of the launch that `config` is: what is to be said, or nothing. ConfigError
    with the cheapest change that fits.

    node_ranks: of a node, whose links changes are judged by.
    device_gb: of an accelerator; runtime.memory_gb is taken before it. Neither: nothing is judged.
    """
    machine = machine_of(known_device(device) or TARGET, config.precision, node_ranks)
    own = None
    if device_gb:
        own = Budget(device_gb, f"the {in_gb(device_gb * GB)} GB of {device}", machine)
    only = config.run.only_phase
    return judge(config, ranks, configured(config, machine) or own, (only,) if only else ())


def slow_steps(config: TrainConfig, ranks: int, product_rate: float) -> str:
    """What is to be said where a step of a phase takes more than `_LONG_SECONDS` even if all of it
    were products at `product_rate`, FLOP/s of a device; nothing where none does."""
    longest, name = 0.0, ""
    for case in cases_of(config, ranks, (config.run.only_phase,) if config.run.only_phase else ()):
        flops = train_flops_per_token(config.model, 1) * case.phase.global_batch_tokens
        if flops / product_rate / ranks > longest:
            longest, name = flops / product_rate / ranks, case.name
    if longest < _LONG_SECONDS:
        return ""
    return (
        f"phase {name}: a step takes some {longest / 60:,.0f} minutes or more on {ranks} such "
        f"device{'s' * (ranks > 1)}, of {product_rate / 1e12:,.4g} TFLOP/s in a plain product"
    )


def configured(config: TrainConfig, machine: Machine | None = None) -> Budget | None:
    """What the configuration says of a device's memory."""
    limit = config.runtime.memory_gb
    return None if limit is None else Budget(limit, f"runtime.memory_gb={limit:g}", machine)
