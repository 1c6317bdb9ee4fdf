"""The environment of every rank: shell lines with reasons, and what is set at the moment."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from zaya_train.config.cluster import VariableConfig

_WIDTH = 100


def shell_lines(environment: Mapping[str, VariableConfig]) -> list[str]:
    """One export per variable below its reason and source; a value set already wins."""
    lines = []
    for name, variable in environment.items():
        text = variable.reason + (f" [{variable.source}]" if variable.source else "")
        lines += textwrap.wrap(
            text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
        )
        lines += [f'export {name}="${{{name}:-{variable.value}}}"', ""]
    return lines


def shell_file(environment: Mapping[str, VariableConfig], cluster: str) -> str:
    """A file to be sourced before torchrun or srun."""
    head = [
        "# shellcheck shell=sh",
        f"# Environment of cluster={cluster}, made by `zaya env {cluster} --sh` from",
        f"# configs/cluster/{cluster}.yaml. Source it:",
        "#",
        f"#     . launch/env/{cluster}.sh",
        "",
    ]
    tail = [
        "# The kernel's automatic NUMA balancing moves pages under the GPU's feet.",
        'if [ "$(cat /proc/sys/kernel/numa_balancing 2>/dev/null || echo 0)" != 0 ]; then',
        f'    echo "{cluster}.sh: NUMA balancing is on;'
        ' as root: sysctl kernel.numa_balancing=0" >&2',
        "fi",
    ]
    return "\n".join([*head, *shell_lines(environment), *tail, ""])


def show_environment(
    environment: Mapping[str, VariableConfig], now: Mapping[str, str], console: Console
) -> None:
    """What ranks started from here would get: each variable, from where, and why.

    now: the environment of this process, which wins over the table.
    """
    table = Table(title="environment of every rank", title_justify="left")
    table.add_column("variable", no_wrap=True)
    for column in ("value", "from", "reason", "source"):
        table.add_column(column, overflow="fold")
    for name, variable in environment.items():
        ours = now.get(name, variable.value) == variable.value
        origin = "table" if name not in now else "here, as in the table" if ours else "here"
        value = variable.value if ours else f"{now[name]} (table: {variable.value})"
        table.add_row(name, value, origin, variable.reason, variable.source)
    console.print(table)
    others = sorted(
        name
        for name in now
        if name not in environment and name.startswith(("NCCL_", "RCCL_", "HSA_", "HIP_", "TORCH_"))
    )
    for name in others:
        console.print(f"also set here, not in the table: {name}={now[name]}", markup=False)
