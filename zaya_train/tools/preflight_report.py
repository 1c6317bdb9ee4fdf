"""What preflight found, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.table import Table

from zaya_train.runtime.files import write_json
from zaya_train.tools.preflight_findings import failing_nodes

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from zaya_train.tools.preflight_findings import Finding, Measured
    from zaya_train.tools.preflight_links import Curve

_SHOWN = 20
_COLOURS = {"PASS": "green", "FAIL": "red", "SKIP": "yellow"}


@dataclass(frozen=True)
class Report:
    """Everything, of all ranks."""

    nodes: list[str]
    ranks: int
    device: str
    level: str
    seconds: float
    findings: list[Finding]
    measured: list[Measured]
    curves: list[Curve]
    pairs: dict[tuple[str, str], float]
    """GB/s between neighbouring nodes."""
    versions: dict[str, str]

    @property
    def failed(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.status == "FAIL"]


def write(report: Report, path: Path) -> None:
    """The whole report as one JSON file."""
    content: dict[str, Any] = asdict(report)
    content["pairs"] = [[*nodes, rate] for nodes, rate in report.pairs.items()]
    content["time"] = datetime.now(UTC).isoformat(timespec="seconds")
    content["verdict"] = "FAIL" if report.failed else "PASS"
    content["exclude"] = failing_nodes(report.findings)
    write_json(path, content)


def show(report: Report, console: Console) -> None:
    """A line per check, the collectives' bandwidths, every failure by name, and the verdict."""
    console.print(
        f"preflight {report.level}: {report.ranks} ranks on {len(report.nodes)} nodes, "
        f"{report.device}, {report.seconds:.1f} s",
        highlight=False,
    )
    console.print(_check_table(report))
    if report.curves:
        console.print(_curve_table(report))
    for finding in report.failed[:_SHOWN]:
        where = finding.node + ("" if finding.rank is None else f" rank {finding.rank}")
        console.print(
            f"FAIL {where}: {finding.check}: {finding.value}; must be: {finding.rule}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if len(report.failed) > _SHOWN:
        console.print(f"... and {len(report.failed) - _SHOWN} more failures", highlight=False)
    nodes = failing_nodes(report.findings)
    if nodes:
        console.print(f"unfit nodes: {','.join(nodes)}", markup=False, soft_wrap=True)
    console.print("verdict: " + ("FAIL" if report.failed else "PASS"), highlight=False)


def _check_table(report: Report) -> Table:
    table = Table(title="checks", title_justify="left")
    for column, right in (("check", 0), ("", 0), ("pass", 1), ("fail", 1), ("skip", 1)):
        table.add_column(column, justify="right" if right else "left")
    table.add_column("for example", overflow="fold")
    for check in dict.fromkeys(finding.check for finding in report.findings):
        rows = [finding for finding in report.findings if finding.check == check]
        counts = {s: sum(row.status == s for row in rows) for s in _COLOURS}
        worst = next(s for s in ("FAIL", "PASS", "SKIP") if counts[s])
        example = next(row for row in rows if row.status == worst)
        text = example.value
        if worst == "SKIP":
            text = f"{text} ({example.rule})" if text else example.rule
        cells = [str(counts[s] or "") for s in ("PASS", "FAIL", "SKIP")]
        colour = _COLOURS[worst]
        table.add_row(check, f"[{colour}]{worst}[/{colour}]", *cells, text)
    return table


def _curve_table(report: Report) -> Table:
    """Least and greatest bus bandwidth over ranks, by size of message."""
    table = Table(title="bus bandwidth of collectives, GB/s", title_justify="left")
    for column in ("ranks", "collective", "message", "least", "most"):
        table.add_column(column, justify="left" if column == "collective" else "right")
    keys = dict.fromkeys((c.scope, c.collective, c.message_kib, c.ranks) for c in report.curves)
    for scope, collective, kib, ranks in keys:
        rates = [
            c.gb_per_second
            for c in report.curves
            if (c.scope, c.collective, c.message_kib, c.ranks) == (scope, collective, kib, ranks)
        ]
        size = f"{kib} KiB" if kib < 1024 else f"{kib / 1024:g} MiB"
        cells = (f"{min(rates):.3g}", f"{max(rates):.3g}")
        table.add_row(f"{scope}, {ranks}", collective, size, *cells)
    return table
