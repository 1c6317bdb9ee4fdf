"""Start, stop, death and signals of ranks; logs, seeds, devices."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from importlib.util import find_spec
from io import StringIO
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch._C._distributed_c10d import HashStore

from tests.helpers.distributed import RankError, run_ranks
from zaya_train.config.errors import EXIT_CONFIG, ConfigError, StorageError
from zaya_train.config.precision import PrecisionConfig
from zaya_train.config.schema import KernelsConfig, RuntimeConfig
from zaya_train.runtime import dist as runtime
from zaya_train.runtime.device import (
    check_kernels,
    describe,
    pick_device,
    rank_memory,
    usable_cores,
)
from zaya_train.runtime.log import FILE_ONLY, log_path, logging_to
from zaya_train.runtime.seeds import derive_seed, seed_rank
from zaya_train.runtime.signals import STOP_SIGNALS, StopFlag

BF16 = PrecisionConfig()
FP32 = PrecisionConfig(compute_dtype="fp32")

if TYPE_CHECKING:
    from multiprocessing.context import ForkProcess
    from pathlib import Path

CPU = RuntimeConfig(device="cpu", init_timeout_seconds=60.0)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in runtime.LAUNCH_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def _fork(body: object, *args: object) -> ForkProcess:
    process = multiprocessing.get_context("fork").Process(target=body, args=args)  # type: ignore[arg-type]
    process.start()
    return process


def _world_of_one() -> tuple[int, float, int]:
    dist.destroy_process_group()  # the harness made one; start() shall make its own
    for name in runtime.LAUNCH_VARIABLES:
        os.environ.pop(name, None)
    ranks = runtime.start(RuntimeConfig(device="cpu", threads=3))
    tensor = torch.ones(2)
    dist.all_reduce(tensor)
    group = dist.new_group(backend="gloo")
    dist.barrier(group)
    assert (ranks.rank, ranks.local_rank, ranks.local_world_size) == (0, 0, 1)
    assert ranks.device == torch.device("cpu")
    assert ranks.backend == "gloo"
    threads = torch.get_num_threads()
    runtime.stop()
    assert not dist.is_initialized()
    runtime.stop()
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    return ranks.world_size, float(tensor.sum()), threads


def test_a_world_of_one_without_a_launcher() -> None:
    assert run_ranks(_world_of_one, 1) == [(1, 2.0, 3)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _launch(rank: int, world_size: int, port: int, errors: Path) -> runtime.Ranks:
    """What torchrun does to a worker, with its standard error in a file."""
    descriptor = os.open(errors / f"rank-{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 2)
    sys.stderr = os.fdopen(2, "w", closefd=False)
    values = (rank, world_size, rank, world_size, "127.0.0.1", port)
    os.environ.update(dict(zip(runtime.LAUNCH_VARIABLES, map(str, values), strict=True)))
    torch.set_num_threads(1)
    return runtime.start(CPU)


def _reduce_and_stop(rank: int, port: int, folder: Path) -> None:
    ranks = _launch(rank, 2, port, folder)
    total = torch.tensor([ranks.rank + 1.0])
    dist.all_reduce(total)
    expected_threads = max(1, usable_cores() // 2)
    assert (total.item(), ranks.world_size) == (3.0, 2)
    assert torch.get_num_threads() == expected_threads
    runtime.stop()
    (folder / f"done-{rank}").touch()


def _fail_on_one(rank: int, port: int, folder: Path, error: BaseException) -> None:
    ranks = _launch(rank, 2, port, folder)
    with logging_to(folder, rank), runtime.fail_fast(ranks):
        if rank == 1:
            raise error
        dist.barrier()
        dist.barrier()


def _exit_codes(body: object, *args: object) -> list[int | None]:
    port = _free_port()
    processes = [_fork(body, rank, port, *args) for rank in range(2)]
    try:
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_ranks_of_a_launcher_meet(tmp_path: Path) -> None:
    assert _exit_codes(_reduce_and_stop, tmp_path) == [0, 0]
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-0", "done-1"]


def test_one_failing_rank_ends_all_each_with_its_own_line(tmp_path: Path) -> None:
    codes = _exit_codes(_fail_on_one, tmp_path, ConfigError("data.sources: none\nsecond line"))
    assert codes == [1, EXIT_CONFIG]
    failed = (tmp_path / "rank-1.err").read_text()
    assert failed == "rank 1: ConfigError: data.sources: none\n"
    peer = (tmp_path / "rank-0.err").read_text().splitlines()
    assert any(line.startswith("rank 0: ") for line in peer)
    assert "Traceback" in log_path(tmp_path, 0).read_text()
    own_log = log_path(tmp_path, 1).read_text()
    assert "rank 1: ConfigError" in own_log
    assert "Traceback" not in own_log


def test_a_bug_exits_1_and_leaves_its_traceback_in_the_log(tmp_path: Path) -> None:
    assert _exit_codes(_fail_on_one, tmp_path, ValueError("odd")) == [1, 1]
    assert "rank 1: ValueError: odd" in (tmp_path / "rank-1.err").read_text()
    assert "_fail_on_one" in log_path(tmp_path, 1).read_text()


def test_alone_the_exception_passes_on() -> None:
    ranks = runtime.Ranks(0, 1, 0, 1, torch.device("cpu"), "gloo")
    with pytest.raises(ValueError, match="odd"), runtime.fail_fast(ranks):
        raise ValueError("odd")


def test_system_exit_passes_on_with_peers_too() -> None:
    ranks = runtime.Ranks(0, 2, 0, 2, torch.device("cpu"), "gloo")
    with pytest.raises(SystemExit) as caught, runtime.fail_fast(ranks):
        sys.exit(75)
    assert caught.value.code == 75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT not"),
        ({"RANK": "x"} | dict.fromkeys(runtime.LAUNCH_VARIABLES[1:], "1"), "RANK='x' is not an"),
        ({"RANK": "1"} | dict.fromkeys(runtime.LAUNCH_VARIABLES[1:], "1"), "rank 1 of 1"),
    ],
)
def test_broken_launch_environments_are_named(
    no_launcher: None, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        runtime.start(CPU)
    assert not dist.is_initialized()


def _wait_for_absent_peer() -> str:
    mine = dist.new_group(backend="gloo")
    store = dist.distributed_c10d._get_default_store()
    runtime.shorten_timeouts(0.5, [mine])
    if dist.get_rank() == 1:
        # Leaving earlier would close the connection, another error.
        store.wait(["given up"], timedelta(seconds=500))
        return "late"
    messages = []
    for group in (mine, None):
        try:
            dist.all_reduce(torch.ones(1), group=group)
        except RuntimeError as error:
            messages.append("timed out" if "imed out" in str(error) else str(error))
    store.set("given up", "")
    return ", ".join(messages)


def test_shortened_timeouts_end_a_wait_for_a_lost_peer() -> None:
    assert run_ranks(_wait_for_absent_peer, 2)[0] == "timed out, timed out"


def test_threads_are_shared_or_as_asked() -> None:
    assert runtime.threads_per_rank(5, 2) == 5
    assert runtime.threads_per_rank(0, 1) == usable_cores()
    assert runtime.threads_per_rank(0, 10 * usable_cores()) == 1


def test_cuda_where_there_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"runtime\.device=cuda, but torch .* sees no accel"):
        pick_device("cuda")


def test_triton_kernels_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cpu = torch.device("cpu")
    check_kernels(KernelsConfig(), BF16, cpu)
    if find_spec("triton") is None:
        with pytest.raises(ConfigError, match=r"kernels\.cca=triton: triton is not installed"):
            check_kernels(KernelsConfig(cca="triton"), BF16, cpu)
        return
    check_kernels(KernelsConfig(cca="triton"), BF16, torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"kernels\.cca=triton: takes bf16 on NVIDIA GPUs"):
        check_kernels(KernelsConfig(cca="triton"), FP32, torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", "7.2")
    check_kernels(KernelsConfig(cca="triton"), FP32, torch.device("cuda", 0))
    monkeypatch.setattr(torch.version, "hip", None)
    check_kernels(KernelsConfig(cca="native"), BF16, cpu)
    with pytest.raises(ConfigError, match=r"kernels\.cca=native: computes on a CPU"):
        check_kernels(KernelsConfig(cca="native"), BF16, torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=r"kernels\.norm_residual=triton: needs a GPU, .* cpu"):
        check_kernels(KernelsConfig(norm_residual="triton"), BF16, cpu)


@pytest.mark.parametrize(
    ("kernels", "package", "how"),
    [
        (KernelsConfig(attention="flash_attn"), "flash_attn", "docker/pins.env"),
        (KernelsConfig(attention="aiter"), "aiter", "github.com/ROCm/aiter"),
        (
            KernelsConfig(grouped_mlp="transformer_engine"),
            "transformer_engine",
            "zaya-train[te]",
        ),
    ],
)
def test_libraries_that_are_not_there_are_refused_with_how_to_get_them(
    kernels: KernelsConfig, package: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zaya_train.runtime.device.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=f"={package}: {package} is not installed") as caught:
        check_kernels(kernels, BF16, torch.device("cuda", 0))
    assert how in str(caught.value)
    monkeypatch.setattr("zaya_train.runtime.device.find_spec", lambda name: name == package or None)
    check_kernels(kernels, BF16, torch.device("cuda", 0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigError, match=f"={package}: needs a GPU, this run is on cpu"):
        check_kernels(kernels, BF16, torch.device("cpu"))


def test_more_ranks_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == pick_device("cuda", 1) == torch.device("cuda", 1)
    for choice in ("auto", "cuda"):
        with pytest.raises(ConfigError, match="local rank 2 needs a device of its own"):
            pick_device(choice, 2)


def test_device_facts_are_those_of_this_machine() -> None:
    facts = describe(torch.device("cpu"))
    assert facts.torch_version == torch.__version__
    assert facts.cores == len(os.sched_getaffinity(0))
    assert facts.memory_bytes > 2**28
    assert facts.name


def test_seeds_repeat_and_differ_between_ranks() -> None:
    def draw(seed: int, rank: int) -> tuple[float, float, float]:
        seed_rank(seed, rank)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    draws = [draw(seed, rank) for seed in (0, 1) for rank in range(4)]
    assert draw(1, 2) == draws[6]
    for column in zip(*draws, strict=True):
        assert len(set(column)) == len(draws)
    seeds = {derive_seed(seed, stream) for seed in range(30) for stream in range(30)}
    assert len(seeds) == 900
    assert all(0 <= seed < 2**63 for seed in seeds)
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])


def test_later_signals_change_nothing_but_a_second_interrupt_does() -> None:
    with StopFlag() as flag:
        flag.arm()
        assert flag.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.received == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with StopFlag() as flag:
        flag.arm()
        os.kill(os.getpid(), signal.SIGINT)
        assert flag.received == signal.SIGINT


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_before_there_is_anything_to_save_asks_for_a_requeue(number: int) -> None:
    child = os.fork()
    if not child:
        with StopFlag():
            os.kill(os.getpid(), number)
            time.sleep(600)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75


IN_RENDEZVOUS = """
from datetime import timedelta
from torch.distributed import TCPStore
from zaya_train.runtime.signals import StopFlag
with StopFlag():
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    print("waiting", flush=True)
    store.wait(["a peer that does not come"], timedelta(hours=1))
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_rank_that_waits_in_c_for_its_peers_hears_a_signal(number: signal.Signals) -> None:
    command = [sys.executable, "-c", IN_RENDEZVOUS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as rank:
        assert rank.stdout and rank.stdout.readline() == b"waiting\n"
        rank.send_signal(number)
        said = rank.communicate(timeout=600)[1].decode()
    assert rank.returncode == 75 and said == f"{number.name} before the first step\n"


def test_handlers_are_given_back() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    flag = StopFlag()
    flag.install()
    assert all(signal.getsignal(number) not in before for number in STOP_SIGNALS)
    with pytest.raises(RuntimeError, match="already installed"):
        flag.install()
    flag.uninstall()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_every_rank_logs_to_its_file_and_rank_0_to_the_console(tmp_path: Path) -> None:
    shown = {}
    handlers = list(logging.getLogger().handlers)
    for rank in (0, 1):
        console = Console(file=StringIO(), width=200)
        with logging_to(tmp_path, rank, console):
            logging.getLogger("zaya_train.x").info("from rank %d", rank)
            logging.getLogger("zaya_train").error("said elsewhere", extra=FILE_ONLY)
            logging.getLogger("other").info("chatter")
            logging.getLogger("other").warning("matters")
            warnings.warn(f"old habit of {rank}", stacklevel=1)
        assert isinstance(console.file, StringIO)
        shown[rank] = console.file.getvalue()
    logging.getLogger("zaya_train.x").warning("after the context")
    for rank in (0, 1):
        lines = log_path(tmp_path, rank).read_text()
        assert f"INFO zaya_train.x: from rank {rank}" in lines
        assert "matters" in lines
        assert "said elsewhere" in lines
        assert "said elsewhere" not in shown[rank]
        assert f"old habit of {rank}" in lines
        assert "chatter" not in lines
        assert "after the context" not in lines
    assert "from rank 0" in shown[0]
    assert shown[1] == ""
    assert logging.getLogger().handlers == handlers


def test_a_record_is_one_line_unless_on_a_terminal(tmp_path: Path) -> None:
    for terminal in (False, True):
        console = Console(file=StringIO(), width=40, force_terminal=terminal)
        with logging_to(tmp_path, 0, console):
            logging.getLogger("zaya_train").info("step %d | %s", 7, "loss 1.0 | " * 9)
        assert isinstance(console.file, StringIO)
        assert (len(console.file.getvalue().splitlines()) == 1) != terminal


def test_a_resumed_run_continues_its_log(tmp_path: Path) -> None:
    for line in ("first", "second"):
        with logging_to(tmp_path, 1):
            logging.getLogger("zaya_train").info(line)
    text = log_path(tmp_path, 1).read_text()
    assert text.index("first") < text.index("second")


def test_a_log_on_a_full_disk_is_left_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    log_path(tmp_path, 1).parent.mkdir()
    log_path(tmp_path, 1).symlink_to("/dev/full")
    with logging_to(tmp_path, 1):
        logging.getLogger("zaya_train").info("no room for this")


def test_an_unwritable_log_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file in the way")
    with pytest.raises(StorageError, match="cannot write the log"), logging_to(tmp_path, 0):
        pass


def _fail_on_rank_one() -> None:
    if dist.get_rank() == 1:
        raise LookupError("the cause")
    dist.barrier()


def _die_on_rank_one() -> None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def _hang() -> None:
    time.sleep(60)


def test_harness_raises_the_first_failure_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*_fail_on_rank_one.*the cause"):
        run_ranks(_fail_on_rank_one, 2)


def test_harness_tells_of_a_death() -> None:
    with pytest.raises(RankError, match=r"rank 1: killed by SIGKILL|Connection"):
        run_ranks(_die_on_rank_one, 2)


def test_harness_kills_what_does_not_finish() -> None:
    with pytest.raises(RankError, match=r"not finished after 1 s\nrank 0: still running"):
        run_ranks(_hang, 2, timeout=1.0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_on_the_way_out_does_not_take_the_exit_code(number: signal.Signals) -> None:
    """The last thing this process does is to be told again to stop."""
    script = (
        "import atexit, os, sys; import zaya_train.__main__ as entry\n"
        "entry.main = lambda: 75\n"
        f"atexit.register(lambda: os.kill(os.getpid(), {number.value}))\n"
        "sys.exit(entry.command())"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 75


def test_ranks_on_a_cpu_share_the_machines_memory() -> None:
    whole = describe(torch.device("cpu")).memory_bytes / 1e9
    memory_gb, name = rank_memory(torch.device("cpu"), 4)
    assert memory_gb == pytest.approx(whole / 4) and name.endswith(" for each of 4 ranks")
