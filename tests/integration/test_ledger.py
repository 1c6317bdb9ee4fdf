"""One stream whatever reads it: ranks, prefetching, kills and resumes write the same ledger."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from tests.integration.runs import Launched, make_corpora, overrides_for, values_for, zaya
from zaya_train.data.ledger import LEDGER_FILE, StepEntry, read_ledger

if TYPE_CHECKING:
    from pathlib import Path

DATA = ["data.balance_rows=4"]
LAST_STEP = 13
PATIENCE_SECONDS = 1800.0
"""For a run of a few seconds, on a machine that others have loaded."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpora(tmp_path_factory.mktemp("corpora"))


def words(run_dir: Path, corpora: Path, prefetch: int = 1) -> list[str]:
    return [
        *overrides_for(values_for(run_dir, corpora)),
        *DATA,
        f"data.prefetch_batches={prefetch}",
    ]


@pytest.fixture(scope="module")
def alone(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run = Launched(words(folder / "run", corpora), folder)
    assert run.wait(PATIENCE_SECONDS) == [0], run.output()
    return folder / "run"


def test_every_step_stands_in_it_once(alone: Path) -> None:
    steps = [entry for entry in read_ledger(alone) if isinstance(entry, StepEntry)]
    assert [entry.step for entry in steps] == list(range(1, LAST_STEP + 1))
    assert [entry.rows for entry in steps] == [4] * 8 + [2] * 5
    assert len({entry.fingerprint for entry in steps}) == LAST_STEP


@pytest.mark.parametrize(
    ("ranks", "resumed_ranks", "prefetch"),
    [(1, 2, 2), (2, 1, 0), pytest.param(4, 2, 2, marks=pytest.mark.slow)],
)
def test_ranks_prefetching_and_a_kill_at_the_seventh_step_change_no_byte(
    alone: Path, corpora: Path, tmp_path: Path, ranks: int, resumed_ranks: int, prefetch: int
) -> None:
    run_dir = tmp_path / "run"
    Launched(words(run_dir, corpora, prefetch), tmp_path / "a", ranks).at_step(run_dir, 7).kill()
    run = Launched(words(run_dir, corpora, prefetch), tmp_path / "b", resumed_ranks)
    assert run.wait(PATIENCE_SECONDS) == [0] * resumed_ranks, run.output()
    assert (run_dir / LEDGER_FILE).read_bytes() == (alone / LEDGER_FILE).read_bytes()


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("first", range(1, 8))
def test_a_kill_at_every_seventh_step_changes_no_byte(
    alone: Path, corpora: Path, tmp_path: Path, ranks: int, prefetch: int, first: int
) -> None:
    """Killed after steps first, first + 7, ...: over all `first`, after every step there is."""
    run_dir = tmp_path / "run"
    for number, step in enumerate(range(first, LAST_STEP, 7)):
        run = Launched(words(run_dir, corpora, prefetch), tmp_path / str(number), ranks)
        run.at_step(run_dir, step).kill()
    run = Launched(words(run_dir, corpora, prefetch), tmp_path / "last", ranks)
    assert run.wait(PATIENCE_SECONDS) == [0] * ranks, run.output()
    assert (run_dir / LEDGER_FILE).read_bytes() == (alone / LEDGER_FILE).read_bytes()


def ask(log: Path, *command: str) -> tuple[int | None, str]:
    code = zaya(["data", "ledger", *command], log)
    return code, log.read_text(encoding="utf-8")


def test_verify_proves_the_run_and_show_prints_a_step(alone: Path, tmp_path: Path) -> None:
    code, text = ask(tmp_path / "log", "verify", str(alone))
    assert code == 0, text
    assert "13 steps, nothing twice, nothing lost; fingerprints of all rows equal" in text
    assert "100.000%" in text
    code, text = ask(tmp_path / "log", "show", str(alone), "--step", "9", "--rows", "1")
    assert code == 0, text
    assert "step 9, phase long: rows 0 to 1" in text and "1 more rows" in text
    assert "<|user|>" in text and "</think>" in text
    code, text = ask(tmp_path / "log", "show", str(alone), "--step", "14")
    assert code == 2 and "no step 14" in text


def copied(alone: Path, tmp_path: Path) -> tuple[Path, list[dict[str, object]]]:
    run_dir = tmp_path / "copy"
    run_dir.mkdir()
    (run_dir / "config.json").write_bytes((alone / "config.json").read_bytes())
    return run_dir, [json.loads(line) for line in (alone / LEDGER_FILE).read_text().splitlines()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop(4), "step 4 should begin at row 12"),
        (lambda rows: rows.insert(4, rows[4]), "goes on with step 4 at row 12"),
        (lambda rows: rows[3].update(fingerprint="0" * 16), "step 3: the ranks read rows of"),
        (lambda rows: rows[0]["stream"].update(seed=9), "seed was 9, is now 3"),
        (lambda rows: rows[0].update(name="other"), "phase other is not in"),
        (lambda rows: rows[5].pop("rows"), "ledger.jsonl:6: not a ledger entry"),
        (lambda rows: rows[2].update(rows=0), "step 2 should begin"),
    ],
)
def test_verify_names_what_is_wrong(
    alone: Path, tmp_path: Path, change: object, message: str
) -> None:
    run_dir, rows = copied(alone, tmp_path)
    change(rows)  # type: ignore[operator]
    (run_dir / LEDGER_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, text = ask(tmp_path / "log", "verify", str(run_dir))
    assert code == 2 and message in text, text


def test_a_resume_with_other_data_is_refused(corpora: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    Launched(words(run_dir, corpora), tmp_path / "a").at_step(run_dir, 5).kill()
    changed = [*words(run_dir, corpora)[:-2], "data.balance_rows=1", "data.prefetch_batches=1"]
    run = Launched(changed, tmp_path / "b")
    assert run.wait(PATIENCE_SECONDS) == [2], run.output()
    assert "other data" in run.output() and "data.balance_rows: 4 -> 1" in run.output()
    # As a version would that makes other plans of the same configuration.
    ledger = run_dir / LEDGER_FILE
    ledger.write_text(ledger.read_text().replace('"row_tokens":64', '"row_tokens":65', 1))
    run = Launched(words(run_dir, corpora), tmp_path / "c")
    assert run.wait(PATIENCE_SECONDS) == [2], run.output()
    assert "phase short would go on with other data: row_tokens: 65 -> 64" in run.output()
