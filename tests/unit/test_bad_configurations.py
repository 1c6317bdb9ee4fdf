"""Bad configurations: one line each, code 2, before torch's groups or any file."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch.distributed as dist

from tests.helpers.bad_configurations import BAD
from tests.helpers.tiny import tiny
from tests.integration.runs import ENVIRONMENT
from zaya_train.config.frozen import frozen
from zaya_train.config.schema import TrainConfig
from zaya_train.config.suggest import unknown_key, unknown_name
from zaya_train.main import main

if TYPE_CHECKING:
    from pathlib import Path


def test_there_are_sixty_at_least_and_no_two_alike() -> None:
    assert len({override for override, _ in BAD}) == len(BAD) >= 60


@pytest.mark.parametrize(("override", "fragments"), BAD, ids=[override for override, _ in BAD])
def test_a_bad_configuration_is_one_line(
    override: str,
    fragments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = [] if override.startswith("recipe=") else ["recipe=smoke_cpu"]
    assert main(["train", *recipe, override]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    for fragment in fragments:
        assert fragment in line
    assert list(tmp_path.iterdir()) == []
    assert not dist.is_initialized()


def test_without_a_recipe_the_recipes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "error: recipe: missing; recipe=NAME with one of smoke_cpu, zaya1_300m, zaya1_8b, "
        "zaya1_8b_1gpu"
    )


@pytest.mark.parametrize("command", ["plan", "supervise", "doctor"])
def test_commands_that_compose_say_the_same(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "recipe=smoke_cpu", "model.hiden_size=3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: model.hiden_size: unknown key; did you mean model.hidden_size?"


def test_one_rank_of_a_node_tells_what_all_find() -> None:
    told = []
    for rank in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "zaya_train", "train"]
            + ["recipe=smoke_cpu", "parallel.shard=3"],
            env={**ENVIRONMENT, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        lines = done.stderr.splitlines()
        assert not any(line.split("|")[-1].strip() == "torch" for line in lines)
        told.append([line for line in lines if not line.startswith("import time:")])
    assert told == [
        ["error: parallel.shard: 3 does not divide the 2 ranks of this launch"],
        [],
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "parallel.shard: 3 does not divide the 2 ranks of this launch"),
        (["run.seed=1"], "train --frozen FILE: takes one file, and nothing can be overridden"),
    ],
)
def test_one_rank_of_a_node_refuses_a_frozen_file(
    words: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "frozen.json"
    path.write_text(json.dumps(frozen(tiny({"parallel.shard": 3}))))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, lines in (("0", [f"error: {told}"]), ("1", [])):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(["train", "--frozen", str(path), *words]) == 2
        assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize("master", ["abc", "host:abc", ":29400", "host:0", "host:65536"])
def test_a_meeting_place_is_looked_at_on_one_node_too(
    master: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["supervise", "recipe=smoke_cpu", "--master", master]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: --master {master}: is not host:port with a port up to 65535"


def test_several_nodes_need_a_meeting_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["supervise", "recipe=smoke_cpu", "--nodes", "2"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: --master: 2 nodes need host:port of the first one"


def test_supervise_names_a_missing_corpus_before_a_rank_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, corpus = tmp_path / "run", tmp_path / "nowhere"
    overrides = [f"run.dir={run_dir}", f"data.sources.reasoning.path={corpus}"]
    assert main(["supervise", "recipe=smoke_cpu", *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {corpus}: not a corpus directory: ")
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("checkpoint.initial_weights=nowhere", "checkpoint.initial_weights: nowhere has no config"),
        ("checkpoint.branch_from=nowhere", "checkpoint.branch_from: nowhere has no MANIFEST.json"),
        ("run.dir=file/run", "file/run: cannot be made (run.dir): file is a file"),
    ],
)
def test_paths_are_looked_at_before_anything_else(
    word: str,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    assert main(["train", "recipe=smoke_cpu", word]) == (4 if "run.dir" in word else 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
    assert not dist.is_initialized()


def test_suggestions_by_hand() -> None:
    assert unknown_key(TrainConfig, "xyzzy").startswith("xyzzy: unknown key; `zaya train")
    assert "plan.phases.NAME.rope_base" in unknown_key(TrainConfig, "rope_base")
    assert unknown_key(TrainConfig, "run.dir") == "run.dir: unknown key"
    assert unknown_name("b", []) == " (known: none)"
