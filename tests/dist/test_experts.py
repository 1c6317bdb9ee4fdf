"""Expert parallelism alone: the all-to-all dispatcher against the local one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.dist.harness import Case, Setup, whole
from tests.helpers.distributed import run_ranks
from tests.helpers.traffic import Traffic, of_dtensors
from zaya_train.config.schema import KernelsConfig
from zaya_train.model.interfaces import LocalDispatcher
from zaya_train.parallel.collectives import Crossing
from zaya_train.parallel.experts import AllToAllDispatcher, divide_experts
from zaya_train.parallel.fsdp import local_row_start, write_full

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from zaya_train.config.schema import NativeKernelName
    from zaya_train.model.interfaces import TokenDispatcher

HIDDEN, EXPERTS, LAYERS = 5, 8, 2
SKIP = EXPERTS
CHOICES: dict[str, list[list[int]]] = {
    # Of every rank; ranks beyond the list start over.
    "mixed": [[3, 8, 0, 7, 0, 5, 2, 8, 3], [1, 1, 6, 4], [8, 2, 5, 5, 7, 0], [0, 7, 3]],
    "one expert takes everything": [[5, 5, 5], [5], [5, 5], [5, 5, 5, 5]],
    "a rank without tokens": [[], [3, 0, 8, 7], [], [1, 8]],
    "no tokens at all": [[]],
    "everything skips": [[8, 8, 8], [8]],
    "one rank's experts are idle": [[0, 1, 6, 7, 0], [6, 1, 8]],
    "in order": [[0, 1, 2, 3, 4, 5, 6, 7]],
}


def world() -> ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def choice_of(name: str, rank: int) -> Tensor:
    return torch.tensor(CHOICES[name][rank % len(CHOICES[name])], dtype=torch.int64)


def tokens_of(rank: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64)


def pass_through(
    dispatcher: TokenDispatcher,
    tokens: Tensor,
    choice: Tensor,
    experts: Tensor,
    permute: NativeKernelName = "eager",
) -> tuple[Tensor, Tensor, Tensor]:
    """Dispatch, multiply each expert's rows by its matrix, combine; rows, output, token gradient.
    `experts` [E_local, D, D] collects its own gradient."""
    tokens = tokens.clone().requires_grad_()
    route = dispatcher.route(choice, EXPERTS, KernelsConfig(moe_permute=permute))
    going = dispatcher.start_dispatch(tokens, route)
    rows = dispatcher.finish_dispatch(going)
    pieces = zip(torch.split(rows, route.counts.tolist()), experts, strict=True)
    done = torch.cat([piece @ matrix for piece, matrix in pieces])
    pending = dispatcher.start_combine(done, route)
    probability = 1 + tokens.detach()[:, 0].abs()
    out = dispatcher.finish_combine(pending, going.tokens, probability)
    torch.autograd.backward((out * torch.arange(1.0, HIDDEN + 1)).square().sum())
    assert tokens.grad is not None
    return rows.detach(), out.detach(), tokens.grad


def against_the_local_one(name: str, permute: NativeKernelName = "eager") -> dict[str, float]:
    """Largest differences; in fp32 of all but eager, which alone takes fp64."""
    dtype = torch.float64 if permute == "eager" else torch.float32
    if permute == "triton":
        from zaya_kernels.workshop.interpreter import install

        install()
    group = world()
    rank, ranks = group.rank(), group.size()
    matrices = tokens_of(99, EXPERTS * HIDDEN).view(EXPERTS, HIDDEN, HIDDEN).to(dtype)
    held = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    mine = matrices[held].clone().requires_grad_()
    choices = [choice_of(name, r) for r in range(ranks)]
    tokens = [tokens_of(r, len(choice)).to(dtype) for r, choice in enumerate(choices)]
    dispatcher = AllToAllDispatcher(group)
    rows, out, grad = pass_through(dispatcher, tokens[rank], choices[rank], mine, permute)

    everything = matrices.clone().requires_grad_()
    flat = pass_through(LocalDispatcher(), torch.cat(tokens), torch.cat(choices), everything)
    # The local one sorts all ranks' tokens by expert, stably: of each expert, by sender.
    counts = torch.bincount(torch.cat(choices), minlength=EXPERTS + 1)[:EXPERTS]
    first, last = int(counts[: held.start].sum()), int(counts[: held.stop].sum())
    sizes = [len(choice) for choice in choices]
    assert rows.shape == flat[0][first:last].shape
    pairs = {
        "rows": (rows, flat[0][first:last]),
        "out": (out, torch.split(flat[1], sizes)[rank]),
        "gradient": (grad, torch.split(flat[2], sizes)[rank]),
    }
    if mine.grad is not None or everything.grad is not None:
        assert mine.grad is not None and everything.grad is not None
        pairs["experts' gradient"] = (mine.grad, everything.grad[held])
    return {n: float((a - b).abs().max()) for n, (a, b) in pairs.items() if a.numel()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", CHOICES)
def test_equals_the_local_dispatcher(name: str, ranks: int) -> None:
    for errors in run_ranks(against_the_local_one, ranks, name):
        assert {n: e for n, e in errors.items() if e > 1e-12} == {}


class _Waits(torch.autograd.Function):
    """Runs a function in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, then: Callable[[], None]) -> Tensor:
        ctx.then = then
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.then()
        return grad, None


def others_start_when_rank_0_is_between() -> list[str]:
    """Rank 0 says in the store that it has launched an exchange and not yet awaited it; the others
    launch theirs only then. A start that waited for them would never end."""
    group, store, said = world(), _get_default_store(), []
    rank = group.rank()

    def launched(what: str) -> None:
        store.set(what, "1")
        said.append(what)

    def not_before(what: str) -> None:
        store.wait([what])
        said.append(what)

    def between(what: str) -> None:
        if rank == 0:
            launched(what)

    def before(what: str) -> None:
        if rank != 0:
            not_before(what)

    dispatcher = AllToAllDispatcher(group)
    choice = choice_of("mixed", rank)
    route = dispatcher.route(choice, EXPERTS, KernelsConfig())
    tokens = tokens_of(rank, len(choice)).requires_grad_()
    before("dispatch")
    pending = dispatcher.start_dispatch(tokens, route)
    between("dispatch")
    rows = dispatcher.finish_dispatch(pending)
    before("combine")
    leaving = dispatcher.start_combine(rows, route)
    between("combine")
    base = _Waits.apply(tokens, partial(between, "gradients"))  # type: ignore[no-untyped-call]
    out = dispatcher.finish_combine(leaving, base, torch.ones(len(choice)))
    out = _Waits.apply(out, partial(before, "gradients"))  # type: ignore[no-untyped-call]
    torch.autograd.backward(out.sum())
    assert tokens.grad is not None and torch.equal(tokens.grad, torch.ones_like(tokens))
    return said


def test_work_between_start_and_finish_runs_while_rows_travel() -> None:
    for said in run_ranks(others_start_when_rank_0_is_between, 2):
        assert said == ["dispatch", "combine", "gradients"]


def host_reads() -> tuple[list[str], list[str]]:
    """Ways by which the host reads a tensor, while a route is made and everywhere else."""
    dispatcher, rank = AllToAllDispatcher(world()), world().rank()
    choice = choice_of("mixed", rank)
    tokens = tokens_of(rank, len(choice)).requires_grad_()
    reads: list[str] = []
    for name in ("tolist", "item", "cpu", "nonzero", "__bool__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)

        def noted(*arguments: Any, _original: Any = original, _name: str = name) -> Any:
            reads.append(_name)
            return _original(*arguments)

        setattr(torch.Tensor, name, noted)
    route = dispatcher.route(choice, EXPERTS, KernelsConfig())
    of_route = list(reads)
    rows = dispatcher.finish_dispatch(dispatcher.start_dispatch(tokens, route))
    leaving = dispatcher.start_combine(rows, route)
    out = dispatcher.finish_combine(leaving, tokens, torch.ones(len(choice)))
    torch.autograd.backward(out.sum())
    return of_route, reads[len(of_route) :]


def test_the_host_reads_the_split_sizes_and_nothing_else() -> None:
    assert run_ranks(host_reads, 2) == [(["tolist"], [])] * 2


class Order(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What runs while each exchange of rows is under way."""

    def __init__(self, monkey: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flights: list[list[str]] = []
        self.open = False
        begin, wait = Crossing.begin, Crossing.wait

        def begun(crossing: Crossing, *arguments: Any) -> Tensor:
            out = begin(crossing, *arguments)
            self.flights.append([])
            self.open = True
            return out

        def waited(crossing: Crossing) -> Tensor:
            self.open = False
            return wait(crossing)

        monkey.setattr(Crossing, "begin", begun)
        monkey.setattr(Crossing, "wait", waited)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if of_dtensors(types):
            return NotImplemented
        if self.open:
            self.flights[-1].append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def work_of_a_layer_under_way() -> list[list[str]]:
    """Operations within each exchange's flight."""
    setup = Setup.of(Case(shard=2, expert=2))
    batch = setup.batches(0)[0]
    with pytest.MonkeyPatch.context() as monkey, Order(monkey) as order:
        out = setup.model(batch.tokens, batch.labels, batch.layout)
        torch.autograd.backward(out.loss)
    flights: list[list[str]] = order.flights
    return flights


def test_a_layer_works_while_rows_travel() -> None:
    """Per layer: there and back, then the gradients of back and of there."""
    for flights in run_ranks(work_of_a_layer_under_way, 2):
        there, back, gradients, home = flights[0], flights[1], flights[-2], flights[-1]
        assert len(flights) == 4 * LAYERS
        # The order of arrival; what skipped tokens put out; its gradient.
        assert "sort" in there or "argsort" in there
        assert "where" in back and "where" in gradients
        # Nothing else of a layer can do without both the tokens and their gradients.
        assert home == []


def bytes_sent(name: str) -> tuple[int, int]:
    """(rows' bytes this rank hands to the all-to-all, forward; host waits besides)."""
    group = world()
    choice = choice_of(name, group.rank())
    dispatcher = AllToAllDispatcher(group)
    route = dispatcher.route(choice, EXPERTS, KernelsConfig())
    with Traffic() as traffic:
        tokens = tokens_of(group.rank(), len(choice))
        dispatcher.finish_dispatch(dispatcher.start_dispatch(tokens, route))
    return traffic.sent_bytes("all_to_all"), int((choice != SKIP).sum()) * HIDDEN * 8


@pytest.mark.parametrize("name", CHOICES)
def test_skipped_tokens_do_not_travel(name: str) -> None:
    for sent, expected in run_ranks(bytes_sent, 2, name):
        assert sent == expected


def rows_of_division(experts: int, expert: int) -> tuple[int, list[int], float]:
    """Start row, local shape and largest error of a tensor written in full and read back."""
    mesh = Setup.of(Case(shard=4, expert=expert, experts=experts)).model.layers[0]
    parameter = mesh.get_parameter("moe.experts.down")
    assert isinstance(parameter, DTensor)
    full = torch.arange(parameter.numel(), dtype=torch.float32).view(parameter.shape)
    with torch.no_grad():
        write_full(parameter, full)
    error = float((whole(parameter) - full).abs().max())
    return local_row_start(parameter), list(parameter.to_local().shape), error


@pytest.mark.parametrize(
    ("experts", "expert", "starts", "counts"),
    [
        (8, 2, [0, 4, 2, 6], [2, 2, 2, 2]),
        (8, 4, [0, 2, 4, 6], [2, 2, 2, 2]),
        # Three experts a rank pair: two and one. One: one and none.
        (6, 2, [0, 3, 2, 5], [2, 2, 1, 1]),
        (2, 2, [0, 1, 1, 2], [1, 1, 0, 0]),
    ],
)
def test_experts_are_divided_first_and_sharded_then(
    experts: int, expert: int, starts: list[int], counts: list[int]
) -> None:
    found = run_ranks(rows_of_division, 4, experts, expert)
    assert [start for start, _, _ in found] == starts
    assert [shape[0] for _, shape, _ in found] == counts
    assert all(error == 0 for _, _, error in found)


def divided_on_meta() -> tuple[str, list[int]]:
    with torch.device("meta"):
        experts = torch.nn.ParameterDict({"gate_up": torch.empty(8, 4, 3)})
    divide_experts(experts, init_device_mesh("cpu", (2,), mesh_dim_names=("expert",)))
    divided = experts["gate_up"]
    assert isinstance(divided, DTensor)
    return divided.to_local().device.type, list(divided.to_local().shape)


def test_dividing_allocates_nothing() -> None:
    assert run_ranks(divided_on_meta, 2) == [("meta", [4, 4, 3])] * 2


def test_undivided_experts_are_refused() -> None:
    def call() -> None:
        AllToAllDispatcher(world()).own_experts(torch.zeros(4, 2))

    with pytest.raises(Exception, match="expert weights have not been divided"):
        run_ranks(call, 1)


def moved_bias(recompute: str) -> list[float]:
    """Losses' gradients after the biases moved between forward and backward; per rank norms."""
    setup = Setup.of(Case(shard=2, expert=2, recompute=recompute))
    batch = setup.batches(0)[0]
    out = setup.model(batch.tokens, batch.labels, batch.layout)
    if recompute != "none":
        with torch.no_grad():
            for name, bias in setup.model.named_buffers():
                assert name.endswith("balancing_bias")
                bias[1] += 9
    out.loss.backward()
    grads = [whole(p.grad) for p in setup.model.parameters() if p.grad is not None]
    return [float(g.double().norm()) for g in grads]


def test_recompute_sends_tokens_where_they_went() -> None:
    expected = run_ranks(moved_bias, 2, "none")
    for recompute in ("selective", "full"):
        found = run_ranks(moved_bias, 2, recompute)
        assert found == expected
