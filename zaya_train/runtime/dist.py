"""Process groups: start, stop, timeouts, and how a rank dies.

Why a failing rank leaves through `os._exit`: `destroy_process_group` and interpreter shutdown wait
for communication in flight, which the failed rank's peers will never finish, so the rank would hang
with its error unsaid, and the job with it. A dead process is what everyone notices: gloo peers fail
within a second when the connection closes; under RCCL the launcher sees the exit and ends the rest.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import _set_pg_timeout

from zaya_train.config.errors import ConfigError, ZayaError
from zaya_train.runtime.device import pick_device, usable_cores
from zaya_train.runtime.log import FILE_ONLY
from zaya_train.runtime.meeting import Place, meet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch._C._distributed_c10d import Store

    from zaya_train.config.schema import RuntimeConfig

log = logging.getLogger(__name__)

LAUNCH_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
EXIT_INTERRUPTED = 130  # the shell's 128 + SIGINT


@dataclass(frozen=True)
class Ranks:
    """This process among the others. `backend` is torch.distributed's string."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    backend: str


@dataclass(frozen=True)
class _Launch:
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def start(config: RuntimeConfig) -> Ranks:
    """Join the process group torchrun's environment describes, or make a world of one without it.

    The world of one uses an in-process store and opens no port. CPU tensors always communicate
    through gloo; with an accelerator its tensors use NCCL (RCCL on ROCm).

    Raises:
        ConfigError: incomplete or contradictory launch variables, or no such device.
        LostRankError: not all ranks came within runtime.init_timeout_seconds.
    """
    launch = _read_launch(os.environ)
    device = pick_device(config.device, launch.local_rank if launch else 0)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=config.init_timeout_seconds)
    if launch:
        dist.init_process_group(
            backend,
            store=_store(launch, os.environ, config.init_timeout_seconds),
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
        )
    else:
        launch = _Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
    torch.set_num_threads(threads_per_rank(config.threads, launch.local_world_size))
    return Ranks(
        rank=launch.rank,
        world_size=launch.world_size,
        local_rank=launch.local_rank,
        local_world_size=launch.local_world_size,
        device=device,
        backend=backend,
    )


def _store(launch: _Launch, environment: Mapping[str, str], timeout_seconds: float) -> Store | None:
    """Where the ranks have met; None where torchrun's agent keeps a store for every attempt."""
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return None
    host, port = environment["MASTER_ADDR"], _integer(environment, "MASTER_PORT")
    return meet(Place(host, port, launch.rank, launch.world_size, timeout_seconds))


def stop() -> None:
    """Leave the process group at the regular end of a run; a failing rank uses `fail_fast`."""
    if dist.is_initialized():
        dist.destroy_process_group()


def threads_per_rank(asked: int, local_world_size: int) -> int:
    """CPU threads of one rank: as asked, or the node's cores shared evenly, at least one."""
    return asked if asked > 0 else max(1, usable_cores() // local_world_size)


def shorten_timeouts(seconds: float, groups: Iterable[dist.ProcessGroup] = ()) -> None:
    """Bound the wait inside collectives of the world group and of `groups` (a mesh's, say).

    To be called after the first step: until then compilation, connection set-up and slow file
    systems ask for the long initial timeout; afterwards a long wait is a lost peer.
    """
    timeout = timedelta(seconds=seconds)
    _set_pg_timeout(timeout)
    for group in groups:
        _set_pg_timeout(timeout, group)


@contextmanager
def fail_fast(ranks: Ranks) -> Iterator[None]:
    """End this process at once when the body fails, saying why in one line of this rank's own.

    To be entered inside `logging_to`: the traceback goes to the log (for our own errors the line
    says it all and there is none). The exit code is the error's (`ZayaError.exit_code`), 130 for an
    interrupt, else 1. A world of one has no peers to hang with, so there the exception simply
    passes on. SystemExit always passes.
    """
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if ranks.world_size == 1:
            raise
        _die(ranks.rank, error)


def _die(rank: int, error: BaseException) -> None:
    summary = next(iter(str(error).splitlines()), "")
    line = f"rank {rank}: {type(error).__name__}: {summary}"
    details = "" if isinstance(error, ZayaError) else "\n" + _trace(error)
    log.error("%s%s", line, details, extra=FILE_ONLY)
    sys.stderr.write(line + "\n")
    for handler in logging.getLogger().handlers:
        handler.flush()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_exit_code(error))


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _exit_code(error: BaseException) -> int:
    if isinstance(error, ZayaError):
        return error.exit_code
    return EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _read_launch(environment: Mapping[str, str]) -> _Launch | None:
    present = [name for name in LAUNCH_VARIABLES if name in environment]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return None
    missing = [name for name in LAUNCH_VARIABLES if name not in present]
    if missing:
        raise ConfigError(
            f"launch environment: {', '.join(missing)} not set although {', '.join(present)} are; "
            "start with torchrun, or set all six"
        )
    rank, world_size, local_rank, local_world_size = (
        _integer(environment, name) for name in LAUNCH_VARIABLES[:4]
    )
    if not (0 <= rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise ConfigError(
            f"launch environment: rank {rank} of {world_size}, local rank {local_rank} of "
            f"{local_world_size}: ranks count from 0 to below their world size"
        )
    return _Launch(rank, world_size, local_rank, local_world_size)


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise ConfigError(
            f"launch environment: {name}={environment[name]!r} is not an integer"
        ) from None
