"""The table of docs/kernels.md, written from the golden file of the pinned Triton."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

BEGIN = "<!-- written by `zaya kernels verify --write`; do not edit -->"
END = "<!-- end of the written table -->"

HEAD = (
    "case", "kernel", "arch", "block", "warps", "registers", "spills v/s", "stack B", "LDS B",
    "waves", "matrix", "loads 16 B/other", "LDS reads/narrow", "barriers", "matrix share",
)  # fmt: skip


def golden_path(triton_version: str) -> Path:
    """Where the rows of one Triton version are kept."""
    return Path(__file__).parent / "golden" / f"triton-{triton_version}.json"


def golden_rows(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What of the rows does not depend on the machine."""
    kept = ("case", "kernel", "arch", "blocks", "resources", "score")
    return [{key: row[key] for key in kept} for row in rows]


def write_golden(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One row per line."""
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in golden_rows(rows))
    path.write_text(f"[\n{lines}\n]\n", encoding="ascii")


def read_golden(path: Path) -> list[dict[str, Any]]:
    """The rows; FileNotFoundError for a Triton version that has none."""
    rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="ascii"))
    return rows


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table."""
    used, loop = row["resources"], row["resources"]["loop"]
    blocks = " ".join(f"{name}={value}" for name, value in row["blocks"].items())
    left = [row["case"], row["kernel"], row["arch"], blocks, used["num_warps"], used["registers"]]
    left += [f"{used['vector_spills']}/{used['scalar_spills']}", used["scratch_bytes"]]
    left += [used["lds_bytes"], used["waves"]]
    if loop is None:
        return [*map(str, left), "", "", "", "", ""]
    loads = f"{loop['wide_loads']}/{loop['narrow_loads']}"
    reads = f"{loop['lds_reads']}/{loop['narrow_lds_reads']}"
    share = f"{row['score']['matrix_share']:.0%}" if row["score"] and loop["matrix"] else ""
    return [*map(str, left), str(loop["matrix"]), loads, reads, str(loop["barriers"]), share]


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """The table between its two marks."""
    table: list[Sequence[str]] = [HEAD, ["---"] * len(HEAD), *(cells(row) for row in rows)]
    lines = [f"| {' | '.join(line)} |" for line in table]
    return "\n".join([BEGIN, *lines, END])


def replace_table(text: str, table: str) -> str:
    """`text` with what stands between the marks replaced; ValueError without marks."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError("the page needs one begin mark and one end mark of the table")
    before, rest = text.split(BEGIN)
    return before + table + rest.split(END)[1]
