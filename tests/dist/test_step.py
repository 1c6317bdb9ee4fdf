"""What a step does when something is not finite, and what rides along on its reduction."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.dist.harness import ROWS, Case, Setup, digest, rows_of_step
from tests.helpers.distributed import RankError, run_ranks
from zaya_train.config.errors import NumericsError
from zaya_train.parallel.apply import chunking_of
from zaya_train.runtime.peaks import Peaks
from zaya_train.train import step
from zaya_train.train.batch import Batch, make_batch, without_labels
from zaya_train.train.guard import Guard, Incidents
from zaya_train.train.loop import Hooks, PhaseRun, load_summary, run_phase
from zaya_train.train.metrics import MetricsWriter, read_metrics
from zaya_train.train.state import TrainState
from zaya_train.train.step import Rates, StepResult, train_step
from zaya_train.train.throughput import Throughput
from zaya_train.train.trace import RoutingTrace

if TYPE_CHECKING:
    from pathlib import Path


def _to_nan(gradient: Tensor) -> Tensor:
    return gradient * math.nan


class NaNGradient:
    """While it is `on`, the gradient that flows back into the first layer is NaN on this rank."""

    def __init__(self, setup: Setup, rank: int) -> None:
        self.on = False
        self.mine = dist.get_rank() == rank
        layer: nn.Module = setup.model.layers[0]
        layer.register_forward_hook(self._hook)

    def _hook(self, module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        if self.on and self.mine and outputs[0].requires_grad:
            outputs[0].register_hook(_to_nan)  # type: ignore[no-untyped-call]


def everything(setup: Setup) -> str:
    """This rank's bits of weights, biases and optimizer state."""
    local = dict(setup.model.named_parameters()) | dict(setup.model.named_buffers())
    return digest({**local, **setup.optimizer.tensors()})


def one_bad_step(case: Case) -> tuple[list[StepResult], list[str]]:
    setup = Setup.of(case)
    poison = NaNGradient(setup, rank=1)
    results, states = [setup.step(0)], [everything(setup)]
    poison.on = True
    results.append(setup.step(1))
    states.append(everything(setup))
    poison.on = False
    results.append(setup.step(2))
    states.append(everything(setup))
    return results, states


@pytest.mark.parametrize(
    "case", [Case(shard=2), Case(replicate=2), Case(context=2)], ids=lambda case: case.name
)
def test_nan_on_one_rank_skips_the_step_on_all(case: Case) -> None:
    for results, states in run_ranks(one_bad_step, 2, case):
        assert [r.applied for r in results] == [True, False, True]
        assert math.isnan(results[1].grad_norm)
        # The forward pass was sound: it is the gradient that was not.
        assert math.isfinite(results[1].loss)
        assert states[1] == states[0] != states[2]


@dataclass(frozen=True)
class Fault:
    """What happens to one rank's copy of the reduced gradient."""

    rank: int
    name: str
    factor: float

    def strike(self, setup: Setup) -> None:
        if dist.get_rank() != self.rank:
            return
        gradient = setup.optimizer.shards[self.name].grad
        if self.factor:
            gradient.mul_(self.factor)
        else:
            gradient.view(torch.int32).flatten()[-1] ^= 1


SCALE = "norm.weight"
"""A parameter every rank holds a part of."""


def struck(case: Case, faults: list[Fault]) -> tuple[str, float, bool]:
    """A good step, then one in which gradients change after they are reduced; what came of it,
    its norm and whether it left this rank's state alone."""
    setup = Setup.of(case)
    setup.step(0)
    before, reduce = everything(setup), step._reduce

    def then_strike(loss: Tensor, load: Tensor, stop: int) -> tuple[Tensor, Tensor, int]:
        for fault in faults:
            fault.strike(setup)
        return reduce(loss, load, stop)

    step._reduce = then_strike  # type: ignore[assignment]
    try:
        result = setup.step(1)
    except NumericsError as error:
        return str(error), 0.0, everything(setup) == before
    return "", result.grad_norm, everything(setup) == before


@pytest.mark.parametrize("factor", [math.nan, math.inf, 1.001, 0.0], ids=["nan", "inf", "x", "bit"])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_replica_with_another_gradient_stops_all_ranks(factor: float, rank: int) -> None:
    faults = [Fault(rank, SCALE, factor)]
    outcomes = run_ranks(struck, 4, Case(replicate=2, shard=2), faults)
    message = outcomes[0][0]
    assert outcomes == [(message, 0.0, True)] * 4
    norms = re.findall(r"norm (\S+) on replica (\d)", message)
    assert [replica for _, replica in norms] == ["0", "1"]
    assert f"copies on ranks {rank % 2}, {rank % 2 + 2} must be equal" in message
    finite = [math.isfinite(float(norm)) for norm, _ in norms]
    assert finite[1 - rank // 2] and finite[rank // 2] == math.isfinite(factor)


def test_equal_replicas_that_are_not_finite_skip_together() -> None:
    faults = [Fault(0, SCALE, math.nan), Fault(2, SCALE, -math.nan)]
    for message, norm, unchanged in run_ranks(struck, 4, Case(replicate=2, shard=2), faults):
        assert message == "" and math.isnan(norm) and unchanged


def test_three_replicas_name_the_odd_one() -> None:
    for message, _, _ in run_ranks(struck, 3, Case(replicate=3), [Fault(1, SCALE, 2.0)]):
        assert re.search(
            r"norm \S+ on replica 0, 2; norm \S+ on replica 1; copies on ranks 0, 1, 2", message
        )


def test_a_fault_of_the_only_copy_is_like_any_gradient() -> None:
    for message, norm, unchanged in run_ranks(struck, 2, Case(shard=2), [Fault(1, SCALE, 1.001)]):
        assert message == "" and math.isfinite(norm) and not unchanged


class Steps(Iterator[list[Batch]]):
    """The same micro-batches for ever."""

    wait_seconds = 0.0

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __next__(self) -> list[Batch]:
        return self.batches


def phase_run(setup: Setup, folder: Path, saved: list[int], stop: list[int]) -> PhaseRun:
    """A phase of eight steps of four rows; `stop` holds the signal this rank has received."""

    def save(state: TrainState, keep: bool) -> None:
        saved.append(state.step)

    return PhaseRun(
        name="short",
        phase=setup.config.plan.phases["short"],
        model=setup.model,
        optimizer=setup.optimizer,
        optim=setup.config.optim,
        reduction=setup.reduction,
        unit=setup.mesh.layout.data,
        num_experts=setup.config.model.num_experts,
        metrics=MetricsWriter(folder, enabled=dist.get_rank() == 0),
        log_every_steps=1,
        eval_every_steps=0,
        save_every_steps=3,
        guard=Guard(
            setup.config.guard,
            Incidents(folder, 1, enabled=dist.get_rank() == 0),
            "short",
            lambda consumed: [[consumed + 0, consumed + 2], [consumed + 1, consumed + 3]],
        ),
        drawn=lambda rows: {"problems": rows},
        trace=RoutingTrace(folder, setup.config.logging, enabled=False),
        hooks=Hooks(
            evaluate=lambda state: None,
            save=save,
            first_step_done=lambda: None,
            progress=lambda state, result: None,
            stop_signal=lambda: stop[0],
            memory_bytes=lambda: 0,
            mark=lambda part, number: None,
            step_done=lambda seconds, data_seconds: None,
        ),
        throughput=Throughput(setup.config.model, dist.get_world_size(), Peaks("", None, "", 1e9)),
    )


def bad_from_step(first_bad: int, good_again: int, folder: Path) -> tuple[int, int, list[int]]:
    """Run a phase in which steps first_bad .. good_again - 1 are poisoned (0-based)."""
    setup = Setup.of(Case(shard=2))
    poison, saved = NaNGradient(setup, rank=1), list[int]()
    run = phase_run(setup, folder, saved, [0])
    inner = setup.batches(0)

    class Counting(Steps):
        count = 0

        def __next__(self) -> list[Batch]:
            poison.on = first_bad <= self.count < good_again
            self.count += 1
            return self.batches

    state, _ = run_phase(run, Counting(inner), TrainState())
    return state.step, state.skipped_steps, saved


def test_five_skipped_steps_in_a_row_stop_the_run(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="NumericsError: step 7: 5 steps in a row") as caught:
        run_ranks(bad_from_step, 2, 2, 99, tmp_path)
    assert "rank 1" in str(caught.value)
    rows = [row for row in read_metrics(tmp_path) if row["kind"] == "step"]
    assert [row["applied"] for row in rows] == [True] * 2 + [False] * 5


def test_four_skipped_steps_in_a_row_do_not(tmp_path: Path) -> None:
    for steps, skipped, saved in run_ranks(bad_from_step, 2, 2, 6, tmp_path):
        # What is due while steps are skipped is saved once one is applied again.
        assert (steps, skipped, saved) == (8, 4, [7])


def stopped_after(step: int, folder: Path) -> tuple[int, bool, list[int]]:
    """Rank 1 alone hears SIGTERM during step `step` (1-based)."""
    setup = Setup.of(Case(shard=2))
    saved, stop = list[int](), [0]
    run = phase_run(setup, folder, saved, stop)

    class Interrupted(Steps):
        count = 0

        def __next__(self) -> list[Batch]:
            self.count += 1
            stop[0] = 15 if self.count >= step and dist.get_rank() == 1 else 0
            return self.batches

    state, stopped = run_phase(run, Interrupted(setup.batches(0)), TrainState())
    return state.step, stopped, saved


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    for outcome in run_ranks(stopped_after, 2, 5, tmp_path):
        assert outcome == (5, True, [3, 5])


def test_a_signal_in_the_last_step_leaves_the_phase_whole(tmp_path: Path) -> None:
    # The phase's end is saved by the caller and the next phase hears the signal again.
    for outcome in run_ranks(stopped_after, 2, 8, tmp_path):
        assert outcome == (8, False, [3, 6])


def heard_signals() -> list[int]:
    setup = Setup.of(Case(shard=2))
    heard = []
    for signals in ((0, 0), (0, 15), (10, 0), (10, 15)):
        rates, mine = Rates(0.0, 0.0, 0.0), signals[dist.get_rank()]
        result = train_step(
            setup.model,
            setup.optimizer,
            setup.batches(0),
            rates,
            setup.reduction,
            stop_signal=mine,
        )
        heard.append(result.stop_signal)
    return heard


def test_every_rank_hears_the_largest_signal() -> None:
    assert run_ranks(heard_signals, 2) == [[0, 15, 10, 15]] * 2


def nothing_supervised() -> tuple[StepResult, bool]:
    setup = Setup.of(Case(shard=2))
    rates = Rates(0.1, 0.1, 1.0)
    batches = [without_labels(batch) for batch in setup.batches(0)]
    result = train_step(setup.model, setup.optimizer, batches, rates, setup.reduction)
    finite = all(bool(p.isfinite().all()) for p in setup.full().values())
    return result, finite


def test_a_step_that_supervises_nothing_is_harmless() -> None:
    for result, finite in run_ranks(nothing_supervised, 2):
        assert (result.loss, result.grad_norm, result.supervised, finite) == (0.0, 0.0, 0, True)


def loads_of(case: Case) -> list[list[float]]:
    return Setup.of(case).step(0).load.tolist()


def test_load_counts_every_real_token_once() -> None:
    real = sum(int(row.document_lengths.sum()) for row in rows_of_step(0))
    for case in (Case(shard=2), Case(context=2, micro_rows=ROWS)):
        for load in run_ranks(loads_of, 2, case):
            assert [sum(layer) for layer in load] == [real, real]


def dtypes_in_bf16() -> dict[str, set[str]]:
    setup = Setup.of(Case(shard=2), **{"precision.compute_dtype": "bf16"})
    seen: dict[str, set[str]] = {"stream": set(), "block": set(), "gathered": set()}

    def layer_hook(module: nn.Module, inputs: tuple[Tensor, ...], outputs: Any) -> None:
        seen["stream"] |= {str(inputs[0].dtype), str(outputs[0].dtype)}
        seen["gathered"] |= {str(parameter.dtype) for parameter in module.parameters()}

    def block_hook(module: nn.Module, inputs: Any, outputs: tuple[Tensor, Tensor]) -> None:
        seen["block"].add(str(outputs[0].dtype))

    for layer in setup.model.layers:
        layer.register_forward_hook(layer_hook)
        layer.get_submodule("attention").register_forward_hook(block_hook)
    losses = [setup.step(number).loss for number in range(3)]
    assert all(math.isfinite(loss) for loss in losses), losses
    tensors = dict(setup.model.named_parameters()) | setup.optimizer.tensors()
    seen["kept"] = {str(t.dtype) for n, t in tensors.items() if not n.endswith("steps")}
    seen["biases"] = {str(buffer.dtype) for buffer in setup.model.buffers()}
    return seen


def test_bf16_computes_in_bf16_and_keeps_the_stream_and_all_state_in_fp32() -> None:
    for seen in run_ranks(dtypes_in_bf16, 2):
        assert seen["stream"] == {"torch.float32"}
        assert seen["block"] == {"torch.bfloat16"}
        assert seen["kept"] == seen["biases"] == {"torch.float32"}


def parameters_around_an_evaluation() -> tuple[set[str], set[str], bool]:
    setup = Setup.of(Case(shard=2), **{"precision.compute_dtype": "bf16"})
    before = dict(setup.model.named_parameters())
    setup.validation()
    after = dict(setup.model.named_parameters())
    same = all(after[name] is parameter for name, parameter in before.items())
    kinds = {type(p).__name__ for p in after.values()}
    return kinds, {str(p.dtype) for p in after.values()}, same


def test_an_evaluation_leaves_the_sharded_weights_in_place() -> None:
    for kinds, dtypes, same in run_ranks(parameters_around_an_evaluation, 2):
        assert (kinds, dtypes, same) == ({"DTensor"}, {"torch.float32"}, True)


def batch_parts() -> list[tuple[int, list[list[int]], list[list[int]]]]:
    parts = []
    setup = Setup.of(Case(context=2))
    chunking = chunking_of(setup.mesh, setup.config)
    for rank in range(2):
        batch = make_batch(rows_of_step(0), chunking, rank, torch.device("cpu"))
        positions = batch.layout.positions.tolist()
        parts.append((batch.supervised, batch.tokens.tolist(), positions))
    return parts


def test_the_parts_of_a_batch_make_up_the_rows() -> None:
    parts = run_ranks(batch_parts, 2)[0]
    rows = rows_of_step(0)
    assert sum(supervised for supervised, _, _ in parts) == sum(
        int((row.labels != -100).sum()) for row in rows
    )
    for number, row in enumerate(rows):
        (_, first, first_positions), (_, second, second_positions) = parts
        tokens = first[number][:8] + second[number] + first[number][8:]
        assert tokens == row.tokens.tolist()
        positions = first_positions[number][:8] + second_positions[number]
        positions += first_positions[number][8:]
        starts = {0, *row.document_lengths.cumsum().tolist()} - {len(tokens)}
        assert {t for t, position in enumerate(positions) if position == 0} == starts


def test_load_summary_by_hand() -> None:
    load = torch.tensor([[2.0, 2.0, 0.0], [3.0, 0.0, 1.0]], dtype=torch.float64)
    summary = load_summary(load, 2)
    assert summary["load"] == [[0.5, 0.5, 0.0], [0.75, 0.0, 0.25]]
    assert summary["load_entropy"] == pytest.approx(0.5)
    assert summary["skip_rate"] == pytest.approx(0.125)
    assert summary["max_violation"] == pytest.approx(1.0)
    passed_over = load_summary(torch.zeros_like(load), 2)
    assert passed_over["load"] == [[0.0] * 3] * 2
    assert all(math.isnan(passed_over[k]) for k in ("load_entropy", "skip_rate", "max_violation"))
    # All tokens past the experts is a collapse, and is told as one.
    skipping = load_summary(torch.tensor([[0.0, 0.0, 4.0]], dtype=torch.float64), 2)
    assert (skipping["load_entropy"], skipping["skip_rate"]) == (0.0, 1.0)


def freed_between_phases() -> bool:
    """Whether a model built for one phase is gone when its last reference is."""
    import gc
    import weakref

    setup = Setup.of(Case(shard=2))
    setup.step(0)
    watch = weakref.ref(setup.model)
    del setup
    gc.collect()
    return watch() is None


def test_a_finished_phases_model_can_be_freed() -> None:
    assert run_ranks(freed_between_phases, 2) == [True, True]
