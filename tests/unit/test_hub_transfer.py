"""`zaya export-hf` around a real checkpoint: which tokenizer goes along, and where to."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from rich.console import Console

from zaya_train.config.errors import CheckpointError
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.hub import from_hf
from zaya_train.run import CHECKPOINTS, TOKENIZER
from zaya_train.tools.transfer import ExportRequest, Verification, export_hf

from ..helpers.models import TINY, random_model
from ..helpers.saved_run import save_run

if TYPE_CHECKING:
    from pathlib import Path

MODEL = replace(TINY, num_layers=1, vocab_size=264)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint and its tokenizer."""
    return save_run(tmp_path_factory.mktemp("saved") / "run", random_model(MODEL))


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """A copy of the run to do with as a test likes."""
    return shutil.copytree(saved, tmp_path / "here" / "run")


def export(source: Path, output: Path, tokenizer: Path | None = None) -> str:
    """Export and give back what was printed, as one line."""
    console = Console(file=io.StringIO(), record=True)
    small = Verification(tokens=32)
    export_hf(ExportRequest(source, output, tokenizer=tokenizer, verify=small), console)
    return " ".join(console.export_text().split())


def test_the_tokenizer_of_the_run_goes_along(run: Path, tmp_path: Path) -> None:
    printed = export(run, tmp_path / "out")
    assert "exported step 1" in printed and "no tokenizer" not in printed
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert torch.equal(from_hf(tmp_path / "out").embedding, random_model(MODEL).embedding)


def test_without_a_tokenizer_there_is_a_note(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / TOKENIZER)
    printed = export(run, tmp_path / "out")
    assert "note: no tokenizer exported" in printed
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_named_tokenizer_takes_the_place_of_the_run_s(run: Path, tmp_path: Path) -> None:
    given = shutil.copytree(run / TOKENIZER, tmp_path / "given")
    (given / "marker.txt").write_text("this one")
    assert "no tokenizer" not in export(run, tmp_path / "first", given)
    shutil.rmtree(run / TOKENIZER)
    assert "no tokenizer" not in export(run, tmp_path / "second", given)
    for name in ("first", "second"):
        assert (tmp_path / name / "tokenizer.json").is_file()
        assert (tmp_path / name / "marker.txt").is_file()


@pytest.mark.parametrize("absent", ["tokenizer.json", "tokenizer_config.json"])
def test_a_folder_that_is_no_tokenizer_is_refused(run: Path, tmp_path: Path, absent: str) -> None:
    given = shutil.copytree(run / TOKENIZER, tmp_path / "given")
    (given / absent).unlink()
    with pytest.raises(CheckpointError, match=f"given: no {absent}"):
        export(run, tmp_path / "out", given)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_ids_the_model_lacks_is_refused(run: Path, tmp_path: Path) -> None:
    larger = load_tokenizer("bytes")
    larger.backend.add_special_tokens(["<|extra|>"])
    larger.save(tmp_path / "larger")
    with pytest.raises(CheckpointError, match=r"larger: .* 265 ids .* the model only 264"):
        export(run, tmp_path / "out", tmp_path / "larger")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["run", f"run/{CHECKPOINTS}/step-00000001"])
@pytest.mark.parametrize(
    "output",
    [
        "run",
        "run/hf",
        f"run/{CHECKPOINTS}",
        f"run/{CHECKPOINTS}/step-00000001",
        ".",
        "run/../run/x",
    ],
)
def test_an_export_never_touches_what_it_is_made_from(run: Path, source: str, output: str) -> None:
    root = run.parent
    before = sorted(root.rglob("*"))
    with pytest.raises(CheckpointError, match="at, into or around the directory it is made from"):
        export(root / source, root / output)
    assert sorted(root.rglob("*")) == before


def test_a_link_into_the_run_is_seen_through(run: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(run)
    with pytest.raises(CheckpointError, match="into or around"):
        export(run, tmp_path / "link" / "hf")


def test_a_checkpoint_on_its_own_is_exported_beside_it(run: Path, tmp_path: Path) -> None:
    alone = shutil.copytree(run / CHECKPOINTS / "step-00000001", tmp_path / "step-00000001")
    assert "note: no tokenizer exported" in export(alone, tmp_path / "out")
    with pytest.raises(CheckpointError, match="into or around"):
        export(alone, alone / "hf")
