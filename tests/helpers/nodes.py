"""Nodes on one machine: each with network and host name of its own, joined by a cable.

What runs on them shares this machine's processes, disks and clock. Network namespaces and a veth
pair; they are gone with the processes that hold them. Needs root and the programs of iproute2 and
util-linux.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType

DEVICE = "eth0"
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def why_not() -> str:
    """What keeps nodes from being made here; empty if nothing does."""
    missing = [name for name in ("ip", "unshare", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install iproute2 util-linux"
    if os.geteuid() != 0:
        return "network namespaces are made by root"
    done = subprocess.run(
        ["unshare", "--net", "--uts", "true"], capture_output=True, text=True, check=False
    )
    return done.stderr.strip() if done.returncode else ""


class TwoNodes:
    """node0 and node1 with ADDRESSES on DEVICE; a context manager."""

    def __enter__(self) -> TwoNodes:
        # cat ends with this process, also where it is killed: its input closes.
        words = ["unshare", "--net", "--uts", "sh", "-c", "echo ready; exec cat"]
        pipe = subprocess.PIPE
        self._holders = [
            subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) for _ in ADDRESSES
        ]
        try:
            for holder in self._holders:
                assert holder.stdout is not None and holder.stdout.readline() == "ready\n"
            other = str(self._holders[1].pid)
            self._run(0, "ip", "link", "add", DEVICE, "type", "veth", "peer", "name", DEVICE,
                      "netns", other)  # fmt: skip
            for node, address in enumerate(ADDRESSES):
                self._run(node, "ip", "address", "add", f"{address}/24", "dev", DEVICE)
                self._run(node, "ip", "link", "set", "lo", "up")
                self._run(node, "ip", "link", "set", DEVICE, "up")
                self._run(node, "hostname", f"node{node}")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def on(self, node: int) -> list[str]:
        """Words before a command that is to run there; the process is the command's own."""
        return ["nsenter", "--target", str(self._holders[node].pid), "--net", "--uts", "--"]

    def cable(self, plugged: bool) -> None:
        """Pull it, or plug it in: nothing arrives, and nobody is told."""
        self._run(0, "ip", "link", "set", DEVICE, "up" if plugged else "down")

    def _run(self, node: int, *words: str) -> None:
        subprocess.run([*self.on(node), *words], check=True)

    def _end(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.communicate()
