"""Whole files, whole folders, and what killed writers leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from zaya_train.config.errors import StorageError
from zaya_train.runtime import files
from zaya_train.runtime.files import (
    copy_folder_once,
    file_sha256,
    remove_leftovers,
    whole_directory,
    whole_file,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WRITER = """
import sys, time
from pathlib import Path
from zaya_train.runtime import files

target, moment = Path(sys.argv[1]), sys.argv[2]

def stop(*_):
    print("there", flush=True)
    time.sleep(60)

if moment == "between the renames":
    rename = Path.rename
    def slow(self, to):
        if self.name.startswith(".tmp-") and not self.name.endswith(".old"):
            stop()
        return rename(self, to)
    Path.rename = slow
with files.whole_directory(target) as folder:
    (folder / "new").write_text("new")
    if moment == "inside":
        stop()
"""


@contextmanager
def disk_of(limit_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def started(target: Path, moment: str) -> subprocess.Popen[str]:
    """A writer of `target` that has stopped at `moment`."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target), moment], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "there"
    return process


def killed(target: Path, moment: str) -> None:
    process = started(target, moment)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "first")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("half")
        assert path.read_text() == "first"
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    write_json(path, {"a": [1]})
    assert json.loads(path.read_text()) == {"a": [1]}
    assert names(path.parent) == ["a.txt"]


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "first")
    with disk_of(100), pytest.raises(StorageError, match=r"a\.txt: not written: .*File too large"):
        write_text(path, "x" * 200)
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_everything_is_flushed_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def sync(path: Path) -> None:
        seen.append(path.name)
        assert path.exists()
        assert path == tmp_path or not (tmp_path / "target").exists()

    monkeypatch.setattr(files, "sync_path", sync)
    with whole_directory(tmp_path / "target") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "inner").touch()
    assert {"inner", "sub"} < set(seen)
    seen.clear()
    os.rename(tmp_path / "target", tmp_path / "kept")
    write_text(tmp_path / "target", "x")
    assert seen[0].startswith(".target.partial-") and len(seen) == 2


def test_an_input_that_is_missing_is_no_storage_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), whole_directory(tmp_path / "out"):
        (tmp_path / "absent").read_text()
    assert names(tmp_path) == []


def test_a_folder_is_copied_once(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "a").write_text("1")
    copy_folder_once(source, target)
    (source / "a").write_text("2")
    copy_folder_once(source, target)
    assert (target / "a").read_text() == "1"
    (source / "b").write_text("x" * 200)
    with disk_of(100), pytest.raises(StorageError, match="other"):
        copy_folder_once(source, tmp_path / "other")
    assert names(tmp_path) == ["source", "target"]


def test_a_hash_is_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "big"
    content = bytes(range(256)) * 20_000
    path.write_bytes(content)
    assert file_sha256(path) == hashlib.sha256(content).hexdigest()


def test_a_killed_writers_folder_is_removed_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed(target, "inside")
    assert len(names(tmp_path)) == 2
    remove_leftovers(target)
    assert names(tmp_path) == []


def test_a_live_writers_folder_stays(tmp_path: Path) -> None:
    target = tmp_path / "out"
    process = started(target, "inside")
    try:
        remove_leftovers(target)
        (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
        assert names(folder) == ["new"]
    finally:
        process.kill()
        process.communicate()
    # Nor is one of this process itself.
    with whole_directory(target) as mine:
        remove_leftovers(target)
        assert mine.is_dir()
    assert not folder.exists()
    assert names(tmp_path) == ["out"]


def test_a_writer_of_another_machine_or_name_is_not_judged(tmp_path: Path) -> None:
    left = [".tmp-out-0123456789ab", ".tmp-output-0123456789ab", ".tmp-out-ba9876543210"]
    for name in left:
        (tmp_path / name).mkdir()
    (tmp_path / f"{left[0]}.lock").write_text("another-machine")
    (tmp_path / f"{left[1]}.lock").write_text(os.uname().nodename)
    before = names(tmp_path)
    remove_leftovers(tmp_path / "out")
    assert names(tmp_path) == before


def test_killed_between_two_renames_the_earlier_folder_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("years of work")
    killed(target, "between the renames")
    assert not target.exists()
    remove_leftovers(target)
    assert names(tmp_path) == ["out"]
    assert (target / "old").read_text() == "years of work"
