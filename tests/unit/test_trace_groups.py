"""Time by operation, on small traces written by hand: a GPU's too, which no machine here has."""

from __future__ import annotations

from typing import Any

import pytest

from zaya_train.config.errors import DataError
from zaya_train.tools.trace_groups import GROUPS, STEP, time_by_group


def span(name: str, start: float, end: float, thread: int = 1, **more: Any) -> dict[str, Any]:
    named = {"ph": "X", "cat": "cpu_op", "name": name, "ts": start, "dur": end - start}
    return {**named, "tid": thread, "args": {}, **more}


def arrow(number: int, start: float, end: float, threads: tuple[int, int] = (1, 1)) -> list[Any]:
    """From an operation that starts at `start` to its backward pass at `end`."""
    ends = (("s", start, threads[0]), ("f", end, threads[1]))
    return [
        {"ph": ph, "cat": "fwdbwd", "name": "fwdbwd", "id": number, "tid": thread, "ts": ts}
        for ph, ts, thread in ends
    ]


def launch(number: int, start: float, thread: int = 1) -> dict[str, Any]:
    more = {"cat": "cuda_runtime", "args": {"correlation": number}}
    return span("hipLaunchKernel", start, start + 1, thread, **more)


def kernel(name: str, number: int, micros: float, cat: str = "kernel") -> dict[str, Any]:
    return span(name, 5000, 5000 + micros, 99, cat=cat, args={"correlation": number})


FORWARD = [
    span("zaya::forward", 0, 400),
    span("zaya::cca", 10, 200),
    span("aten::mm", 20, 60),
    span("zaya::attention", 100, 150),
    span("aten::mul", 110, 120),
    span("zaya::moe", 200, 300),
    span("zaya::router", 200, 220),
    span("zaya::grouped_mlp", 230, 280),
]
BACKWARD = [
    span("zaya::backward", 400, 800),
    span("autograd::engine::evaluate_function: MulBackward0", 410, 450),
    span("MulBackward0", 415, 440),
    span("aten::mul", 420, 430),
    *arrow(1, 110, 415),
    span("autograd::engine::evaluate_function: MmBackward0", 460, 560),
    span("MmBackward0", 465, 550),
    # Made again in the backward pass of something else.
    span("zaya::norm_residual", 470, 480),
    span("FSDP::post_backward_reduce", 500, 520),
    *arrow(2, 20, 465),
    span("zaya::optimizer", 800, 990),
    span("c10d::allreduce_", 810, 830),
    span("zaya::newton_schulz", 850, 900),
]
HOST = {"traceEvents": [span(STEP, 0, 1000), *FORWARD, *BACKWARD]}


def micros(trace: dict[str, Any]) -> dict[str, float]:
    found = time_by_group(trace).seconds
    return {name: round(1e6 * seconds, 3) for name, seconds in found.items() if seconds}


def test_host_time_goes_to_the_innermost_that_says_something() -> None:
    assert micros(HOST) == {
        "cca": (190 - 50) + (100 - 10 - 20),
        "attention": 50 + 40,
        "norm_residual": 10,
        "router": 20,
        "moe": 80,
        "optimizer": 190 - 20,
        "collectives": 20 + 20,
        "other": 10 + (400 - 190 - 100) + (400 - 40 - 100),
    }


def test_the_groups_add_up_to_the_step() -> None:
    found = time_by_group(HOST)
    assert tuple(found.seconds) == GROUPS and found.clock == "host"
    assert sum(found.seconds.values()) == pytest.approx(found.total_seconds)
    assert found.total_seconds == found.step_seconds == pytest.approx(1e-3)


def test_what_other_threads_do_is_not_the_steps() -> None:
    loader = [span("zaya::cca", 0, 5000, thread=7)]
    assert time_by_group({"traceEvents": [*HOST["traceEvents"], *loader]}) == time_by_group(HOST)


def test_kernels_go_to_what_launched_them() -> None:
    # A device's backward pass runs on a thread of its own, below no range of the step.
    events = [
        span(STEP, 0, 1000),
        *FORWARD,
        span("autograd::engine::evaluate_function: MulBackward0", 410, 450, 2),
        span("MulBackward0", 415, 440, 2),
        *arrow(1, 110, 415, (1, 2)),
        launch(1, 22),
        launch(2, 112),
        launch(3, 418, 2),
        launch(4, 240),
        launch(5, 390),
        kernel("gemm", 1, 100),
        kernel("flash", 2, 40),
        kernel("flash_backward", 3, 80),
        kernel("memset", 4, 5, "gpu_memset"),
        kernel("ncclDevKernel_ReduceScatter", 5, 30),
        kernel("copy", 5, 7, "gpu_memcpy"),
        kernel("unknown", 77, 3),
        # Ranges shown on the device's own line are no work.
        kernel("zaya::cca", 0, 900, "gpu_user_annotation"),
    ]
    trace = {"traceEvents": events}
    assert micros(trace) == {
        "cca": 100,
        "attention": 120,
        "moe": 5,
        "collectives": 30,
        "other": 10,
    }
    found = time_by_group(trace)
    assert found.clock == "device"
    assert found.total_seconds == pytest.approx(265e-6)
    assert found.step_seconds == pytest.approx(1e-3)


def test_kernels_launched_outside_of_the_steps_are_not_theirs() -> None:
    before, inside = span("aten::mm", 0, 50), span("aten::mm", 300, 350)
    launches = [launch(1, 10), launch(2, 310)]
    events = [before, inside, *launches, span(STEP, 200, 900)]
    found = time_by_group({"traceEvents": [*events, kernel("a", 1, 70), kernel("b", 2, 20)]})
    assert found.total_seconds == pytest.approx(20e-6)
    assert sum(found.seconds.values()) == pytest.approx(20e-6)


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(DataError, match="holds no range named zaya::step"):
        time_by_group({"traceEvents": FORWARD})
