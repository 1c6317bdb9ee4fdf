"""Peaks of devices, and the share of them that a step takes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.models import CPU, TINY
from zaya_train.config.precision import PrecisionConfig
from zaya_train.model.flops import Work, forward_flops, train_flops
from zaya_train.runtime.peaks import TABLE, DeviceRow, Peaks, peak_flops, peaks_of, product_rate
from zaya_train.train.step import StepResult
from zaya_train.train.throughput import Throughput

PER_CLOCK = {
    "MI300X": (2048, 256),
    "MI325X": (2048, 256),
    "MI350X": (4096, 256),
    "MI355X": (4096, 256),
    "A100": (2048, 128),
}
"""bf16 and fp32 operations per unit and clock (AMD CDNA 3 and CDNA 4, NVIDIA A100 white papers)."""


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_data_sheets_agree_with_units_clocks_and_operations_per_clock(row: DeviceRow) -> None:
    """A second way to every figure: a transposed digit shows."""
    # Eight bits at twice sixteen's rate, where there are such products at all.
    fp8 = None if row.name == "A100" else pytest.approx(2 * row.bf16_teraflops, rel=1e-4)
    assert row.fp8_teraflops == fp8
    bf16, fp32 = PER_CLOCK.get(row.name, (4096, 256))
    assert row.units * row.clock_mhz * bf16 / 1e6 == pytest.approx(row.bf16_teraflops, rel=1e-3)
    if row.name in PER_CLOCK:
        assert row.units * row.clock_mhz * fp32 / 1e6 == pytest.approx(row.fp32_teraflops, rel=1e-3)
    else:
        # NVIDIA states fp32 at the highest boost clock, tensor cores at a lower one.
        clocks = row.fp32_teraflops * 1e6 / row.units / fp32
        assert row.clock_mhz <= clocks <= 1.1 * row.clock_mhz


@pytest.mark.parametrize(
    ("name", "units", "bf16"),
    [
        ("AMD Instinct MI300X", 304, 1307.4),
        ("AMD Instinct MI300X OAM", None, 1307.4),
        ("AMD Instinct MI325X", 304, 1307.4),
        ("AMD Instinct MI350X", 256, 2306.9),
        ("AMD Instinct MI355X", 256, 2516.6),
        ("NVIDIA A100-SXM4-80GB", 108, 311.9),
        ("NVIDIA H100 80GB HBM3", 132, 989.4),
        ("NVIDIA H100 PCIe", 114, 756.4),
        ("NVIDIA H200", 132, 989.4),
        # A partition, neighbours in the makers' lists, and none at all.
        ("AMD Instinct MI300X", 38, None),
        ("AMD Instinct MI300A", 228, None),
        ("AMD Instinct MI308X", 80, None),
        ("NVIDIA H100 NVL", 132, None),
        ("NVIDIA H200 NVL", 132, None),
        ("NVIDIA GH200 480GB", 132, None),
        ("AMD EPYC 9654", None, None),
    ],
)
def test_devices_are_known_by_name_and_units(
    name: str, units: int | None, bf16: float | None
) -> None:
    found = peak_flops(name, "bf16", units)
    assert found == (None if bf16 is None else pytest.approx(bf16 * 1e12))
    if bf16:
        fp32 = peak_flops(name, "fp32", units)
        assert fp32 is not None and fp32 < bf16 * 1e12


def test_a_cpu_is_measured_and_its_lack_of_a_data_sheet_said() -> None:
    torch.set_num_threads(1)
    peaks = peaks_of(CPU, PrecisionConfig(compute_dtype="fp32"))
    assert peaks.data_sheet is None
    assert peaks.measured > 1e8
    assert f"no data sheet peak known for {peaks.name}, so no MFU by it" in str(peaks)
    assert product_rate(CPU, torch.float64, 1) > 1e7
    known = Peaks("AMD Instinct MI300X", 1307.4e12, "its data sheet", 6e14)
    assert str(known) == "a plain product reaches 600 TFLOP/s of 1,307.4 (its data sheet)"


def result(load: list[list[float]]) -> StepResult:
    return StepResult(
        loss=1.0,
        grad_norm=1.0,
        supervised=7,
        load=torch.tensor(load, dtype=torch.float64),
        applied=True,
        stop_signal=0,
        pairs=50,
    )


def test_a_steps_share_counts_what_it_did_over_all_ranks() -> None:
    """Four experts and the skip class, three layers, 12 tokens, of which 2, 0 and 3 skip."""
    load = [[4.0, 3.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0, 0.0], [9.0, 0.0, 0.0, 0.0, 3.0]]
    flops = train_flops(TINY, Work(tokens=12, expert_tokens=31, pairs=50, supervised=7))
    rates = Peaks("x", 1e9, "", 5e8)
    row = Throughput(TINY, 2, rates).of(result(load), 0.5)
    assert row["flops"] == flops
    assert row["mfu"] == pytest.approx(flops / 0.5 / 2 / 1e9)
    assert row["mfu_measured"] == pytest.approx(2 * row["mfu"])
    unknown = Throughput(TINY, 2, Peaks("x", None, "", 5e8)).of(result(load), 0.5)
    assert unknown == {k: v for k, v in row.items() if k != "mfu"}
    assert Throughput(TINY, 2, rates).of(result([[0.0] * 5] * 3), 0.5) == {}


def test_experts_in_fp8_count_against_the_peak_of_fp8() -> None:
    """Their share of the work, not all of it; without such a peak there is no MFU."""
    load = [[4.0, 3.0, 2.0, 1.0, 2.0], [3.0, 3.0, 3.0, 3.0, 0.0], [9.0, 0.0, 0.0, 0.0, 3.0]]
    work = Work(tokens=12, expert_tokens=31, pairs=50, supervised=7)
    flops, experts = train_flops(TINY, work), 3 * forward_flops(TINY, work).experts
    rates = Peaks("x", 1e9, "sheet", 5e8, experts=2e9, fp8_experts=True)
    row = Throughput(TINY, 2, rates).of(result(load), 0.5)
    assert row["mfu"] == pytest.approx((flops - experts / 2) / 0.5 / 2 / 1e9)
    assert row["flops"] == flops
    assert str(rates).endswith("of 0.0, experts in fp8 of 0.0 (sheet)")
    for unknown in (Peaks("x", 1e9, "", 5e8, fp8_experts=True), Peaks("x", None, "", 5e8)):
        assert "mfu" not in Throughput(TINY, 2, unknown).of(result(load), 0.5)


def test_peaks_know_the_precision_of_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zaya_train.runtime.peaks.product_rate", lambda *_: 1e9)
    monkeypatch.setattr("zaya_train.runtime.peaks.row_of", lambda *_: TABLE[0])
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=304)
    )
    facts = SimpleNamespace(name="AMD Instinct MI300X")
    monkeypatch.setattr("zaya_train.runtime.peaks.describe", lambda _: facts)
    device = torch.device("cuda", 0)
    plain = peaks_of(device, PrecisionConfig())
    assert (plain.data_sheet, plain.experts, plain.fp8_experts) == (1307.4e12, None, False)
    fp8 = peaks_of(device, PrecisionConfig(expert_dtype="fp8"))
    assert (fp8.data_sheet, fp8.experts, fp8.fp8_experts) == (1307.4e12, 2614.9e12, True)
