"""`zaya verify-export`: what it checks of a folder, and what it says first when that differs."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from zaya_train.hub import to_hf
from zaya_train.hub.accounting import content_sha256
from zaya_train.hub.convert import RECEIPT
from zaya_train.hub.names import LAYOUTS
from zaya_train.main import main
from zaya_train.run import CHECKPOINTS

from ..helpers.models import TINY, random_model
from ..helpers.saved_run import save_run

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from zaya_train.hub.names import Layout

torch.set_num_threads(1)
MODEL = replace(TINY, num_layers=2, vocab_size=264)
EXPERTS = "model.layers.1.mlp.experts.down_proj"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and its exports in both layouts, through the command line."""
    root = tmp_path_factory.mktemp("verify")
    save_run(root / "run", random_model(MODEL))
    for layout in LAYOUTS:
        words = ["export-hf", str(root / "run"), "--output", str(root / layout)]
        assert main([*words, "--layout", layout, "--verify-tokens", "48", "--dtype", "bf16"]) == 0
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of the native export to change."""
    return shutil.copytree(made / "native", tmp_path / "model")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_as_exported_passes(
    layout: Layout, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify-export", str(made / layout), "--against", str(made / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = len(json.loads((made / layout / RECEIPT).read_text("utf-8"))["files"])
    starts = [
        "tensors: all ",
        f"files: all {count} as recorded",
        "config.json: the recorded model, RoPE of phase short",
        "tokenizer and chat template: as recorded, and the same to transformers",
        "agreement: agrees with transformers on 48 tokens (random tokens, seed 0): logits to ",
        f"origin: all 67 tensors are those of {made / 'run'}",
    ]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text("utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def tamper(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def receipt(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit(folder / RECEIPT, change)


def flip(folder: Path) -> None:
    """One bit of one expert."""
    tamper(folder, lambda t: t[EXPERTS].view(torch.int16)[3, 2, 1].bitwise_xor_(1))


def below(folder: Path) -> None:
    (folder / "below").mkdir()
    (folder / "below" / RECEIPT).write_text("{}")


def first_entry(receipt: dict[str, Any]) -> dict[str, Any]:
    entry: dict[str, Any] = receipt["keys"]["tensors"][0]
    return entry


CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (flip, rf"tensor {EXPERTS}: sha256 \w+\.\.\., receipt: \w+"),
    "a type": (
        lambda f: tamper(f, lambda t: t.update({NORM: t[NORM].float()})),
        rf"tensor {NORM}: dtype float32, receipt: bfloat16",
    ),
    "a shape": (
        lambda f: tamper(f, lambda t: t.update({NORM: t[NORM][:-1].contiguous()})),
        rf"tensor {NORM}: shape \[31\], receipt: \[32\]",
    ),
    "a tensor less": (lambda f: tamper(f, lambda t: t.pop(NORM)), f"{NORM} is in the receipt"),
    "a tensor more": (
        lambda f: tamper(f, lambda t: t.update(extra=torch.ones(1))),
        "tensor extra is in the model.safetensors alone",
    ),
    "half a file": (
        lambda f: (f / "model.safetensors").write_bytes(b"12345678"),
        "model.safetensors: not a whole safetensors file",
    ),
    "a file less": (
        lambda f: (f / "generation_config.json").unlink(),
        r"file generation_config.json: none, receipt: \d+ bytes, sha256 \w+",
    ),
    "a file more": (lambda f: (f / "notes.txt").touch(), "file notes.txt: 0 bytes"),
    "the page": (lambda f: (f / "EXPORT.md").write_text("fine"), "file EXPORT.md: 4 bytes"),
    "the template": (
        lambda f: edit(f / "tokenizer_config.json", lambda c: c.update(chat_template="")),
        "file tokenizer_config.json: ",
    ),
    "the rotation": (
        lambda f: edit(
            f / "config.json", lambda c: c["rope_parameters"]["hybrid"].update(rope_theta=5e6)
        ),
        "file config.json: ",
    ),
    "another layout": (receipt(lambda r: r.update(layout="legacy")), "receipt: legacy"),
    "totals": (
        receipt(lambda r: r["keys"]["totals"].update(parameters=1)),
        r"totals parameters: \d+, receipt: 1",
    ),
    "a hash": (
        receipt(lambda r: first_entry(r)["theirs"][0].update(sha256="0" * 64)),
        r"tensor model.embed_tokens.weight: sha256 \w+\.\.\., receipt: 000000000000",
    ),
    "the recorded model": (
        receipt(lambda r: r["model"].update(norm_eps=1e-3)),
        "config.json: norm_eps 1e-05, receipt: 0.001",
    ),
    "the recorded rotation": (
        receipt(lambda r: r["rope"]["trained"].update(base=7.0)),
        r"config.json: RoPE base: 10000.0, receipt: 7.0",
    ),
    "the recorded tokenizer": (
        receipt(lambda r: r["tokenizer"].update(vocab_size=3)),
        "tokenizer vocab_size: 264, receipt: 3",
    ),
    "the recorded loss": (
        receipt(lambda r: r["agreement"]["fp32"]["loss"].update(theirs=1.0)),
        r"loss of theirs on the recorded tokens: \d+\.\d+, receipt: 1.000000",
    ),
    "other tokens": (
        receipt(lambda r: r["check"]["documents"][0].reverse()),
        "loss of ours on the recorded tokens",
    ),
    "no receipt": (lambda f: (f / RECEIPT).unlink(), f"no {RECEIPT}; `zaya export-hf` leaves one"),
    "half a receipt": (lambda f: (f / RECEIPT).write_text("{"), "not a receipt"),
    "a section less": (receipt(lambda r: r.pop("rope")), "section rope is missing or unknown"),
    "a section more": (receipt(lambda r: r.update(x=1)), "section x is missing or unknown"),
    "files unsaid": (receipt(lambda r: r.pop("files")), "section files is missing or unknown"),
    "a receipt below": (
        below,
        f"file below/{RECEIPT}: 2 bytes",
    ),
    "a later format": (receipt(lambda r: r.update(format=2)), "format 2, this version reads 1"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_first_thing_that_differs_is_named(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, said = CASES[name]
    change(folder)
    assert main(["verify-export", str(folder)]) == 3
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert re.search(said, line), line


def test_a_folder_that_is_not_there_is_a_mistake_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify-export", str(tmp_path / "none")]) == 2
    assert "none: no such folder" in capsys.readouterr().err


def test_a_folder_of_another_step_is_told_apart(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = random_model(MODEL)
    with torch.no_grad():
        other.norm.weight[0] += 1e-7
    save_run(tmp_path / "other", other)
    newest = tmp_path / "other" / CHECKPOINTS / "step-00000001"
    words = ["verify-export", str(folder), "--files-only", "--against", str(newest)]
    assert main(words) == 3
    error = capsys.readouterr().err
    assert f"{newest}: tensor norm.weight: sha256 " in error and "of step 1" in error


def test_files_alone_can_be_checked(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def computed(*_: object) -> None:
        raise AssertionError("a model was run")

    monkeypatch.setattr("zaya_train.tools.verify_export.check", computed)
    assert main(["verify-export", str(folder), "--files-only"]) == 0
    assert "agreement: not repeated (--files-only)" in capsys.readouterr().out


def test_what_was_not_compared_at_export_stays_so(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export-hf", str(made / "run"), "--output", str(tmp_path / "out"), "--no-verify"]
    assert main(words) == 0
    assert main(["verify-export", str(tmp_path / "out")]) == 0
    assert "agreement: not verified at export (--no-verify)" in capsys.readouterr().out


def test_a_folder_written_without_a_run_has_its_tensors_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to_hf(random_model(MODEL), tmp_path / "model")
    assert main(["verify-export", str(tmp_path / "model")]) == 0
    assert "written without a run" in capsys.readouterr().out
    tamper(tmp_path / "model", lambda t: t[NORM].mul_(2))
    assert main(["verify-export", str(tmp_path / "model")]) == 3


def test_disagreement_ends_with_its_own_code(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zaya_train.tools.export_agreement.LOGIT_TOLERANCE", 1e-9)
    words = ["export-hf", str(made / "run"), "--output", str(tmp_path / "out")]
    assert main([*words, "--verify-tokens", "48"]) == 5
    assert "transformers computes something else than our model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_hash_is_that_of_the_stored_bytes(folder: Path) -> None:
    """Anybody can repeat it from the file, without this project."""
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    start, end = json.loads(raw[8 : 8 + size])[NORM]["data_offsets"]
    stored = load_file(folder / "model.safetensors")[NORM]
    assert hashlib.sha256(raw[8 + size + start : 8 + size + end]).hexdigest() == content_sha256(
        stored
    )
