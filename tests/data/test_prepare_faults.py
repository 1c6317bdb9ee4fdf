"""Preparation killed, interrupted, or out of space: never half a corpus under the final name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from zaya_train.config.errors import EXIT_STORAGE, StorageError
from zaya_train.data.corpus import Corpus
from zaya_train.data.prepare import PrepareRequest, prepare

from .builders import problem

if TYPE_CHECKING:
    from pathlib import Path

PROGRAM = """
import resource, signal, sys
# A shell's background jobs, and so some CI runners, start their children with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from zaya_train.config.errors import ZayaError
from zaya_train.data import encoding
from zaya_train.data import prepare as module

action, source, output, overwrite = sys.argv[1:]
if action == "stop":
    original = encoding._encode
    def slow(tokenizer, kind, batch):
        print("tokenising", flush=True)
        sys.stdin.read()  # ends with the parent
        return original(tokenizer, kind, batch)
    encoding._encode = slow
else:
    limit = int(action)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    module.prepare(module.PrepareRequest(
        input=source, output=Path(output), overwrite=bool(overwrite)))
except ZayaError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


def write_input(folder: Path, rows: int) -> Path:
    file = folder / "in.jsonl"
    messages = [problem("reasoning " * 20, str(n), f"question {n}") for n in range(rows)]
    file.write_text("".join(json.dumps({"messages": m}) + "\n" for m in messages))
    return file


def start(action: str, source: Path, output: Path, overwrite: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, action, str(source), str(output), overwrite]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def stop_while_tokenising(process: subprocess.Popen[str], with_signal: signal.Signals) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "tokenising"
    process.send_signal(with_signal)
    process.communicate()


def test_kill_leaves_nothing_under_the_name_and_a_second_run_succeeds(tmp_path: Path) -> None:
    source, output = write_input(tmp_path, 100), tmp_path / "out"
    process = start("stop", source, output)
    stop_while_tokenising(process, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    left = [entry.name for entry in tmp_path.iterdir() if entry != source]
    assert left and all(name.startswith((".tmp-out-", "out.shards")) for name in left)
    prepare(PrepareRequest(input=str(source), output=output))
    assert len(Corpus.open(output / "train", verify="hashes")) == 100
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_kill_while_replacing_keeps_the_old_output(tmp_path: Path) -> None:
    source, output = write_input(tmp_path, 50), tmp_path / "out"
    prepare(PrepareRequest(input=str(source), output=output))
    write_input(tmp_path, 60)
    stop_while_tokenising(start("stop", source, output, "overwrite"), signal.SIGKILL)
    assert len(Corpus.open(output / "train", verify="hashes")) == 50
    # Also where the output is found as asked, so that nothing new is written.
    write_input(tmp_path, 50)
    prepare(PrepareRequest(input=str(source), output=output))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_a_second_preparation_beside_a_live_one_leaves_it_alone(tmp_path: Path) -> None:
    source, output = write_input(tmp_path, 20), tmp_path / "out"
    process = start("stop", source, output)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "tokenising"
        folders = sorted(entry for entry in tmp_path.iterdir() if entry.is_dir())
        assert folders[0].name.startswith(".tmp-out-") and folders[1].name == "out.shards"
        prepare(PrepareRequest(input=str(source), output=output))
        # Also one that keeps what it finds, and so only tidies up.
        prepare(PrepareRequest(input=str(source), output=output))
        assert all(folder.is_dir() for folder in folders)
    finally:
        process.kill()
        process.communicate()


def test_interrupt_cleans_up(tmp_path: Path) -> None:
    source, output = write_input(tmp_path, 100), tmp_path / "out"
    process = start("stop", source, output)
    stop_while_tokenising(process, signal.SIGINT)
    assert process.returncode != 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize("limit_bytes", [4096, 60_000])
def test_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, limit_bytes: int) -> None:
    """A file-size limit stands for the full disk: both fail the write system call."""
    source, output = write_input(tmp_path, 300), tmp_path / "out"
    process = start(str(limit_bytes), source, output)
    _, errors = process.communicate()
    assert process.returncode == EXIT_STORAGE, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"{output}") and "not written" in last
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


def test_output_below_a_file_is_a_storage_error(tmp_path: Path) -> None:
    source = write_input(tmp_path, 3)
    (tmp_path / "file").write_text("")
    request = PrepareRequest(input=str(source), output=tmp_path / "file" / "out")
    with pytest.raises(StorageError, match="not written"):
        prepare(request)


def test_killed_leftovers_do_not_disturb(tmp_path: Path) -> None:
    source, output = write_input(tmp_path, 5), tmp_path / "out"
    (tmp_path / f".tmp-out-{time.time_ns():x}").mkdir()
    prepare(PrepareRequest(input=str(source), output=output))
    assert len(Corpus.open(output / "train")) == 5
