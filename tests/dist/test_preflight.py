"""`zaya preflight` on real gloo ranks that take themselves for nodes of their own; planted faults
are found and laid to the right node."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from zaya_train.main import main
from zaya_train.tools import preflight, preflight_compute, preflight_disk, preflight_links

if TYPE_CHECKING:
    from collections.abc import Callable

    Plant = Callable[[int], None]

TOLERANT = 120


def nothing(rank: int) -> None:
    """No fault."""


def _rank(rank: int, environment: dict[str, str], words: list[str], plant: Plant) -> None:
    log = os.open(environment["LOG"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    os.environ.update(environment)
    plant(rank)
    sys.exit(main(["preflight", *words]))


class Ran:
    """Exit codes, output and report of a preflight over `nodes` (a name per rank)."""

    def __init__(
        self,
        folder: Path,
        nodes: list[str],
        plant: Plant = nothing,
        words: tuple[str, ...] = (),
        absent: int | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.exclude = folder / "exclude"
        own = ["--output", str(folder / "report.json"), "--exclude-file", str(self.exclude)]
        own += ["--directory", str(folder / "shared"), "--timeout", str(TOLERANT), *words]
        context = multiprocessing.get_context("fork")
        ranks = []
        logs = [folder / f"rank-{rank}.out" for rank in range(len(nodes))]
        for rank, node in enumerate(nodes):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(nodes)),
                "LOCAL_RANK": str(nodes[:rank].count(node)),
                "LOCAL_WORLD_SIZE": str(nodes.count(node)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "SLURMD_NODENAME": node,
                "COLUMNS": "200",
                "LOG": str(logs[rank]),
            }
            arguments = (rank, environment, own, plant)
            if rank != absent:
                ranks.append(context.Process(target=_rank, args=arguments))
                ranks[-1].start()
        for process in ranks:
            process.join(TOLERANT)
        self.codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
            process.join()
        self.output = "".join(log.read_text() for log in logs if log.exists())
        report = folder / "report.json"
        self.report: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}

    def failed(self) -> set[tuple[str, str, int | None]]:
        """Check, node and rank of every failure."""
        rows = self.report["findings"]
        return {(f["check"], f["node"], f["rank"]) for f in rows if f["status"] == "FAIL"}


def test_fit_nodes_pass_and_everything_is_measured(tmp_path: Path) -> None:
    ran = Ran(tmp_path, ["a", "a", "b", "b"])
    assert ran.codes == [0] * 4, ran.output
    assert ran.report["verdict"] == "PASS" and ran.report["exclude"] == []
    assert not ran.exclude.exists() and "verdict: PASS" in ran.output
    curves = {(c["scope"], c["collective"], c["ranks"]) for c in ran.report["curves"]}
    kinds = (("node", 2), ("between nodes", 2), ("world", 4))
    assert curves == {(s, c, n) for s, n in kinds for c in preflight_links.COLLECTIVES}
    assert all(c["gb_per_second"] > 0 for c in ran.report["curves"])
    assert [pair[:2] for pair in ran.report["pairs"]] == [["a", "b"]]
    # Nothing is left behind, and nothing that could not be judged here passes for good.
    assert list((tmp_path / "shared").iterdir()) == []
    skipped = {f["check"] for f in ran.report["findings"] if f["status"] == "SKIP"}
    assert {"device", "matrix product", "memory", "link", "xGMI links"} <= skipped
    assert all(f["rule"] for f in ran.report["findings"])


def unwritable(rank: int) -> None:
    """Rank 1's node has the shared file system read-only (as root, permissions do not tell)."""
    if rank == 1:

        def refuse(path: Path, block: bytes, size_mib: int) -> float:
            raise OSError(30, "Read-only file system", str(path))

        preflight_disk._write = refuse


def slow_disk(rank: int) -> None:
    """Rank 1's files take a thousand seconds."""
    if rank == 1:
        write = preflight_disk._write
        preflight_disk._write = lambda *arguments: write(*arguments) + 1000.0


def wrong_sender(rank: int) -> None:
    """What rank 1 hands to collectives has a flipped value."""
    if rank == 1:
        made = preflight_links.Work.__init__

        def flipped(self: preflight_links.Work, *arguments: Any) -> None:
            made(self, *arguments)
            self._given[-1] += 1.0

        preflight_links.Work.__init__ = flipped  # type: ignore[method-assign, assignment]


def unstable_device(rank: int) -> None:
    """Rank 1's products have other bits every time."""
    if rank == 1:
        product = torch.Tensor.__matmul__

        def noisy(self: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            return product(self, other) + torch.rand(()) * 1e-3

        torch.Tensor.__matmul__ = noisy  # type: ignore[method-assign, assignment]


def other_environment(rank: int) -> None:
    if rank == 1:
        os.environ["NCCL_IB_TC"] = "7"


def slow_device(rank: int) -> None:
    if rank == 1:
        vars(preflight_compute)["product_rate"] = lambda *arguments: 1.0


def killed(rank: int) -> None:
    """Every file is written, and then all ranks are gone."""
    preflight_disk._neighbour = lambda *arguments: os._exit(9)


def own_disk(rank: int) -> None:
    """Node b's directory is a local one: what its ranks write stays there."""
    preflight_disk.VISIBLE_SECONDS = 0.2
    if rank > 1:
        preflight_disk._write = lambda path, block, size_mib: 1.0


def test_a_file_is_read_on_another_node_and_must_be_new(tmp_path: Path) -> None:
    nodes = ["a", "a", "b", "b"]
    assert 9 in Ran(tmp_path, nodes, killed).codes
    (left,) = (tmp_path / "shared").iterdir()
    assert {path.name for path in left.iterdir()} == {f"rank-{rank}" for rank in range(4)}
    ran = Ran(tmp_path, nodes, own_disk)
    check = "shared folder seen by others"
    # Node a's ranks miss those of b; b's read a's files, and not each other's, which are missing.
    assert ran.failed() == {(check, "a", 0), (check, "a", 1)}, ran.output


def stale(rank: int) -> None:
    """Rank 1's file is that of another preflight."""
    if rank == 1:
        write, other = preflight_disk._write, preflight_disk._content(Path("old") / "rank-1")
        preflight_disk._write = lambda path, block, size_mib: write(path, other, size_mib)


def test_bytes_of_another_preflight_do_not_pass(tmp_path: Path) -> None:
    ran = Ran(tmp_path, ["a", "a"], stale)
    assert ran.failed() == {("shared folder seen by others", "a", 0)}, ran.output
    assert "other bytes" in ran.output


DISK = ("--minimum", "disk_mb_per_second=0.01")
GEMM = ("--minimum", "gemm_tflops=1e-9")


@pytest.mark.parametrize(
    ("plant", "words", "check"),
    [
        (unwritable, (), "shared folder"),
        (slow_disk, DISK, "shared folder writing"),
        (wrong_sender, (), "all_gather, between nodes"),
        (unstable_device, (), "repeatable product"),
        (other_environment, (), "environment"),
        (slow_device, GEMM, "matrix product"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_fault_is_laid_to_its_node_alone(
    tmp_path: Path, plant: Plant, words: tuple[str, ...], check: str
) -> None:
    ran = Ran(tmp_path, ["a", "b"], plant, words)
    assert ran.codes == [1, 1], ran.output
    assert (check, "b", 1) in ran.failed(), ran.failed()
    assert ran.report["exclude"] == ["b"] and ran.exclude.read_text() == "b\n"
    assert f"FAIL b rank 1: {check}" in ran.output and "unfit nodes: b" in ran.output


def test_a_fault_of_all_excludes_nobody(tmp_path: Path) -> None:
    ran = Ran(tmp_path, ["a", "b"], words=("--minimum", "gemm_tflops=1e9"))
    assert ran.codes == [1, 1] and ran.report["exclude"] == ["a", "b"]
    assert not ran.exclude.exists() and "the cause is a common one" in ran.output


def test_a_full_disk_is_told_from_a_small_checkpoint(tmp_path: Path) -> None:
    ran = Ran(tmp_path, ["a"], words=("--free-gib", "1e12"))
    assert ran.codes == [1] and ("space, run", "a", None) in ran.failed()


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    ran = Ran(tmp_path, ["a", "b"], words=("--timeout", "2"), absent=1)
    assert ran.codes == [1]
    assert "error: 1 of 2 ranks did not come within 2 s: 1" in ran.output


def leaves(rank: int) -> None:
    if rank == 1:
        preflight.run_scope = lambda *arguments: os._exit(9)  # type: ignore[attr-defined]


def test_a_rank_lost_in_a_collective_ends_the_others(tmp_path: Path) -> None:
    ran = Ran(tmp_path, ["a", "b"], leaves)
    assert ran.codes == [1, 9], ran.output
    assert "error: rank 0 on a: a collective over 2 ranks (between nodes) failed" in ran.output


def test_alone_it_says_what_it_skips(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", "--directory", str(tmp_path), "--level", "full"]) == 0
    said = capsys.readouterr().out
    assert "preflight full: 1 ranks on 1 nodes" in said and "one rank" in said
    assert main(["preflight", "--directory", str(tmp_path), "--minimum", "x=1"]) == 2
