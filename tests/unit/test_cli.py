"""Every `zaya` command once, from data to sampled answers, through `main`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.helpers.tiny import tiny
from zaya_train.hub.convert import Form, from_hf, to_hf
from zaya_train.main import main
from zaya_train.model.init import initialise
from zaya_train.model.zaya import ZayaModel
from zaya_train.train.metrics import MetricsWriter

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """problems.jsonl, a corpus of it with a held-out part, and an untrained exported model."""
    root = tmp_path_factory.mktemp("cli")
    problems, corpus = root / "problems.jsonl", root / "corpus"
    assert main(["data", "synth", "--output", str(problems), "--count", "30"]) == 0
    prepare = ["data", "prepare", "--input", str(problems), "--output", str(corpus)]
    assert main([*prepare, "--heldout-fraction", "0.2"]) == 0
    model = ZayaModel(tiny().model)
    initialise(model, seed=0)
    to_hf(model, root / "model", Form(tokenizer=corpus / "train" / "tokenizer"))
    return root


def test_data_commands_leave_corpora(folder: Path) -> None:
    assert len((folder / "problems.jsonl").read_text().splitlines()) == 30
    for part in ("train", "heldout"):
        assert (folder / "corpus" / part / "manifest.json").is_file()


def test_inspect_shows_a_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "inspect", str(folder / "corpus" / "train"), "--index", "1", "--budget", "40"]
    assert main(words) == 0
    assert "documents" in capsys.readouterr().out


def test_inspect_verifies_every_byte_when_asked(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(folder / "corpus" / "train", corpus)
    words = ["data", "inspect", str(corpus)]
    assert main([*words, "--verify"]) == 0
    sections = bytearray((corpus / "sections.bin").read_bytes())
    sections[-1] ^= 1
    (corpus / "sections.bin").write_bytes(sections)
    capsys.readouterr()
    assert main([*words, "--verify"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "sections.bin: content differs from the sha256" in line


def test_generate_answers_every_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", str(folder / "model"), "2+2?", "3+3?", "--max-new-tokens", "4"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "2+2?" in out
    assert "3+3?" in out


def test_evaluate_writes_a_report(folder: Path) -> None:
    rows, output = folder / "corpus" / "heldout.jsonl", folder / "evaluation.json"
    few = folder / "few.jsonl"
    few.write_text("".join(line + "\n" for line in rows.read_text().splitlines()[:2]))
    words = ["evaluate", str(folder / "model"), str(few), "--count", "1", "--output", str(output)]
    assert main(words) == 0
    report = json.loads(output.read_text())
    assert report["total"] == 1


def test_import_checks_a_folder_and_writes_its_configuration(folder: Path) -> None:
    yaml = folder / "models" / "imported.yaml"
    assert main(["import-hf", str(folder / "model"), "--model-yaml", str(yaml)]) == 0
    assert "vocab_size: 264" in yaml.read_text()
    again = folder / "again"
    tokenizer = folder / "corpus" / "train" / "tokenizer"
    to_hf(from_hf(folder / "model"), again, Form(tokenizer=tokenizer))
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (folder / "model" / name).read_bytes(), name


def test_plan_previews_phases_memory_and_edges(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=zaya1_8b", "--ranks", "1024"]) == 0
    out = capsys.readouterr().out
    assert "8,840,488,784 parameters" in out
    for phase in ("pretrain_1", "pretrain_2", "midtrain", "sft"):
        assert phase in out
    assert "midtrain -> sft" in out
    # Ten heads in each of 40 layers.
    assert "400 matrices  layers.*.attention.conv_grouped  (convolution, one matrix [d, d" in out
    assert "2,040 matrices, 444.5 TFLOP; per rank 0.434 on average, 0.5154 at most" in out


def test_plan_tells_the_host_memory_of_background_saves(
    capsys: pytest.CaptureFixture[str],
) -> None:
    gigabytes = []
    for asynchronous in ("true", "false"):
        override = f"checkpoint.asynchronous={asynchronous}"
        assert main(["plan", "recipe=zaya1_8b", override, "--ranks", "8"]) == 0
        out = capsys.readouterr().out
        words = " ".join(out.split())
        gigabytes.append(float(words.split("copies while one is written: ")[1].split(" GB")[0]))
    # Fp32 weights and momentum of 8.84e9 parameters, and one moment more of the embedding.
    embedding = 262_272 * 2048
    expected = (2 * 8_840_488_784 + embedding) * 4 / 8 / 1e9
    # Rank 0's shards are whole rows.
    assert gigabytes == [pytest.approx(expected, rel=2e-3), 0.0]


def test_plan_names_every_broken_rule(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "recipe=zaya1_8b", "run.seed=-1", "checkpoint.keep_last=1", "--ranks", "24"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for key in ("run.seed: -1", "checkpoint.keep_last: 1", "global_batch_tokens: 16777216"):
        assert key in line


def write_metrics(run_dir: Path) -> None:
    """The record of a run of two steps."""
    with MetricsWriter(run_dir, enabled=True) as metrics:
        metrics.write("start", step=0, world_size=1, device="cpu", config_hash="x")
        metrics.write("phase", name="short", event="begin", step=0)
        for step in (1, 2):
            metrics.write(
                "step",
                step=step,
                phase="short",
                phase_step=step,
                tokens=64 * step,
                loss=5.0 / step,
                grad_norm=1.0,
                muon_lr=0.1,
                adamw_lr=0.1,
                supervised_tokens=60,
                step_seconds=0.1,
                data_seconds=0.0,
                tokens_per_second=640.0,
                applied=True,
                load=[[0.5, 0.25, 0.25, 0.0]],
                load_entropy=0.9,
                skip_rate=0.0,
                max_violation=0.5,
                memory_bytes=1,
            )


def test_report_is_one_page(folder: Path) -> None:
    run_dir = folder / "run"
    write_metrics(run_dir)
    assert main(["report", str(run_dir)]) == 0
    assert "<html" in (run_dir / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["export-hf", "nowhere", "--output", "out"], 3),
        (["import-hf", "nowhere", "--model-yaml", "m.yaml"], 3),
        (["generate", "nowhere", "hello"], 3),
        (["data", "inspect", "nowhere"], 2),
        (["data", "prepare", "--input", "nowhere.jsonl", "--output", "out"], 2),
        (["report", "nowhere"], 2),
        (["watch", "nowhere", "--once"], 2),
        (["checkpoint", "ls", "nowhere"], 3),
        (["checkpoint", "verify", "nowhere"], 3),
        (["checkpoint", "diff", "nowhere", "nowhere"], 3),
    ],
)
def test_what_is_not_there_is_told_in_one_line(
    words: list[str],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "nowhere" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["smoke", "--output", "file"], "file"),
        (["report", "run", "--output", "file/report.html"], "file"),
        (["data", "synth", "--count", "1", "--output", "file/x.jsonl"], "file/x.jsonl"),
        (["data", "prepare", "--input", "in.jsonl", "--output", "file/out"], "file/out"),
        (["data", "inspect", "x" * 300], "x" * 300),
        (["train", "recipe=smoke_cpu", "run.dir=file/run"], "file/run"),
    ],
)
def test_a_file_system_that_refuses_is_told_in_one_line(
    folder: Path,
    words: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "in.jsonl").write_text('{"text": "a document"}\n')
    write_metrics(tmp_path / "run")
    if words[0] == "train":
        corpus = folder / "corpus" / "train"
        words = [*words, f"data.sources.reasoning.path={corpus}", "logging.wandb=disabled"]
        words += [f"data.sources.text.path={corpus}", f"data.validation.reasoning.path={corpus}"]
    assert main(words) == 4
    line = capsys.readouterr().err.splitlines()[-1]
    assert (line.startswith(f"error: {named}") and "file" in line) or "name too long" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_an_error_that_names_no_file_is_a_bug_and_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise ConnectionResetError("peer is gone")

    monkeypatch.setattr("zaya_train.tools.report.report", broken)
    with pytest.raises(ConnectionResetError):
        main(["report", "run"])


def test_help_shows_defaults_only_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["data", "prepare"], ["data", "synth"], ["export-hf"], ["smoke"], ["generate"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in shown and "(default: False)" not in shown
    assert "(default: bytes)" in shown and "(default: 0.0)" in shown


@pytest.mark.parametrize(
    "words", [["nonsense"], [], ["data"], ["generate"], ["plan", "--rank", "2"]]
)
def test_wrong_usage_exits_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: zaya" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for command in ("train", "data", "import-hf", "export-hf", "generate", "plan", "report"):
        # On one line with what it does.
        assert re.search(rf"^    {command} +\w", out, re.MULTILINE), command


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exprot-hf"], "COMMAND: 'exprot-hf'; did you mean export-hf? (known: train, data, "),
        (["data", "prepar"], "COMMAND: 'prepar'; did you mean prepare? (known: prepare, trim, "),
        (["checkpoint", "zzz"], "COMMAND: 'zzz' (known: ls, verify, diff)"),
        (["export-hf", "x", "--output", "y", "--layout", "natve"], "'natve'; did you mean native?"),
    ],
)
def test_an_unknown_command_is_told_from_what_there_is(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_folder_without_a_model_is_refused_before_transformers_is_loaded(
    command: str, folder: Path, tmp_path: Path
) -> None:
    program = (
        "import sys; from zaya_train.main import main; code = main(sys.argv[1:]); "
        "sys.exit(10 * code + ('transformers' in sys.modules or 'torch' in sys.modules))"
    )
    rows = folder / "corpus" / "heldout.jsonl"
    for place in (tmp_path / "none", folder / "corpus"):
        words = [sys.executable, "-c", program, command, str(place), str(rows)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 30, done.stderr
        assert f"{place}: no config.json, not a model folder" in done.stderr


def test_a_legacy_folder_is_refused_by_what_transformers_would_misread(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    form = Form(layout="legacy", tokenizer=folder / "corpus" / "train" / "tokenizer")
    to_hf(from_hf(folder / "model"), tmp_path / "legacy", form)
    assert main(["generate", str(tmp_path / "legacy"), "2+2?"]) == 3
    assert "in the legacy layout, which transformers does not read" in capsys.readouterr().err


def test_import_reads_either_layout(
    tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    to_hf(from_hf(folder / "model"), tmp_path / "legacy", Form(layout="legacy"))
    for place, layout, skip in (
        (folder / "model", "native", "zero"),
        (tmp_path / "legacy", "legacy", "identity"),
    ):
        yaml = tmp_path / f"{layout}.yaml"
        assert main(["import-hf", str(place), "--model-yaml", str(yaml)]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"{layout} layout, all " in out and "tensors accounted for as " in out
        assert f"skip_output: {skip}" in yaml.read_text()
