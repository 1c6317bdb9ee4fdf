"""Preparation by several processes, shard by shard: the same bytes, also after a kill."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest

from zaya_train.config.errors import DataError, StorageError
from zaya_train.data import encoding, shards
from zaya_train.data.corpus_writer import Block, CorpusWriter
from zaya_train.data.prepare import PrepareRequest, prepare
from zaya_train.data.reading import open_input
from zaya_train.data.shards import (
    ShardResult,
    discard_shards,
    read_shard,
    shard_folder,
    write_shard,
)
from zaya_train.data.workers import workers
from zaya_train.runtime.files import file_sha256

from .builders import problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

ROWS = 1500
"""Of 1.5 KB each: three shards of a MiB."""

PROGRAM = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from zaya_train.data import encoding, shards
from zaya_train.data.prepare import PrepareRequest, prepare

source, output, name = sys.argv[1:]
original = encoding.write_shard
def write(path, result):
    original(path, result)
    if path.name == "000001.shard":
        os.kill(os.getpid(), getattr(signal, name))
encoding.write_shard = write
prepare(PrepareRequest(input=source, output=Path(output), heldout_fraction=0.1))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        problem(f"reasoning {n} " * 110, answer=str(n), prompt=f"q {n % 700}?") for n in range(ROWS)
    ]
    for broken in (3, 900, 1400, 1401):
        rows[broken] = [*rows[broken][:1], {"role": "assistant", "content": "<think>open"}]
    file = tmp_path_factory.mktemp("source") / "in.jsonl"
    file.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    assert len(list(open_input(str(file)).shards())) == 3
    return file


@pytest.fixture(scope="module")
def alone(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("alone") / "out"
    return hashes(prepare(request(source, output)))


def request(source: Path, output: Path, **settings: Any) -> PrepareRequest:
    settings = {"heldout_fraction": 0.1, **settings}
    return PrepareRequest(input=str(source), output=output, **settings)


def hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def test_shards_tile_the_input_with_their_line_numbers(source: Path) -> None:
    opened = open_input(str(source))
    parts = [row for shard in opened.shards() for row in shard.rows()]
    assert parts == list(opened.rows())
    assert parts[-1][0] == f"{source}:{ROWS}"


@pytest.mark.parametrize("count", [2, 3])
def test_the_number_of_workers_changes_no_byte(
    source: Path, alone: dict[str, str], tmp_path: Path, count: int
) -> None:
    assert hashes(prepare(request(source, tmp_path / "out", workers=count))) == alone
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("suffix", ["json", "parquet", "txt"])
def test_formats_without_lines_are_shared_out_too(
    source: Path, tmp_path: Path, suffix: str
) -> None:
    rows = [{"text": json.loads(line)["messages"][1]["content"]} for line in source.open()]
    file = tmp_path / f"in.{suffix}"
    if suffix == "txt":
        file.write_text("\n".join(row["text"] for row in rows))
    elif suffix == "json":
        file.write_text(json.dumps(rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(file)
    settings: dict[str, Any] = {"document_characters": 5000}
    assert len(list(open_input(str(file), **settings).shards())) > 1
    found = [
        hashes(prepare(request(file, tmp_path / str(count), workers=count, **settings)))
        for count in (1, 2)
    ]
    assert found[0] == found[1]


def test_the_first_bad_row_in_the_inputs_order_is_named(source: Path, tmp_path: Path) -> None:
    lines = source.read_text().split("\n")
    lines[1200] = "{"
    lines[1450] = "["
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"in\.jsonl:1201: not valid JSON"):
        prepare(request(file, tmp_path / "out", workers=2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


def stopped(source: Path, output: Path, name: str) -> None:
    """A preparation that ends by a signal once two of three shards are on disk."""
    command = [sys.executable, "-c", PROGRAM, str(source), str(output), name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert not output.exists()
    shards = sorted(path.name for path in (output.parent / "out.shards").glob("*.shard"))
    assert shards == ["000000.shard", "000001.shard"], done.stderr


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the shards that are written from now on."""
    written: list[str] = []

    def write(path: Path, result: ShardResult) -> None:
        written.append(path.name)
        write_shard(path, result)

    monkeypatch.setattr(encoding, "write_shard", write)
    return written


@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_finished_shards_are_kept_and_a_damaged_one_is_made_anew(
    source: Path,
    alone: dict[str, str],
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out"
    stopped(source, output, name)
    damaged = tmp_path / "out.shards" / "000000.shard"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    written = counted(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert hashes(prepare(request(source, output))) == alone
    assert written == ["000000.shard", "000002.shard"]
    assert "going on from 2 finished shards" in caplog.text
    assert f"{damaged}: content differs from its hash" in caplog.text
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_shards_of_other_work_are_not_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    stopped(source, output, "SIGKILL")
    written = counted(monkeypatch)
    prepare(request(source, output, heldout_fraction=0.2))
    assert written == ["000000.shard", "000001.shard", "000002.shard"]


def test_an_error_leaves_no_shards(source: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "q"}]}] * 3
    file = tmp_path / "in.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(DataError, match="no usable document"):
        prepare(request(file, tmp_path / "out", heldout_fraction=0.0))
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_folder_of_somebody_else_is_refused(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "out.shards" / "thesis.txt"
    other.parent.mkdir()
    other.write_text("years of work")
    discard_shards(tmp_path / "out")
    with pytest.raises(DataError, match=r"out\.shards: exists and holds no shards"):
        prepare(request(source, tmp_path / "out"))
    assert other.read_text() == "years of work"


@pytest.mark.parametrize(
    "left", [".job.json.partial-77", "000003.shard", "000003.shard.77", "lock"]
)
@pytest.mark.parametrize("kept", [False, True])
def test_what_a_kill_left_of_the_folder_is_ours(tmp_path: Path, left: str, kept: bool) -> None:
    """Also where the corpus is there already and the folder is only tidied away."""
    (tmp_path / "in.txt").write_text("text")
    asked = request(tmp_path / "in.txt", tmp_path / "out", heldout_fraction=0.0)
    if kept:
        prepare(asked)
    folder = tmp_path / "out.shards"
    folder.mkdir()
    for name in ("lock", left):
        (folder / name).write_text("half")
    prepare(asked)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.txt", "out"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def killed_after(moments: Iterator[int], original: Callable[..., None]) -> Callable[..., None]:
    """`original`, as long as there are moments left."""

    def call(*args: Any, **settings: Any) -> None:
        if next(moments, None) is None:
            raise Killed
        original(*args, **settings)

    return call


def test_removal_may_be_killed_at_any_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder with everything in it; each time one entry later."""
    folder, job = tmp_path / "out.shards", {"a": 1}
    for moment in range(20):
        (folder / "tokenizer").mkdir(parents=True)
        for name in ("job.json", "lock", "000000.shard", "000001.shard.77", "tokenizer/x"):
            (folder / name).write_text("{}")
        with monkeypatch.context() as patched:
            moments = iter(range(moment))
            for name in ("unlink", "rmdir"):
                patched.setattr(os, name, killed_after(moments, getattr(os, name)))
            try:
                discard_shards(tmp_path / "out")
            except Killed:
                assert folder.is_dir()
            else:
                break
        with shard_folder(tmp_path / "out", job, tmp_path / "spare") as given:
            assert given == folder and not list(folder.glob("*.shard*"))
        assert not folder.exists()
    assert moment == 7


def test_a_refused_job_file_lets_the_lock_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: object) -> None:
        raise StorageError(f"{path}: not written: disk full")

    output, spare = tmp_path / "out", tmp_path / "spare"
    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_json", refuse)
        with pytest.raises(StorageError, match="disk full"), shard_folder(output, {}, spare):
            pass
    assert not list(tmp_path.iterdir())
    before = len(os.listdir("/proc/self/fd"))
    with shard_folder(output, {}, spare) as folder:
        assert folder.name == "out.shards"
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("joining", [False, True])
def test_finished_shards_outlive_a_full_disk(
    source: Path,
    alone: dict[str, str],
    tmp_path: Path,
    joining: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While a shard is written, and while they are joined."""
    output = tmp_path / "out"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(path: Path, result: ShardResult) -> None:
        if path.name == "000002.shard":
            raise full
        write_shard(path, result)

    def append(_: CorpusWriter, block: Block) -> None:
        raise full

    with monkeypatch.context() as patched:
        if joining:
            patched.setattr(CorpusWriter, "append", append)
        else:
            patched.setattr(encoding, "write_shard", write)
        with pytest.raises(StorageError, match="No space left"):
            prepare(request(source, output))
    assert not output.exists()
    written = counted(monkeypatch)
    assert hashes(prepare(request(source, output))) == alone
    assert written == ([] if joining else ["000002.shard"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_shard_that_is_cut_short_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "000000.shard"
    assert read_shard(path) is None
    write_shard(path, ShardResult({}, ("a",), ("b",)))
    found = read_shard(path)
    assert found is not None and (found.heldout_rows, found.examples) == (("a",), ("b",))
    path.write_bytes(path.read_bytes()[:-1])
    assert read_shard(path) is None


def test_a_worker_count_below_one_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="workers is 0, expected >= 1"):
        prepare(request(source, tmp_path / "out", workers=0))


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line() -> None:
    message = "one of 2 worker processes was killed"
    with workers(2) as pool, pytest.raises(StorageError, match=message):
        list(pool.map(die, range(3)))


ORPHANS = """
import sys
from zaya_train.data.workers import workers
if __name__ == "__main__":
    with workers(2) as pool:
        print(*pool.map(abs, [1]))
        print(*pool._pool._processes, flush=True)
        sys.stdin.read()
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(ORPHANS)
    process = subprocess.Popen(
        [sys.executable, str(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    process.stdout.readline()
    children = [int(word) for word in process.stdout.readline().split()]
    assert children
    process.kill()
    process.wait()
    # Without end where they stay: pytest's own limit is what a slow machine has.
    while any(os.path.exists(f"/proc/{child}/fd/0") for child in children):
        time.sleep(0.05)
