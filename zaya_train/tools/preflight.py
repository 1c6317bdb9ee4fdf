"""`zaya preflight`: is every node fit for a run, and if not, which ones are not.

Runs on every rank as training would (srun, torchrun, or alone). Checks what is here and says SKIP,
with the reason, for what is not: on a laptop that is most of it.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from zaya_train.config.errors import ConfigError, LostRankError, first_line
from zaya_train.runtime.device import describe, pick_device
from zaya_train.tools.preflight_compute import device_findings, measure, repeatable, sizes_for
from zaya_train.tools.preflight_disk import shared_findings, space_findings
from zaya_train.tools.preflight_findings import (
    Finding,
    Place,
    failing_nodes,
    judge_minimum,
    odd_ones,
    slow_ones,
    slow_pairs,
)
from zaya_train.tools.preflight_limits import Limits, limits_of
from zaya_train.tools.preflight_links import Curve, pair_rates, run_scope, scopes
from zaya_train.tools.preflight_machine import (
    environment_that_matters,
    kernel_findings,
    nic_findings,
    node_name,
    versions,
)
from zaya_train.tools.preflight_report import Report, show, write
from zaya_train.tools.preflight_smi import node_findings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from zaya_train.tools.preflight_compute import Sizes

EXIT_UNFIT = 1
LARGE_KIB = 262144
"""Messages from which bandwidth and not latency counts."""


@dataclass(frozen=True)
class PreflightRequest:
    """What to check and where to write."""

    directory: Path
    """On the shared file system; a folder for the test files is made in it and removed."""
    level: str = "quick"
    output: Path | None = None
    exclude_file: Path | None = None
    free_gib: float = 1.0
    """Space that the run's checkpoints need."""
    minimums: Sequence[str] = ()
    """`name=value` over the device's own limits."""
    timeout_seconds: float = 300.0
    device: str = "auto"


@dataclass(frozen=True)
class Machine:
    """This rank and its device."""

    place: Place
    ranks: int
    local_ranks: int
    device: torch.device
    name: str
    limits: Limits
    sizes: Sizes


def preflight(request: PreflightRequest, console: Console) -> int:
    """Check, report on rank 0; 0, or EXIT_UNFIT on every rank if a check failed on any.

    Raises:
        ConfigError: a limit that is none, launch variables that contradict each other.
        LostRankError: ranks that did not come, or were lost during a collective, named.
    """
    machine = _start(request)
    try:
        report = _check(request, machine)
        if machine.place.rank == 0:
            show(report, console)
            if request.output:
                write(report, request.output)
            _exclude(report, request, console)
        return EXIT_UNFIT if report.failed else 0
    finally:
        dist.destroy_process_group()


def _start(request: PreflightRequest) -> Machine:
    """Join the others. Unlike training, says who is missing."""
    if request.level not in ("quick", "full"):
        raise ConfigError(f"--level {request.level}: quick or full")
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    if "RANK" in os.environ:
        try:
            rank, ranks, local, locals_ = (int(os.environ[name]) for name in variables)
        except (KeyError, ValueError) as error:
            raise ConfigError(f"launch environment: {error} (needs {variables})") from error
    else:
        rank, ranks, local, locals_ = 0, 1, 0, 1
    device = pick_device(request.device, local)  # type: ignore[arg-type]
    limits = limits_of(describe(device).name, request.minimums)
    timeout = timedelta(seconds=request.timeout_seconds)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store: Store = HashStore() if ranks == 1 else meet(rank, ranks, request.timeout_seconds)
    dist.init_process_group(
        backend, store=PrefixStore("preflight", store), rank=rank, world_size=ranks,
        timeout=timeout,
    )  # fmt: skip
    place = Place(node_name(), rank, local)
    sizes = sizes_for(request.level, device)
    return Machine(place, ranks, locals_, device, describe(device).name, limits, sizes)


def meet(rank: int, ranks: int, timeout_seconds: float) -> Store:
    """The store of MASTER_ADDR and MASTER_PORT, once every rank is there.

    Raises:
        LostRankError: on rank 0, naming the ranks that are not; on others, that rank 0 is not.
    """
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdecimal():
        raise ConfigError(f"launch environment: MASTER_ADDR={address!r} MASTER_PORT={port!r}")
    timeout = timedelta(seconds=timeout_seconds)
    # torchrun's agent may have opened the store on that port already.
    opens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        store = TCPStore(address, int(port), ranks, opens, timeout, wait_for_workers=False)
        store.set(f"here/{rank}", node_name())
        missing = set(range(ranks)) if rank == 0 else set()
        deadline = time.monotonic() + timeout_seconds
        while missing and time.monotonic() < deadline:
            missing = {r for r in missing if not store.check([f"here/{r}"])}
            time.sleep(0.05)
    except (RuntimeError, dist.DistError) as error:
        raise LostRankError(
            f"rank {rank} on {node_name()} cannot reach rank 0 at {address}:{port} within "
            f"{timeout_seconds:g} s: {first_line(error)}"
        ) from error
    if missing:
        shown = ", ".join(map(str, sorted(missing)[:16])) + (" ..." if len(missing) > 16 else "")
        raise LostRankError(
            f"{len(missing)} of {ranks} ranks did not come within {timeout_seconds:g} s: {shown}"
        )
    return store


def _check(request: PreflightRequest, machine: Machine) -> Report:
    begin = time.perf_counter()
    findings = _own(request, machine)
    repeat, bits = repeatable(machine.place, machine.device, machine.sizes)
    findings.append(repeat)
    measured = measure(machine.place, machine.device, machine.sizes, machine.name)
    found, written = shared_findings(
        machine.place,
        request.directory,
        machine.sizes.disk_mib,
        machine.name,
        machine.local_ranks,
    )
    findings += found
    measured += written
    rows = _gather(machine, (machine.place, findings, measured, bits, _facts(machine)))
    places = [row[0] for row in rows]
    curves, exact = _together(machine, places)
    rates = _rates(machine, places)
    more = _gather(machine, (curves, exact))
    all_findings = [f for row in rows for f in row[1]] + [f for row in more for f in row[1]]
    all_measured = [m for row in rows for m in row[2]]
    all_findings += [judge_minimum(m, _limit(machine.limits, m.check)) for m in all_measured]
    if machine.device.type == "cuda":
        # Processes of one CPU share its cores, so the slower one says nothing.
        all_findings += slow_ones(all_measured)
    all_findings += odd_ones("version", {row[0]: row[4][0] for row in rows})
    all_findings += odd_ones("environment", {row[0]: row[4][1] for row in rows})
    all_findings += odd_ones("product between ranks", _bits_by_device(rows))
    all_findings += slow_pairs(rates, machine.limits.link_gb_per_second)
    all_curves = [c for row in more for c in row[0]]
    all_findings += _judge_curves(machine, all_curves)
    return Report(
        nodes=sorted({place.node for place in places}),
        ranks=machine.ranks,
        device=machine.name,
        level=request.level,
        seconds=time.perf_counter() - begin,
        findings=all_findings,
        measured=all_measured,
        curves=all_curves,
        pairs=rates,
        versions=versions(),
    )


def _own(request: PreflightRequest, machine: Machine) -> list[Finding]:
    """Checks that need no other rank; those of a node on its first rank."""
    place, node = machine.place, machine.place.node
    found = device_findings(place, machine.device, machine.limits, machine.local_ranks)
    if place.local_rank:
        return found
    gpus = machine.device.type == "cuda"
    found += kernel_findings(node, gpus)
    found += nic_findings(node, machine.limits)
    found += space_findings(node, request.directory, request.free_gib)
    if torch.version.hip:
        found += node_findings(node, machine.local_ranks)
    else:
        found.append(Finding("device health", node, "SKIP", "", "no AMD GPU here"))
        found.append(Finding("xGMI links", node, "SKIP", "", "no AMD GPU here"))
    return found


def _facts(machine: Machine) -> tuple[dict[str, str], dict[str, str]]:
    facts = {**versions(), "device": machine.name}
    return facts, environment_that_matters(os.environ)


def _gather(machine: Machine, value: tuple) -> list[tuple]:
    rows: list[tuple] = [()] * machine.ranks
    dist.all_gather_object(rows, value)
    return rows


def _bits_by_device(rows: list[tuple]) -> dict[Place, dict[str, str]]:
    """Hash of the product by place; devices of different kinds may differ in bits."""
    kinds = {row[4][0]["device"] for row in rows}
    if len(kinds) > 1:
        return {}
    return {row[0]: {"sha256": row[3][:16]} for row in rows}


def _together(machine: Machine, places: list[Place]) -> tuple[list[Curve], list[Finding]]:
    place = machine.place
    if machine.ranks == 1:
        return [], [Finding("collectives", place.node, "SKIP", "", "one rank", place.rank)]
    curves, findings = [], []
    for scope in scopes(places, place.rank):
        try:
            new, exact = run_scope(scope, places, place.rank, machine.device, machine.sizes)
        except RuntimeError as error:
            raise LostRankError(
                f"rank {place.rank} on {place.node}: a collective over {len(scope.ranks)} ranks "
                f"({scope.name}) failed: {first_line(error)}"
            ) from error
        curves += new
        findings += exact
    return curves, findings


def _rates(machine: Machine, places: list[Place]) -> dict[tuple[str, str], float]:
    if len({place.node for place in places}) < 2:
        return {}
    try:
        return pair_rates(places, machine.place.rank, machine.device, machine.sizes)
    except RuntimeError as error:
        raise LostRankError(
            f"rank {machine.place.rank} on {machine.place.node}: sending to a neighbouring node "
            f"failed: {first_line(error)}"
        ) from error


def _limit(limits: Limits, check: str) -> float | None:
    return {
        "matrix product": limits.gemm_tflops,
        "memory": limits.memory_gb_per_second,
        "shared folder writing": limits.disk_mb_per_second,
    }[check]


def _judge_curves(machine: Machine, curves: list[Curve]) -> list[Finding]:
    """The slowest node-wide all-reduce of a large message against the device's limit."""
    least = machine.limits.node_gb_per_second
    large = [
        c.gb_per_second
        for c in curves
        if c.scope == "node" and c.collective == "all_reduce" and c.message_kib >= LARGE_KIB
    ]
    check = "all_reduce bandwidth in node"
    if not large or least is None:
        why = "no limit known for this device" if large else "no message of 256 MiB was sent"
        return [Finding(check, "all", "SKIP", "", why)]
    rule = f"at least {least:g} GB/s at 256 MiB"
    return [Finding.judged(check, "all", min(large) >= least, f"{min(large):,.4g} GB/s", rule)]


def _exclude(report: Report, request: PreflightRequest, console: Console) -> None:
    """Node names for sbatch --exclude; not where every node fails, for that has another cause."""
    nodes = failing_nodes(report.findings)
    if not request.exclude_file or not nodes:
        return
    if len(nodes) == len(report.nodes):
        console.print("every node fails a check: none is excluded, the cause is a common one")
        return
    request.exclude_file.parent.mkdir(parents=True, exist_ok=True)
    request.exclude_file.write_text(",".join(nodes) + "\n", encoding="utf-8")
