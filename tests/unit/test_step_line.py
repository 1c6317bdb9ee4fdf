"""The log's line of a step."""

from __future__ import annotations

from zaya_train.train.step_line import step_line

ROW = {
    "phase": "sft",
    "step": 12,
    "loss": 1.23456,
    "grad_norm": 0.5,
    "muon_lr": 0.0123,
    "tokens_per_second": 12_345.6,
    "memory_bytes": 84_049_000_000,
    "load_entropy": 0.99,
    "skip_rate": 0.0123,
}


def test_a_line_of_one_process() -> None:
    assert step_line(ROW, 1, 59.6) == (
        "sft step 12 | loss 1.2346 | grad 0.500 | lr 1.23e-02 | 12,346 tokens/s | 84.0 GB"
        " | load entropy 0.990 | skip 1.2e-02 | 0:01:00 left"
    )


def test_several_devices_and_a_known_peak() -> None:
    line = step_line({**ROW, "mfu": 0.4123}, 8, 0)
    assert "| 12,346 tokens/s (1,543 a device) | MFU 41.2% | 84.0 GB |" in line


def test_a_z_loss_stands_apart() -> None:
    assert "| loss 1.2346 + z 1.2e-02 | grad" in step_line({**ROW, "z_loss": 0.01234}, 1, 0)


def test_days_are_said() -> None:
    assert step_line(ROW, 1, 9e5).endswith(" | 10 days, 10:00:00 left")
