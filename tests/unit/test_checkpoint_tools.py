"""`zaya checkpoint ls`, `verify` and `diff` on small checkpoints, through `main`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist

from tests.faults.states import plain_state, record
from tests.helpers.distributed import run_ranks
from zaya_train.main import main
from zaya_train.tools.checkpoint import checkpoint_at, size_text
from zaya_train.tools.checkpoint_diff import (
    CheckpointDifference,
    TensorDifference,
    compare_checkpoints,
)
from zaya_train.train.checkpoint import CheckpointStore

if TYPE_CHECKING:
    from pathlib import Path

STEPS = (10, 20, 30)


def _save(root: Path) -> None:
    assert dist.get_world_size() == 1
    store = CheckpointStore(root / "run" / "checkpoints", keep_last=3)
    for step in STEPS:
        mesh = {"replicate": 2, "shard": 4, "context": 1}
        store.save(plain_state(step), record(step, mesh=mesh, keep=step == 20))
    store.close()
    other = CheckpointStore(root / "other", keep_last=3)
    state = plain_state(30)
    state["model.layers.0.attn.weight"][2, 3] += 0.5
    state["model.layers.1.router.bias"][0] = -state["model.layers.1.router.bias"][0]
    state["model.layers.2.norm.weight"] = torch.zeros(2)
    state["optim.extra"] = torch.ones(1)
    state["optim.step"] += 1
    changes = {
        "train_state": {"tokens": 3841, "loss": 0.1 * 30},
        "lineage": {"seed": 1, "phases": [["short", {"tokens": 5}]], "corpora": {}},
        "config_hash": "decade",
    }
    other.save(state, record(30, **changes))
    other.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    run_ranks(_save, 1, root)
    return root


@pytest.fixture
def root(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "copy")
    return tmp_path / "copy"


def said(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = main(["checkpoint", *words])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("place", ["run", "run/checkpoints"])
def test_ls_lists_everything_there(
    root: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = root / "run" / "checkpoints"
    (checkpoints / "step-00000030" / "__0_0.distcp").write_bytes(b"short")
    shutil.copytree(checkpoints / "step-00000010", checkpoints / "step-00000040")
    for name in ("step-00000050.tmp", "step-00000005.trash", "step-00000006.bad-2"):
        (checkpoints / name).mkdir()
    code, out = said(["ls", str(root / place)], capsys)
    assert code == 0
    rows = {line.split()[1]: line for line in out.splitlines() if "step-" in line}
    assert "pretrain" in rows["step-00000010"] and "1,280" in rows["step-00000010"]
    assert "replicate 2 x shard 4" in rows["step-00000010"] and "sizes fit" in rows["step-00000010"]
    assert "yes" in rows["step-00000020"] and "yes" not in rows["step-00000010"]
    assert "__0_0.distcp: 5 bytes, the manifest says" in rows["step-00000030"]
    assert "of step 10, not 40" in rows["step-00000040"]
    assert "unfinished" in rows["step-00000050.tmp"]
    assert "deletion" in rows["step-00000005.trash"]
    assert "did not verify" in rows["step-00000006.bad-2"]


def test_nothing_usable_is_exit_3(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for manifest in (root / "run").rglob("MANIFEST.json"):
        manifest.unlink()
    for words in (["ls", str(root / "run")], ["verify", str(root / "run")]):
        code, out = said(words, capsys)
        assert (code, out.count("MANIFEST.json: No such file")) == (3, 3)
    code, out = said(["diff", str(root / "run"), str(root / "other")], capsys)
    assert code == 3
    assert out.startswith("error: ") and "no usable checkpoint" in out
    (root / "empty").mkdir()
    assert said(["ls", str(root / "empty")], capsys)[0] == 3
    assert said(["verify", str(root / "empty")], capsys)[0] == 3
    for command in ("ls", "verify"):
        code, out = said([command, str(root / "nowhere")], capsys)
        assert (code, out) == (3, f"error: {root / 'nowhere'}: no such directory\n")


def test_a_run_without_checkpoints_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert main(["checkpoint", "ls", str(tmp_path)]) == 3
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'checkpoints'}: no checkpoint"


def test_verify_reads_what_ls_does_not(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(["verify", str(root / "run"), str(root / "other")], capsys)
    assert code == 0
    assert "4 of 4 checkpoints verify" in out
    damage(root / "run" / "checkpoints" / "step-00000020" / "__0_0.distcp")
    assert said(["ls", str(root / "run")], capsys)[0] == 0
    code, out = said(["verify", str(root / "run")], capsys)
    assert code == 4
    assert "step-00000020: __0_0.distcp: sha256" in out
    assert "2 of 3 checkpoints verify" in out
    one = str(root / "run" / "checkpoints" / "step-00000020")
    assert said(["verify", one], capsys)[0] == 3


def test_a_run_stands_for_its_newest_that_verifies(root: Path) -> None:
    damage(root / "run" / "checkpoints" / "step-00000030" / "__0_0.distcp")
    assert checkpoint_at(root / "run").record.step == 20
    assert checkpoint_at(root / "run" / "checkpoints").record.step == 20
    shutil.move(root / "run" / "checkpoints" / "step-00000010", root / "renamed")
    assert checkpoint_at(root / "renamed").record.step == 10


def test_equal_checkpoints_are_exit_0(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = root / "run" / "checkpoints" / "step-00000030"
    code, out = said(["diff", str(checkpoint), str(root / "run")], capsys)
    assert code == 0
    assert "13 bitwise equal, 0 different" in out
    for part in ("position", "model and past", "configuration", "how written"):
        assert f"{part}: equal" in out


def test_every_difference_is_told(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out = said(["diff", str(root / "run"), str(root / "other"), "--rows", "9"], capsys)
    assert code == 1
    assert "tensors: 9 bitwise equal, 5 different" in out
    for text in (
        "state.tokens",
        "3840",
        "3841",
        "phases.short",
        "seed",
        "hash",
        "decade",
        "mesh.replicate",
    ):
        assert text in out
    result = compare_checkpoints(checkpoint_at(root / "run"), checkpoint_at(root / "other"))
    by_key = {entry.key: entry for entry in result.tensors}
    mine = plain_state(30)
    weight = mine["model.layers.0.attn.weight"]
    other = weight.clone()
    other[2, 3] += 0.5
    largest = float(torch.maximum(weight.abs().max(), other.abs().max()))
    changed = by_key.pop("model.layers.0.attn.weight")
    assert (changed.elements, changed.shapes) == (1, ("float32[7, 5]",) * 2)
    assert changed.relative == pytest.approx(0.5 / largest, rel=1e-6)
    assert by_key.pop("model.layers.1.router.bias").elements == 1
    assert by_key.pop("model.layers.2.norm.weight").shapes == ("float32[1]", "float32[2]")
    assert by_key.pop("optim.extra").shapes == ("absent", "float32[1]")
    assert by_key.pop("optim.step").relative == pytest.approx(1 / 31)
    assert by_key == {}
    assert result.position.keys() == {"state.tokens"}
    few = said(["diff", str(root / "run"), str(root / "other"), "--rows", "1"], capsys)[1]
    assert "and 4 more: 2 of model, 2 of optim" in few


def test_a_damaged_checkpoint_is_not_compared(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = root / "run" / "checkpoints" / "step-00000030"
    damage(checkpoint / "__0_0.distcp")
    code, out = said(["diff", str(root / "other"), str(checkpoint)], capsys)
    assert code == 3
    assert out.startswith(f"error: {checkpoint}: __0_0.distcp: sha256")


def test_what_decides_whether_two_are_equal() -> None:
    same = CheckpointDifference(1, (), {}, {}, {}, {})
    assert same.equal
    tensor = TensorDifference("w", ("float32[1]",) * 2, 1, 0.5)
    assert not replace(same, tensors=(tensor,)).equal
    values = {"key": (1, 2)}
    assert not replace(same, position=values).equal
    assert not replace(same, past=values).equal
    assert replace(same, configuration=values, writing=values).equal


def _zeros(root: Path) -> None:
    for name, sign in (("plus", 1.0), ("minus", -1.0)):
        store = CheckpointStore(root / name, keep_last=2)
        store.save({"w": torch.zeros(3) * sign}, record(1))
        store.close()


def test_minus_zero_is_not_zero(tmp_path: Path) -> None:
    run_ranks(_zeros, 1, tmp_path)
    result = compare_checkpoints(
        checkpoint_at(tmp_path / "plus"), checkpoint_at(tmp_path / "minus")
    )
    assert [(d.key, d.elements, d.relative) for d in result.tensors] == [("w", 3, 0.0)]


def _with_identity(root: Path, config: dict[str, Any]) -> None:
    store = CheckpointStore(root, keep_last=2)
    store.save(plain_state(1), record(1, identity={"config": config}))
    store.close()


def test_a_checkpoint_carries_its_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rate in (("a", 0.02), ("b", 0.01)):
        run_ranks(_with_identity, 1, tmp_path / name, {"optim": {"clip_norm": rate}})
    code, out = said(["diff", str(tmp_path / "a"), str(tmp_path / "b")], capsys)
    assert code == 0
    assert "optim.clip_norm" in out and "0.02" in out


def _with_config(root: Path, config: dict[str, Any]) -> None:
    digest = sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
    store = CheckpointStore(root / "checkpoints", keep_last=2)
    store.save(plain_state(1), record(1, config_hash=digest))
    store.close()
    (root / "configs").mkdir()
    for number, values in enumerate(({"old": True}, config), start=1):
        (root / "configs" / f"attempt-{number:04d}.json").write_text(json.dumps(values))


def test_the_configuration_is_that_of_the_attempt_that_wrote_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, rate in (("a", 0.02), ("b", 0.01)):
        (tmp_path / name).mkdir()
        config = {"optim": {"muon": {"learning_rate": rate}}, "run": {"seed": 0}}
        run_ranks(_with_config, 1, tmp_path / name, config)
    code, out = said(["diff", str(tmp_path / "a"), str(tmp_path / "b")], capsys)
    assert code == 0, "the same state, whatever comes of it"
    assert "optim.muon.learning_rate" in out and "0.01" in out and "old" not in out


def test_a_damaged_configuration_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").mkdir()
    run_ranks(_with_config, 1, tmp_path / "a", {"run": {"seed": 0}})
    damaged = tmp_path / "a" / "configs" / "attempt-0001.json"
    damaged.write_text("{")
    assert main(["checkpoint", "diff", str(tmp_path / "a"), str(tmp_path / "a")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {damaged}: not JSON")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2.5e9, "2.5 GB"), (3e13, "30 TB")],
)
def test_sizes_are_short(size: float, text: str) -> None:
    assert size_text(size) == text
