"""Whatever happens to the files of a checkpoint is noticed before a byte of it is used."""

from __future__ import annotations

import hashlib
import random
import shutil
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from tests.faults.states import make_mesh, plain_state, record, shard
from tests.helpers.distributed import run_ranks
from zaya_train.config.errors import EXIT_NO_CHECKPOINT, CheckpointError
from zaya_train.tools.checkpoint import checkpoint_at
from zaya_train.train import manifest as manifests
from zaya_train.train.checkpoint import CheckpointStore
from zaya_train.train.entry import branch_point
from zaya_train.train.manifest import METADATA_NAME, FileEntry, encode, read
from zaya_train.train.peers import Peers
from zaya_train.train.restore import find_newest, load_full, verify

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TRIALS = 200
STEPS = (10, 20, 30)


def _save_steps(root: Path) -> None:
    store = CheckpointStore(root, keep_last=3)
    for step in STEPS:
        store.save(shard(plain_state(step), make_mesh()), record(step))


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pristine")
    run_ranks(_save_steps, 2, root)
    return root


@pytest.fixture
def root(pristine: Path, tmp_path: Path) -> Path:
    shutil.copytree(pristine, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def _any_file(directory: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(directory.iterdir()))


def _data_file(directory: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(directory.glob("*.distcp")))


def _flip_bit(directory: Path, rng: random.Random) -> None:
    path = _any_file(directory, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _zero_block(directory: Path, rng: random.Random) -> None:
    path = _data_file(directory, rng)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) - 600)
    assert any(data[start : start + 600])
    data[start : start + 600] = bytes(600)
    path.write_bytes(data)


def _truncate(directory: Path, rng: random.Random) -> None:
    path = _any_file(directory, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def _grow(directory: Path, rng: random.Random) -> None:
    path = _any_file(directory, rng)
    path.write_bytes(path.read_bytes() + bytes(rng.randrange(1, 9)))


def _remove(directory: Path, rng: random.Random) -> None:
    _any_file(directory, rng).unlink()


def _swap(directory: Path, rng: random.Random) -> None:
    one, other = sorted(directory.glob("*.distcp"))
    contents = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(contents)


def _take_stale_file(directory: Path, rng: random.Random) -> None:
    """Any but `.metadata`, which is the same in every step of a run: equal layout, equal bytes."""
    path = rng.choice([p for p in sorted(directory.iterdir()) if p.name != ".metadata"])
    shutil.copy(_older(directory) / path.name, path)


def _take_stale_directory(directory: Path, rng: random.Random) -> None:
    shutil.rmtree(directory)
    shutil.copytree(_older(directory), directory)


def _older(directory: Path) -> Path:
    """The newest checkpoint of an earlier step."""
    siblings = directory.parent.glob("step-????????")
    return max(path for path in siblings if path.name < directory.name)


def _add_shard(directory: Path, rng: random.Random) -> None:
    shutil.copy(_data_file(directory, rng), directory / f"__{rng.randrange(2, 9)}_0.distcp")


def _swap_for_directory(directory: Path, rng: random.Random) -> None:
    path = _any_file(directory, rng)
    path.unlink()
    path.mkdir()


CORRUPTIONS: list[Callable[[Path, random.Random], None]] = [
    _flip_bit,
    _flip_bit,
    _flip_bit,
    _zero_block,
    _truncate,
    _grow,
    _remove,
    _swap,
    _take_stale_file,
    _take_stale_directory,
    _add_shard,
    _swap_for_directory,
]


def test_random_corruptions_are_all_detected(pristine: Path, root: Path) -> None:
    directory = root / "step-00000030"
    assert verify(directory) == []
    undetected = []
    for trial in range(TRIALS):
        rng = random.Random(trial)
        corrupt = CORRUPTIONS[trial % len(CORRUPTIONS)]
        corrupt(directory, rng)
        if not verify(directory):
            undetected.append((trial, corrupt.__name__))
        shutil.rmtree(directory)
        shutil.copytree(pristine / directory.name, directory)
    assert undetected == []
    assert verify(directory) == []


def test_every_single_byte_of_the_manifest_counts(root: Path) -> None:
    path = root / "step-00000030" / "MANIFEST.json"
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
        assert verify(path.parent), f"byte {position} ({data[position : position + 1]!r})"


@pytest.mark.parametrize("corrupt", dict.fromkeys(CORRUPTIONS))
def test_falls_back_to_the_newest_that_verifies(
    root: Path, corrupt: Callable[[Path, random.Random], None]
) -> None:
    corrupt(root / "step-00000030", random.Random(1))
    found, skipped = find_newest(root)
    assert found is not None
    assert found.record.step == 20
    assert list(skipped) == [30]
    assert skipped[30]
    loaded = load_full(found.path)
    expected = plain_state(20)
    assert loaded.keys() == expected.keys()
    assert all(loaded[key].equal(expected[key]) for key in expected)


def _newest_on_two_ranks(root: Path) -> tuple[int, list[str]]:
    store = CheckpointStore(root, keep_last=3)
    found = store.newest()
    assert found is not None
    return found.record.step, store.verify(root / "step-00000030")


def test_ranks_agree_on_what_they_verified_in_parts(root: Path) -> None:
    _flip_bit_of(root / "step-00000030" / "__0_0.distcp")
    (first, problems), (second, same) = run_ranks(_newest_on_two_ranks, 2, root)
    assert first == second == 20
    assert problems == same
    assert len(problems) == 1
    assert problems[0].startswith("__0_0.distcp: sha256 ")


def _files_read(root: Path) -> list[str]:
    """Names of what this rank reads of a checkpoint that all ranks have written and verify."""
    names: list[str] = []
    store = CheckpointStore(root, keep_last=2)
    saved = store.save(shard(plain_state(1), make_mesh()), record(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifests, "file_problem", lambda _, entry: names.append(entry.name))
        store.verify(saved.path)
    return names


def test_no_rank_verifies_what_it_wrote(tmp_path: Path) -> None:
    """Its own node would answer from memory, whatever the disk holds."""
    read_by = run_ranks(_files_read, 4, tmp_path)
    for rank, names in enumerate(read_by):
        assert f"__{(rank + 2) % 4}_0.distcp" in names
    data = [f"__{rank}_0.distcp" for rank in range(4)]
    assert sorted(name for names in read_by for name in names) == [METADATA_NAME, *data]


def test_all_bad_is_exit_3_and_names_each(root: Path) -> None:
    _flip_bit_of(root / "step-00000010" / "__0_0.distcp")
    (root / "step-00000020" / "__1_0.distcp").unlink()
    (root / "step-00000030" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError) as caught:
        find_newest(root)
    assert caught.value.exit_code == EXIT_NO_CHECKPOINT == 3
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "step-00000010: __0_0.distcp: sha256",
        "step-00000020: __1_0.distcp: No such file",
        "step-00000030: MANIFEST.json: No such file",
    ):
        assert part in message


def test_nothing_saved_is_not_an_error_but_only_bad_ones_are(root: Path, tmp_path: Path) -> None:
    assert find_newest(tmp_path / "absent") == (None, {})
    for step in STEPS[:-1]:
        shutil.rmtree(root / f"step-{step:08d}")
    (root / "step-00000030").rename(root / "step-00000030.bad")
    with pytest.raises(CheckpointError, match=r"step-00000030\.bad: moved aside earlier"):
        find_newest(root)


def test_a_manifest_may_neither_leave_its_directory_nor_lack_the_metadata(root: Path) -> None:
    directory = root / "step-00000030"
    manifest = read(directory)
    outside = FileEntry(name="../x.distcp", size_bytes=1, sha256=hashlib.sha256(b"x").hexdigest())
    (root / "x.distcp").write_bytes(b"x")
    data_files = tuple(entry for entry in manifest.files if entry.name != METADATA_NAME)
    forged = replace(manifest, files=(*data_files, outside))
    (directory / "MANIFEST.json").write_bytes(encode(forged))
    assert verify(directory) == [
        "../x.distcp: not a plain file name",
        "MANIFEST.json: lists no .metadata",
    ]


def test_load_full_verifies_first_and_selects_by_prefix(root: Path) -> None:
    directory = root / "step-00000030"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        part = load_full(directory, "model.layers.1.")
    assert sorted(part) == [
        f"model.layers.1.{k}" for k in ("attn.weight", "norm.weight", "router.bias")
    ]
    with pytest.raises(CheckpointError, match="no tensor's name starts with 'decoder'"):
        load_full(directory, "decoder")
    _flip_bit_of(directory / "__1_0.distcp")
    with pytest.raises(CheckpointError, match=r"__1_0\.distcp: sha256"):
        load_full(directory)


def test_who_needs_one_checkpoint_reads_every_byte_of_it(root: Path) -> None:
    path = root / "step-00000030"
    for found in (branch_point(path, Peers()), checkpoint_at(path)):
        assert (found.path, found.record.step) == (path, 30)
    _flip_bit_of(path / "__0_0.distcp")
    for prefix, load in (
        ("checkpoint.branch_from: ", lambda: branch_point(path, Peers())),
        ("", lambda: checkpoint_at(path)),
        ("", lambda: load_full(path)),
    ):
        with pytest.raises(CheckpointError) as caught:
            load()
        assert str(caught.value).startswith(f"{prefix}{path}: __0_0.distcp: sha256 ")


def _flip_bit_of(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
