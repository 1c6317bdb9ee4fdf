"""A supervisor on each of two nodes, which know of each other only through the ranks they miss."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from tests.faults.supervised import CHANGES, Supervised
from tests.helpers.nodes import ADDRESSES, DEVICE, TwoNodes, why_not
from tests.integration.runs import left_alone, overrides_for, values_for
from zaya_train.tools.compare import compare_runs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"no nodes here: {why_not()}")

PORT = 29400


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, corpora: Path) -> Path:
    """The supervised run, left alone."""
    return left_alone(tmp_path_factory.mktemp("unbroken"), corpora, CHANGES, ranks=2)


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    with TwoNodes() as made:
        yield made


class Pair:
    """`zaya supervise` on both nodes, one rank each, on one run directory."""

    def __init__(self, nodes: TwoNodes, corpora: Path, folder: Path) -> None:
        self.nodes = nodes
        self.folder = folder
        self.run_dir = folder / "run"
        self.overrides = overrides_for(values_for(self.run_dir, corpora, CHANGES))
        self.started = 0

    def start(self, node: int) -> Supervised:
        """As a person would on that node."""
        self.started += 1
        words = ["--ranks", "1", "--nodes", "2", "--node-rank", str(node)]
        words += ["--master", f"{ADDRESSES[0]}:{PORT}"]
        log = self.folder / f"supervisor-{self.started}.log"
        return Supervised(
            self.overrides, self.run_dir, log, *words,
            node=node, prefix=self.nodes.on(node), GLOO_SOCKET_IFNAME=DEVICE,
        )  # fmt: skip

    def equals(self, unbroken: Path) -> None:
        comparison = compare_runs(self.run_dir, unbroken)
        assert comparison.equal, comparison.text()


def test_a_killed_rank_brings_both_nodes_back(
    nodes: TwoNodes, corpora: Path, unbroken: Path, tmp_path: Path
) -> None:
    pair = Pair(nodes, corpora, tmp_path)
    with ExitStack() as stack:
        both = [stack.enter_context(pair.start(node)) for node in (0, 1)]
        both[1].signal_rank(1, 1, signal.SIGKILL)
        assert [run.wait() for run in both] == [0, 0], both[0].output() + both[1].output()
    (failure,) = both[1].status()["failures"]
    assert "rank 1: killed by SIGKILL" in failure["reason"]
    assert [run.status()["host"] for run in both] == ["node0", "node1"]
    assert [run.status()["attempt"] for run in both] == [2, 2]
    pair.equals(unbroken)


@pytest.mark.nightly
def test_ranks_killed_on_either_node_and_a_stop_told_to_one(
    nodes: TwoNodes, corpora: Path, unbroken: Path, tmp_path: Path
) -> None:
    pair = Pair(nodes, corpora, tmp_path)
    with ExitStack() as stack:
        first, second = (stack.enter_context(pair.start(node)) for node in (0, 1))
        second.signal_rank(1, 1, signal.SIGKILL)
        first.signal_rank(0, 2, signal.SIGKILL)
        second.pid_of(1, 3)
        first.pid_of(0, 3)
        second.process.send_signal(signal.SIGUSR1)
        assert [first.wait(), second.wait()] == [75, 75], first.output() + second.output()
    assert "rank 0: killed by SIGKILL" in first.status()["failures"][1]["reason"]
    with ExitStack() as stack:
        both = [stack.enter_context(pair.start(node)) for node in (0, 1)]
        assert [run.wait() for run in both] == [0, 0], both[0].output() + both[1].output()
    pair.equals(unbroken)


@pytest.mark.nightly
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node_is_waited_for(
    nodes: TwoNodes, corpora: Path, unbroken: Path, tmp_path: Path, lost: int
) -> None:
    """Supervisor and rank die at once, as with the power; later they are started again."""
    pair = Pair(nodes, corpora, tmp_path)
    with ExitStack() as stack:
        both = [stack.enter_context(pair.start(node)) for node in (0, 1)]
        rank = both[lost].pid_of(lost, 1)
        for pid in (both[lost].process.pid, rank):
            os.kill(pid, signal.SIGKILL)
        left = both[1 - lost]
        left.in_attempt(2)
        again = stack.enter_context(pair.start(lost))
        assert [left.wait(), again.wait()] == [0, 0], left.output() + again.output()
    pair.equals(unbroken)


@pytest.mark.nightly
def test_a_pulled_cable(nodes: TwoNodes, corpora: Path, unbroken: Path, tmp_path: Path) -> None:
    """Nobody dies and nothing arrives: both ranks stand still, are named and started again, and
    find each other once the cable is back."""
    pair = Pair(nodes, corpora, tmp_path)
    with ExitStack() as stack:
        both = [stack.enter_context(pair.start(node)) for node in (0, 1)]
        for rank in (0, 1):
            both[rank].pid_of(rank, 1)
        nodes.cable(plugged=False)
        for run in both:
            run.in_attempt(2)
        nodes.cable(plugged=True)
        assert [run.wait() for run in both] == [0, 0], both[0].output() + both[1].output()
        assert both[0].incidents()[0]["kind"] in ("hang", "crash")
    pair.equals(unbroken)
