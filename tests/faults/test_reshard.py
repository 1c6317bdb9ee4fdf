"""A checkpoint of one mesh loads bitwise into any other, and only into its own model."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.faults.states import MODEL, blank, differing, make_mesh, plain_state, record, shard
from tests.helpers.distributed import run_ranks
from zaya_train.config.errors import CheckpointError, NumericsError
from zaya_train.train import dcp
from zaya_train.train.checkpoint import CheckpointStore
from zaya_train.train.manifest import METADATA_NAME, FileEntry, Manifest, encode, read
from zaya_train.train.restore import Found, load_full, verify

if TYPE_CHECKING:
    from pathlib import Path


def _save(root: Path, step: int, replicate: int) -> None:
    store = CheckpointStore(root, keep_last=2)
    store.save(shard(plain_state(1), make_mesh(replicate)), record(step))


def _load_and_save(root: Path, replicate: int) -> list[str]:
    store = CheckpointStore(root, keep_last=2)
    found = store.newest()
    assert found is not None
    state = blank(plain_state(1), make_mesh(replicate))
    store.load(found, state, MODEL)
    store.save(state, record(found.record.step + 1))
    return differing(state, plain_state(1))


def test_two_to_one_to_four_to_two_ranks_bitwise(tmp_path: Path) -> None:
    run_ranks(_save, 2, tmp_path, 1, 1)
    for world_size, replicate in ((1, 1), (4, 2), (4, 1), (2, 2)):
        outcomes = run_ranks(_load_and_save, world_size, tmp_path, replicate)
        assert outcomes == [[]] * world_size
    full = load_full(tmp_path / "step-00000005")
    assert differing(full, plain_state(1)) == []


def test_equal_states_give_equal_files(tmp_path: Path) -> None:
    for name in ("one", "other"):
        run_ranks(_save, 4, tmp_path / name, 1, 2)
    files = [
        {path.name: path.read_bytes() for path in (tmp_path / name / "step-00000001").iterdir()}
        for name in ("one", "other")
    ]
    assert files[0] == files[1]


def _refused(root: Path, wanted: dict[str, Any], model: dict[str, Any]) -> tuple[str, list[str]]:
    store = CheckpointStore(root, keep_last=2)
    found = store.newest()
    assert found is not None
    state = blank(wanted, make_mesh())
    before = {key: torch.full_like(value, 77) for key, value in wanted.items()}
    try:
        store.load(found, state, model)
    except CheckpointError as error:
        return str(error), differing(state, before)
    return "loaded", []


def _without(state: dict[str, torch.Tensor], key: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name != key}


WEIGHT = "model.layers.1.attn.weight"
REFUSALS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "fewer layers": (
        plain_state(1, layers=2),
        MODEL,
        "4 tensors only in the checkpoint: model.layers.2.attn.weight",
    ),
    "more layers": (
        plain_state(1, layers=4),
        MODEL,
        "4 tensors not in the checkpoint: model.layers.3.attn.weight",
    ),
    "one tensor less": (
        _without(plain_state(1), WEIGHT),
        MODEL,
        f"1 tensors only in the .*{WEIGHT}",
    ),
    "other width": (
        plain_state(1, width=8),
        MODEL,
        r"6 tensors differ: .* is float32\[7, 5\] there, float32\[8, 5\] here",
    ),
    "other dtype": (
        {**plain_state(1), WEIGHT: plain_state(1)[WEIGHT].bfloat16()},
        MODEL,
        r"1 tensors differ: .* is float32\[7, 5\] there, bfloat16\[7, 5\] here",
    ),
    "other model": (
        plain_state(1),
        {**MODEL, "num_layers": 4, "conv_taps": 2},
        "of another model: conv_taps is absent there, 2 here, num_layers is 3 there, 4 here",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("saved")
    run_ranks(_save, 2, root, 1, 1)
    return root


@pytest.mark.parametrize("case", REFUSALS)
def test_another_model_is_refused_before_anything_is_loaded(saved: Path, case: str) -> None:
    wanted, model, expected = REFUSALS[case]
    for message, changed in run_ranks(_refused, 2, saved, wanted, model):
        assert "\n" not in message
        assert re.search(expected, message), message
        assert changed == []


def test_a_phase_may_change_the_rope_base(saved: Path) -> None:
    model = {**MODEL, "rope_base": 1e6}
    assert [said for said, _ in run_ranks(_refused, 2, saved, plain_state(1), model)] == [
        "loaded"
    ] * 2


def _try_save(root: Path, poisoned_rank: int, poison: float) -> tuple[str, list[str]]:
    store = CheckpointStore(root, keep_last=2)
    state = shard(plain_state(1), make_mesh())
    if dist.get_rank() == poisoned_rank:
        weight = state[WEIGHT].data
        assert isinstance(weight, DTensor)
        weight.to_local()[-1, -1] = poison
    try:
        store.save(state, record(1))
    except NumericsError as error:
        return str(error), sorted(path.name for path in root.glob("step-*"))
    return "saved", []


@pytest.mark.parametrize(("rank", "poison"), [(0, float("nan")), (1, float("inf"))])
def test_only_finite_tensors_are_saved(tmp_path: Path, rank: int, poison: float) -> None:
    for message, names in run_ranks(_try_save, 2, tmp_path, rank, poison):
        assert message.startswith(f"tensor {WEIGHT} on rank {rank} is not finite (1 shards")
        assert names == []


def _disagree(root: Path, kind: str) -> str:
    store = CheckpointStore(root, keep_last=2)
    state = shard(plain_state(1), make_mesh())
    step = 1
    if dist.get_rank() == 1:
        if kind == "keys":
            del state["optim.step"]
        elif kind == "step":
            step = 2
        else:
            state["model.layers.2.router.bias"][1] += 1
    try:
        store.save(state, record(step))
    except (CheckpointError, NumericsError) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


DISAGREEMENTS = {
    "keys": "CheckpointError: rank 1 saves another step, other keys or other shapes than rank 0",
    "step": "CheckpointError: rank 1 saves another step, other keys or other shapes than rank 0",
    # Replicas have come apart: an older checkpoint is good, this state is not.
    "values": "NumericsError: plain tensor model.layers.2.router.bias on rank 1 differs from rank ",
}


@pytest.mark.parametrize("kind", DISAGREEMENTS)
def test_ranks_that_disagree_do_not_save(tmp_path: Path, kind: str) -> None:
    for message in run_ranks(_disagree, 2, tmp_path, kind):
        assert message.startswith(DISAGREEMENTS[kind])
    assert list(tmp_path.glob("step-*")) == []


@pytest.mark.parametrize(
    "changes",
    [{"train_state": {"loss": float("nan")}}, {"train_state": {"x": object()}}, {"step": 10**8}],
    ids=["nan", "object", "step"],
)
def test_records_that_are_not_plain_json_are_refused(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    def save(root: Path) -> str:
        try:
            CheckpointStore(root, keep_last=2).save(plain_state(1), replace(record(1), **changes))
        except CheckpointError as error:
            return str(error)
        return "saved"

    (message,) = run_ranks(save, 1, tmp_path)
    assert "not plain JSON" in message or "at most 8 digits" in message
    assert list(tmp_path.glob("step-*")) == []


def _write_twice(directory: Path) -> str:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)
    dcp.write(plain_state(1), directory, group)
    try:
        dcp.write(plain_state(2), directory, group)
    except CheckpointError as error:
        return str(error)
    return "overwritten"


def test_files_are_never_written_over_others(tmp_path: Path) -> None:
    (said,) = run_ranks(_write_twice, 1, tmp_path / "x")
    assert "already exists" in said


class _Forged:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("owned",)


def test_a_forged_metadata_pickle_runs_no_code(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "step-00000001"
    directory.mkdir()
    for path in (saved / directory.name).iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    payload = pickle.dumps(_Forged())
    (directory / METADATA_NAME).write_bytes(payload)
    with pytest.raises(CheckpointError, match=r"\.metadata: \d+ bytes, the manifest says"):
        load_full(directory)

    manifest = _manifest_with(directory, payload)
    (directory / "MANIFEST.json").write_bytes(encode(manifest))
    assert verify(directory) == [], "the forger has made the manifest fit"
    with pytest.raises(CheckpointError, match="mkdir has no place in checkpoint metadata"):
        load_full(directory)
    assert not (tmp_path / "owned").exists()


def test_a_forged_tensor_runs_no_code(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are read by torch.load, which would unpickle anything; all of them, and whole files,
    are replaced here by one payload that the forger's manifest and metadata vouch for."""
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "step-00000001"
    shutil.copytree(saved / directory.name, directory)
    torch.save(_Forged(), tmp_path / "payload")
    payload = (tmp_path / "payload").read_bytes()
    metadata = pickle.loads((directory / METADATA_NAME).read_bytes())
    for place in metadata.storage_data.values():
        place.offset, place.length = 0, len(payload)
    (directory / METADATA_NAME).write_bytes(pickle.dumps(metadata))
    for path in directory.glob("*.distcp"):
        path.write_bytes(payload)
    for path in (*directory.glob("*.distcp"), directory / METADATA_NAME):
        manifest = _manifest_with(directory, path.read_bytes(), path.name)
        (directory / "MANIFEST.json").write_bytes(encode(manifest))
    assert verify(directory) == [], "the forger has made the manifest fit"
    with pytest.raises(CheckpointError, match="Weights only load failed"):
        load_full(directory)
    assert not (tmp_path / "owned").exists()


def _manifest_with(directory: Path, payload: bytes, name: str = METADATA_NAME) -> Manifest:
    manifest = read(directory)
    entry = FileEntry(
        name=name,
        size_bytes=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
    )
    files = [entry if old.name == name else old for old in manifest.files]
    return replace(manifest, files=tuple(files))


def _load_after_change(root: Path) -> str:
    store = CheckpointStore(root, keep_last=2)
    found = store.newest()
    assert found is not None
    if dist.get_rank() == 0:
        path = found.path / METADATA_NAME
        path.write_bytes(path.read_bytes()[:-3] + b"abc")
    dist.barrier()
    try:
        store.load(Found(found.path, found.manifest), blank(plain_state(1), make_mesh()), MODEL)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_metadata_is_checked_again_at_the_moment_of_use(tmp_path: Path) -> None:
    run_ranks(_save, 2, tmp_path, 1, 1)
    for message in run_ranks(_load_after_change, 2, tmp_path):
        assert "does not match the manifest's sha256" in message
