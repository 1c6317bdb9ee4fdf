"""What the smoke run prints, and what it leaves alone."""

from __future__ import annotations

import errno
import io
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console
from zaya_kernels.native import library

from zaya_train.main import main
from zaya_train.tools.evaluate import EvalSample
from zaya_train.tools.launch import Launch
from zaya_train.tools.smoke import _point_to, _room, _sample_line, smoke_kernels

if TYPE_CHECKING:
    from pathlib import Path


def sample(reply: str) -> EvalSample:
    return EvalSample(
        id="0",
        family="add",
        prompt="A a1+A2",
        reply=reply,
        answer="4",
        expected="03",
        correct=False,
        finished=True,
    )


def test_a_sample_shows_the_expected_answer_beside_the_reply() -> None:
    assert _sample_line(sample("<think></think>4")) == (
        "  A a1+A2  ->  <think></think>4  (expected 03)"
    )


def test_a_long_reply_is_shortened() -> None:
    line = _sample_line(sample("that " * 500))
    assert len(line) < 300
    assert "that that ..." in line
    assert line.endswith("(expected 03)")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "./nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--data", "{here}", "--tokenizer", "./none.json"], "none.json': no such file"),
    ],
)
def test_a_misspelt_dataset_does_not_cost_the_earlier_run(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    earlier = tmp_path / "smoke" / "report.html"
    earlier.parent.mkdir()
    earlier.touch()
    (earlier.parent / ".zaya-smoke").touch()
    words = [word.format(here=data) for word in words]
    assert main(["smoke", "--output", str(earlier.parent), *words]) == 2
    assert said in capsys.readouterr().err and earlier.exists()


def test_a_run_at_work_is_not_removed_by_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "run" / "metrics.jsonl"
    with _room(tmp_path):
        made.parent.mkdir()
        made.touch()
        assert main(["smoke", "--output", str(tmp_path)]) == 2
        assert "another smoke run is at work here" in capsys.readouterr().err and made.exists()
    with _room(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".zaya-smoke"]


def test_a_file_system_without_locks_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier run's links are removed, not what they point to."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    elsewhere = tmp_path / "scratch"
    elsewhere.mkdir()
    out = tmp_path / "smoke"
    with _room(out):
        (out / "run").symlink_to(elsewhere)
    monkeypatch.setattr("fcntl.flock", refuse)
    with _room(out):
        assert [path.name for path in out.iterdir()] == [".zaya-smoke"] and elsewhere.is_dir()


def test_a_folder_of_somebody_elses_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert main(["smoke", "--output", str(tmp_path)]) == 2
    assert "is not an earlier smoke run" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_kernels_are_native_where_c_compiles_and_said_where_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    console = Console(record=True, width=300)
    assert smoke_kernels(console) == "native"
    library._load.cache_clear()
    monkeypatch.setenv("CC", "no-such-compiler")
    assert smoke_kernels(console) == "eager"
    said = console.export_text()
    assert "kernels=native" in said and "no-such-compiler is not in PATH" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert smoke_kernels(console) == "eager"
    assert "kernels=eager: native computes on a CPU" in console.export_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_without_a_progress_bar_the_log_is_named(terminal: bool, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    _point_to(Launch(tmp_path / "run", [], 2, tmp_path / "launch.log"), console)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert (f"zaya watch {tmp_path / 'run'}" in said and "launch.log" in said) != terminal
