"""Whether checkpoints can be written: the shared file system as every rank sees it, and the local
disk."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from zaya_train.tools.preflight_findings import Finding, Measured

if TYPE_CHECKING:
    from zaya_train.tools.preflight_findings import Place

TEMPORARY_GIB = 1.0
VISIBLE_SECONDS = 60.0
"""How late a file renamed on one node may show on another; file systems cache directories (NFS: up
to 60 s for an attribute by default, acdirmax)."""
_BLOCK = 1 << 20


def shared_findings(
    place: Place, directory: Path, size_mib: int, device: str, local_ranks: int
) -> tuple[list[Finding], list[Measured]]:
    """Collective: every rank writes, syncs and renames a file of its own, then reads one of the
    next node. A checkpoint does the same.

    size_mib: of each file; local_ranks: ranks of each node.
    """
    ranks = dist.get_world_size()
    folder = directory / f".preflight-{os.environ.get('SLURM_JOB_ID', 'local')}-{_token()}"
    mine = folder / f"rank-{place.rank}"
    failed, seconds = "", 0.0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        seconds = _write(mine, _content(mine), size_mib)
    except OSError as error:
        failed = f"{error.strerror}: {error.filename}"
    rule = "a file can be written, synced and renamed"
    wrote: list[str] = [""] * ranks
    dist.all_gather_object(wrote, failed)
    value = failed or str(folder)
    findings = [Finding.judged("shared folder", place, not failed, value, rule)]
    measured = []
    if not failed:
        rate = size_mib * _BLOCK / 1e6 / seconds
        measured.append(Measured("shared folder writing", place, rate, "MB/s", device))
    # Of another node, where there is one: this node's cache holds what its own ranks wrote.
    neighbour = (place.rank + (local_ranks if local_ranks < ranks else 1)) % ranks
    if not wrote[neighbour]:
        findings.append(_neighbour(place, folder / f"rank-{neighbour}", neighbour))
    # Nobody removes what somebody may still read.
    dist.barrier()
    mine.unlink(missing_ok=True)
    dist.barrier()
    if place.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return findings, measured


def _token() -> str:
    """The same on all ranks and new each time: what a killed preflight left passes for nothing."""
    drawn = [secrets.token_hex(4)]
    dist.broadcast_object_list(drawn, src=0)
    return drawn[0]


def _content(path: Path) -> bytes:
    """Of the file at `path`, whose folder's name is this preflight's alone."""
    return (f"{path.parent.name}/{path.name} ".encode() * _BLOCK)[:_BLOCK]


def _write(path: Path, block: bytes, size_mib: int) -> float:
    """Seconds to write, sync and rename."""
    begin = time.perf_counter()
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        for _ in range(size_mib):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return max(time.perf_counter() - begin, 1e-9)


def _neighbour(place: Place, path: Path, other: int) -> Finding:
    """Whether another rank's file is there and holds what that rank wrote."""
    check = "shared folder seen by others"
    rule = f"rank {other}'s file is visible and whole within {VISIBLE_SECONDS:g} s"
    begin = time.monotonic()
    while not path.exists():
        if time.monotonic() - begin > VISIBLE_SECONDS:
            return Finding.judged(check, place, False, f"no {path}", rule)
        time.sleep(0.05)
    try:
        with path.open("rb") as file:
            same = file.read(_BLOCK) == _content(path)
    except OSError as error:
        return Finding.judged(check, place, False, f"{path}: {error.strerror}", rule)
    waited = f"after {time.monotonic() - begin:.2f} s"
    return Finding.judged(check, place, same, waited if same else f"{path}: other bytes", rule)


def space_findings(node: str, folder: Path, least_gib: float) -> list[Finding]:
    """Free space where checkpoints go, at least `least_gib`, and where temporary files go."""
    found = []
    for check, path, least in (
        ("space, run", folder, least_gib),
        ("space, temporary", Path(tempfile.gettempdir()), TEMPORARY_GIB),
    ):
        # The folder itself may not be there yet.
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free / 2**30
        rule = f"at least {least:,.4g} GiB free in {there}"
        found.append(Finding.judged(check, node, free >= least, f"{free:,.1f} GiB", rule))
    return found
