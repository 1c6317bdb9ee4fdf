"""Compiled resources: how they are read, judged, kept and shown; and the shipped kernels'."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zaya_kernels.launch import ARCHITECTURES, Config
from zaya_kernels.workshop import table
from zaya_kernels.workshop.assembly import (
    LoopCounts,
    Resources,
    amd_resources,
    hot_loop,
    loops,
    nvidia_resources,
    waves_per_simd,
)
from zaya_kernels.workshop.budgets import BUDGETS, OF_CASES, broken, share_lost
from zaya_kernels.workshop.mca import _matrix_cycles, find_mca, score

from zaya_train.tools.kernels import changes, triton_version

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).resolve().parents[2]

# One loop with a matrix instruction, one without; the exit of the first branches backwards.
ASSEMBLY = """
kernel:
; %bb.0:
	v_mov_b32_e32 v0, 0
	s_cbranch_scc1 .LBB0_2
.LBB0_1:                                ; %exit
	buffer_store_dword v0, v1, s[0:3], 0 offen
	s_endpgm
.LBB0_2:                                ; =>This Inner Loop Header: Depth=1
	buffer_load_dwordx4 v[2:5], v0, s[0:3], 0 offen
	buffer_load_ushort v6, v0, s[0:3], 0 offen ; narrow
	ds_read_b128 v[8:11], v0
	ds_read_u16 v12, v0
	ds_read2_b32 v[8:9], v0 offset1:1
	s_barrier
	s_cbranch_scc0 .LBB0_1
; %bb.3:                                ;   in Loop: Header=BB0_2 Depth=1
	ds_write_b64 v0, v[2:3]
	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
	v_accvgpr_read_b32 v1, a1
	v_add_f32_e32 v1, v2, v3
	s_branch .LBB0_2
.LBB0_4:                                ; =>This Inner Loop Header: Depth=1
	v_add_f32_e32 v1, v2, v3
	s_cbranch_scc0 .LBB0_4
	.vgpr_count:     100
	.agpr_count:     4
	.vgpr_spill_count: 0
	.sgpr_spill_count: 0
	.private_segment_fixed_size: 0
"""


def test_the_hot_loop_is_the_one_with_matrix_instructions() -> None:
    assert len(loops(ASSEMBLY)) == 2
    found = amd_resources(ASSEMBLY, 20000, 4, "gfx942")
    assert (found.registers, found.accumulation_registers, found.waves) == (100, 4, 3)
    loop = found.loop
    assert loop is not None
    assert (loop.matrix, loop.vector, loop.accumulator_moves, loop.barriers) == (1, 1, 1, 1)
    assert (loop.wide_loads, loop.narrow_loads) == (1, 1)
    assert (loop.lds_reads, loop.narrow_lds_reads, loop.lds_writes) == (3, 1, 1)
    assert loop.narrow_stores == 0, "the exit is no part of the loop"


def test_of_equal_loops_the_one_without_a_mask_counts() -> None:
    twice = ASSEMBLY.replace("	v_add_f32_e32 v1, v2, v3\n	s_cbranch_scc0 .LBB0_4",
                             "	v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]\n"
                             "	v_cmp_gt_i32_e64 s[0:1], v2, v3\n" + 2 * "	v_cndmask_b32 v1, v2\n"
                             + "	s_cbranch_scc0 .LBB0_4")  # fmt: skip
    masked = [loop for loop in loops(twice) if "v_cndmask" in "".join(loop)]
    assert len(masked) == 1 and not any("v_cndmask" in line for line in hot_loop(twice))


SHARES = {
    "attention/128": {
        "attention_forward": 0.54,
        "attention_backward_queries": 0.61,
        "attention_backward_keys": 0.67,
    },
    "linear_cross_entropy/262272": {
        "loss_scores": 0.70,
        "loss_grad_hidden": 0.70,
        "loss_grad_weight": 0.68,
    },
}
"""Of the matrix pipe on gfx942: what the best probes reached before any of these kernels was
written."""

WEIGHT_PRODUCTS = ("grouped_mlp_grad_gate_up", "grouped_mlp_grad_down")

PROBE_GFX950 = 0.526
"""Of a 128x128x64 product on gfx950, whose pipe multiplies twice as fast: 32 products of 4 cycles
in the 243.3 that llvm-mca gives the probe."""


def shares(case: str, arch: str) -> dict[str, float]:
    return {
        row["kernel"]: row["score"]["matrix_share"]
        for row in golden()
        if (row["case"], row["arch"]) == (case, arch)
    }


@pytest.mark.parametrize("case", SHARES)
def test_static_matrix_share(case: str) -> None:
    found = shares(case, "gfx942")
    low = {name: found[name] for name, least in SHARES[case].items() if found[name] < least}
    assert low == {}


def test_static_matrix_share_of_gfx950() -> None:
    case = "linear_cross_entropy/262272"
    found = shares(case, "gfx950")
    assert {name: found[name] for name in SHARES[case] if found[name] < PROBE_GFX950} == {}


def test_every_experts_product_keeps_its_share() -> None:
    """On gfx942 and gfx950, large and small tiles, bf16 and fp32; as `zaya kernels verify` asks of
    what it compiles."""
    rows = [
        row for row in golden() if row["case"].startswith("grouped_mlp/") and row["arch"] != "sm_90"
    ]
    products = [row for row in rows if row["kernel"] != "grouped_mlp_plan"]
    assert {row["arch"] for row in products} == {"gfx942", "gfx950"} and len(products) == 50
    for row in products:
        least = BUDGETS[row["kernel"]].matrix_share
        assert least == (0.68 if row["kernel"] in WEIGHT_PRODUCTS else 0.70)
        assert share_lost(row["kernel"], row["score"]["matrix_share"]) == [], row


def test_only_gfx942_is_told_how_to_pack() -> None:
    """Triton warns of kpack on gfx950."""
    packed = Config({}, kpack=2)
    assert packed.options("gfx942")["kpack"] == 2
    assert not {"kpack"} & {*packed.options("gfx950"), *packed.options("sm_90")}


def test_a_share_below_its_budget_is_reported() -> None:
    assert share_lost("grouped_mlp_down", 0.70) == share_lost("norm_residual_forward", 0.0) == []
    assert share_lost("grouped_mlp_down", 0.699) == ["matrix share 69.9%, at least 70%"]


@pytest.mark.parametrize(
    ("kernel", "least"), [("newton_schulz_symmetric", 0.70), ("newton_schulz_apply", 0.66)]
)
def test_static_matrix_share_of_newton_schulz(kernel: str, least: float) -> None:
    found = [
        row["score"]["matrix_share"]
        for row in golden()
        if row["case"].startswith("newton_schulz/2:1")
        and (row["kernel"], row["arch"]) == (kernel, "gfx942")
    ]
    assert found and min(found) >= least


@pytest.mark.parametrize(
    ("registers", "lds", "warps", "waves"),
    [(128, 0, 4, 4), (129, 0, 4, 3), (512, 0, 4, 1), (60, 0, 4, 8), (60, 40000, 4, 1),
     (128, 0, 8, 4), (168, 0, 8, 2)],
)  # fmt: skip
def test_waves_come_in_whole_workgroups(registers: int, lds: int, warps: int, waves: int) -> None:
    assert waves_per_simd(registers, lds, warps, "gfx942") == waves


def test_nvidia_usage_is_read() -> None:
    text = " Function f:\n  REG:224 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:656"
    found = nvidia_resources(text, 8192, 8)
    assert (found.registers, found.scratch_bytes, found.waves) == (224, 24, 8)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"vector_spills": 1}, "1 vector spills, at most 0"),
        ({"scratch_bytes": 4}, "4 scratch bytes, at most 0"),
        ({"scalar_spills": 999}, "999 scalar spills, at most"),
        ({"lds_bytes": 65537}, "65537 LDS bytes, at most 65536"),
        ({"waves": 0}, "0 waves per SIMD, at least 2"),
        ({"matrix": 0}, "no matrix instruction"),
        ({"narrow_loads": 99}, "99 narrow loads, at most 0"),
        ({"narrow_lds_reads": 99}, "99 narrow LDS reads, at most"),
        ({"scratch": 1}, "1 scratch accesses, at most 0"),
    ],
    ids=str,
)
def test_each_broken_budget_is_named(change: dict[str, Any], complaint: str) -> None:
    sound = amd_resources(ASSEMBLY, 20000, 4, "gfx942")
    assert sound.loop is not None
    sound = replace(sound, loop=replace(sound.loop, narrow_loads=0))
    assert broken("", "cca_forward", "gfx942", sound) == []
    (name,) = change
    if hasattr(sound, name):
        worse = replace(sound, **change)
    else:
        assert sound.loop is not None
        worse = replace(sound, loop=replace(sound.loop, **change))
    (found,) = broken("", "cca_forward", "gfx942", worse)
    assert complaint in found


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
@pytest.mark.parametrize("kernel", BUDGETS)
def test_one_narrow_access_more_breaks_every_budget(kernel: str, arch: str) -> None:
    """Loads below 16 bytes and LDS reads below 64 bits, in the shipped kernels' own hot loops."""
    rows = [row for row in golden() if (row["kernel"], row["arch"]) == (kernel, arch)]
    assert rows
    for row in rows:
        case = row["case"]
        budget = OF_CASES.get((case, kernel), BUDGETS[kernel])
        limits = {
            "narrow_loads": budget.narrow_loads,
            "narrow_lds_reads": budget.narrow_lds_reads.get(arch, 0),
        }
        found = resources_of(row)
        assert found.loop is not None and broken(case, kernel, arch, found) == []
        for name, limit in limits.items():
            worse = replace(found, loop=replace(found.loop, **{name: limit + 1}))
            (complaint,) = broken(case, kernel, arch, worse)
            assert complaint.endswith(f"at most {limit}")


def resources_of(row: dict[str, Any]) -> Resources:
    loop = row["resources"]["loop"]
    return Resources(**{**row["resources"], "loop": LoopCounts(**loop) if loop else None})


@pytest.mark.parametrize(
    ("arch", "change", "complaint"),
    [
        ("gfx942", {"lds_bytes": 65536 + 1}, "65537 LDS bytes, at most 65536"),
        ("gfx950", {"lds_bytes": 163840 + 1}, "163841 LDS bytes, at most 163840"),
        ("sm_90", {"lds_bytes": 232448 + 1}, "232449 LDS bytes, at most 232448"),
        ("sm_90", {"scratch_bytes": 9999}, "9999 stack bytes, at most"),
        ("gfx942", {"waves": 0}, "0 waves per SIMD, at least"),
        ("gfx950", {"waves": 0}, "0 waves per SIMD, at least"),
    ],
    ids=str,
)
def test_every_kernel_is_bounded_on_every_architecture(
    arch: str, change: dict[str, Any], complaint: str
) -> None:
    for row in golden():
        if row["arch"] == arch:
            worse = replace(resources_of(row), **change)
            (found,) = broken(row["case"], row["kernel"], arch, worse)
            assert found.startswith(complaint), row["kernel"]


def test_every_product_needs_the_matrix_unit() -> None:
    """Every kernel with a product says so in its budget, and without one breaks it."""
    for row in golden():
        found = resources_of(row)
        if found.loop is not None and found.loop.matrix:
            worse = replace(found, loop=replace(found.loop, matrix=0))
            (complaint,) = broken(row["case"], row["kernel"], row["arch"], worse)
            assert complaint == "no matrix instruction in the hot loop"


def golden() -> list[dict[str, Any]]:
    return table.read_golden(table.golden_path("3.7.1"))


def test_a_change_against_the_golden_file_is_named() -> None:
    rows = golden()
    assert changes(rows, rows) == []
    heavier, slower, idler, renamed = (copy.deepcopy(rows) for _ in range(4))
    heavier[0]["resources"]["registers"] += 1
    assert "resources differ" in changes(heavier, rows)[0]
    at = next(i for i, row in enumerate(rows) if row["score"])
    slower[at]["score"]["clocks"] = int(rows[at]["score"]["clocks"] * 1.06)
    assert "static clocks" in changes(slower, rows)[0]
    at = next(i for i, row in enumerate(rows) if row["score"] and row["score"]["matrix_share"])
    idler[at]["score"]["matrix_share"] *= 0.94
    assert "matrix share" in changes(idler, rows)[0]
    renamed[0]["kernel"] = "another"
    assert "not in the golden file" in changes(renamed, rows)[0]


def test_the_page_shows_the_golden_file() -> None:
    page = (REPOSITORY / "docs" / "kernels.md").read_text(encoding="utf-8")
    assert table.replace_table(page, table.markdown(golden())) == page


def test_every_shipped_kernel_is_in_the_golden_file_with_a_budget() -> None:
    rows = golden()
    assert {row["kernel"] for row in rows} == set(BUDGETS)
    assert {kernel for _, kernel in OF_CASES} <= set(BUDGETS)
    pytest.importorskip("triton", reason="the extra `triton` is not installed")
    from zaya_kernels.workshop.registry import launches

    for arch in ARCHITECTURES:
        expected = [(case, launch.name) for case, launch in launches(arch)]
        assert [(r["case"], r["kernel"]) for r in rows if r["arch"] == arch] == expected
    assert all(row["score"] for row in rows if row["arch"] != "sm_90")


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="one begin mark"):
        table.replace_table("text", "table")


@pytest.fixture(scope="module")
def verified() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """`zaya kernels verify` for each architecture, started together."""
    pytest.importorskip("triton", reason="the extra `triton` is not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "zaya_train", "kernels", "verify", "--no-numerics", "--arch"]
    running = {
        arch: subprocess.Popen(
            [*command, arch], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for arch in ARCHITECTURES
    }  # fmt: skip
    yield running
    for process in running.values():
        process.wait()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_shipped_kernels_keep_their_budgets(
    arch: str, verified: dict[str, subprocess.Popen[str]]
) -> None:
    """Compiled for real; equal to the golden file, so the table of the page is true."""
    if triton_version() != "3.7.1":
        pytest.skip("the golden file is Triton 3.7.1's")
    output, _ = verified[arch].communicate()
    assert verified[arch].returncode == 0, output
    assert "0 problems" in output and arch in output


def test_static_scores_are_reproduced() -> None:
    tool = find_mca()
    if tool is None:
        pytest.skip("needs llvm-mca of LLVM 22: llvm-mca-22 on the path or $LLVM_MCA")
    found = score(hot_loop(ASSEMBLY), "gfx942", tool)
    assert 0 < found.matrix_share < 1 and found.clocks > 16
    # Of fp32 numbers a product of the same size takes twice the cycles for a quarter of the steps.
    places = (f"a[{at}:{at + 3}]" for at in range(0, 32, 4))
    fp32 = [f"\tv_mfma_f32_16x16x4_f32 {place}, v0, v1, {place}" for place in places]
    busy = score(fp32, "gfx942", tool)
    assert busy.matrix_share > 0.9 and busy.clocks == pytest.approx(8 * 32, rel=0.05)


def test_cycles_of_the_matrix_pipe_are_read() -> None:
    report = """Resources:
[0]   - HWBranch
[1]   - HWVALU
[2]   - HWXDL


Resource pressure per iteration:
[0]    [1]    [2]
 -     3.00   16.00

Resource pressure by instruction:
"""
    assert _matrix_cycles(report) == 16.0
    assert _matrix_cycles(report.replace("16.00", "-    ")) == 0.0
    with pytest.raises(RuntimeError, match="no pressure on the matrix pipe"):
        _matrix_cycles(report.replace("HWXDL", "HWMMA"))
