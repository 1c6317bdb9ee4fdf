"""`zaya supervise`: train on this node's ranks, watched and started again."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from zaya_train.config.check import check
from zaya_train.config.errors import ConfigError
from zaya_train.data.check import check_corpora
from zaya_train.runtime.local_ranks import Launch
from zaya_train.runtime.log import console_handler
from zaya_train.runtime.supervisor import Supervisor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from zaya_train.config.schema import TrainConfig


@dataclass(frozen=True)
class SuperviseRequest:
    """A configuration, the overrides that gave it, and where its ranks run."""

    config: TrainConfig
    overrides: Sequence[str]
    ranks: int
    """On this node."""
    nodes: int = 1
    node_rank: int = 0
    master: str | None = None
    """`host:port`, needed on several nodes."""


def supervise(request: SuperviseRequest) -> int:
    """Run to the end; the exit code (see runtime.supervisor).

    Raises, before any rank starts:
        ConfigError: a rule of the configuration or of the launch is broken.
        DataError: a corpus of the plan is missing or damaged.
    """
    launch = _launch(request)
    check(request.config, request.ranks * request.nodes)
    check_corpora(request.config)
    logger = logging.getLogger("zaya_train")
    handler = console_handler(Console(stderr=True))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        return Supervisor(launch, request.config.supervisor).run()
    finally:
        logger.removeHandler(handler)


def _launch(request: SuperviseRequest) -> Launch:
    if request.ranks < 1 or not 0 <= request.node_rank < request.nodes:
        raise ConfigError(
            f"--ranks {request.ranks} --nodes {request.nodes} --node-rank {request.node_rank}: at "
            "least one rank a node, and nodes count from 0"
        )
    host, _, port = (request.master or "").rpartition(":")
    if request.master is None and request.nodes > 1:
        raise ConfigError(f"--master: {request.nodes} nodes need host:port of the first one")
    if request.master is not None and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigError(f"--master {request.master}: is not host:port with a port up to 65535")
    return Launch(
        command=(sys.executable, "-m", "zaya_train", "train", *request.overrides),
        run_dir=Path(request.config.run.dir),
        ranks=request.ranks,
        nodes=request.nodes,
        node_rank=request.node_rank,
        master=(host, int(port)) if host else None,
    )
