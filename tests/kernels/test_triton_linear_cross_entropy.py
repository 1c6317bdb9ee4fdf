"""Triton loss, interpreted, against float64 and against eager torch; its memory and operations."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zaya_kernels.launch import ARCHITECTURES, COMPUTE_UNITS, INTERPRETED, recording
from zaya_kernels.linear_cross_entropy.op import (
    linear_cross_entropy,
    linear_cross_entropy_and_z,
)

from zaya_train.config.labels import IGNORE_LABEL

from ..helpers.kernels import assert_bitwise, assert_no_worse, random, run_pass
from .test_linear_cross_entropy import labels_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.linear_cross_entropy import triton as host
from zaya_kernels.workshop.interpreter import counting

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    # Columns past the last block of scores are never written; their products are not stored.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]

HIDDEN = 32
FULL = (16_384, 262_272, 2048)


def inputs_of(
    tokens: int, vocab: int, dtype: torch.dtype, hidden: int = HIDDEN
) -> dict[str, Tensor]:
    weight = random(vocab, hidden, seed=2) * hidden**-0.5
    return {"hidden": random(tokens, hidden, seed=1, dtype=dtype), "weight": weight.to(dtype)}


def call(
    labels: Tensor, backend: str, x: Mapping[str, Tensor], z_loss: float = 0.0
) -> Sequence[Tensor]:
    return [linear_cross_entropy(x["hidden"], x["weight"], labels, backend, z_loss)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 rows, several blocks each way, several sums of the hidden states' gradient."""
    monkeypatch.setitem(COMPUTE_UNITS, INTERPRETED, 8)
    monkeypatch.setattr(host, "SCORE_BYTES", 1)
    small = {"BM": 32, "BN": 32, "BK": 16, "BT": 2, "BLOCK": 512}
    # A wider block than the scores' and a shorter one.
    blocks = {"loss_grad_hidden": small | {"BM": 16, "BN": 16}}
    blocks["loss_grad_weight"] = small | {"BM": 64, "BN": 16}
    for tables in (host.CONFIGS, host.WIDE_CONFIGS):
        for name, table in tables.items():
            kept = {key: blocks.get(name, small)[key] for key in table[INTERPRETED].blocks}
            config = replace(table[INTERPRETED], blocks=kept)
            monkeypatch.setitem(tables, name, {**table, INTERPRETED: config})


SHAPES = [(1, 1, 1), (33, 33, 65), (70, 3, 129)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "supervised", "vocab"), SHAPES)
def test_as_exact_as_eager(tokens: int, supervised: int, vocab: int, dtype: torch.dtype) -> None:
    labels = labels_of(tokens, supervised, vocab)
    inputs = inputs_of(tokens, vocab, dtype)
    assert_no_worse(lambda backend, x: call(labels, backend, x), inputs, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_z_loss_is_as_exact_as_eager(dtype: torch.dtype) -> None:
    labels, inputs = labels_of(40, 35, 70), inputs_of(40, 70, dtype)
    assert_no_worse(lambda backend, x: call(labels, backend, x, 0.1), inputs, "triton")


def test_z_loss_is_told_apart() -> None:
    """Of rows that fill the last block, too, and of those that nothing supervises."""
    labels, inputs = labels_of(40, 35, 70), inputs_of(40, 70, torch.float32)
    inputs = {name: x.requires_grad_(True) for name, x in inputs.items()}
    (loss, z), (_, expected) = (
        linear_cross_entropy_and_z(inputs["hidden"], inputs["weight"], labels, backend, 0.1)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(z, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(loss - z, call(labels, "reference", inputs)[0])
    assert loss.requires_grad and not z.requires_grad


def test_sums_over_many_chunks_keep_24_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums in between err less than the last rounding to bf16 does."""
    inputs, labels = inputs_of(128, 8, torch.bfloat16, 16), labels_of(128, 128, 8)
    monkeypatch.setattr(host, "_finished", lambda call, gradients, grad: gradients)
    exact = run_pass(
        lambda backend, x: call(labels, backend, x),
        "reference",
        {name: x.double() for name, x in inputs.items()},
    )
    leaves = [x.requires_grad_(True) for x in inputs.values()]
    (loss,) = call(labels, "triton", dict(zip(inputs, leaves, strict=True)))
    sums: Any = getattr(loss.grad_fn, "gradients")  # noqa: B009
    high = sums.weight_bits.to(torch.int32) << 16
    found = (high | (sums.low.to(torch.int32) << 8)).view(torch.float32).double()
    factor = random(1, seed=100)  # what run_pass scales the loss by
    expected = exact.gradients["weight"] / float(factor)
    # The gradient of the logits is bf16; its errors are independent, so they average out.
    assert float((found - expected).norm() / expected.norm()) < 1.2e-3


def test_extreme_logits_stay_finite() -> None:
    inputs = {name: x * 300 for name, x in inputs_of(20, 70, torch.float32).items()}
    labels = labels_of(20, 20, 70)
    assert_no_worse(lambda backend, x: call(labels, backend, x), inputs, "triton")


def test_two_runs_agree_bitwise() -> None:
    labels, inputs = labels_of(40, 36, 70), inputs_of(40, 70, torch.bfloat16)
    assert_bitwise(lambda backend, x: call(labels, backend, x), inputs, "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_supervised_costs_nothing(dtype: torch.dtype) -> None:
    labels = torch.full((7,), IGNORE_LABEL)
    passed = run_pass(
        lambda backend, x: call(labels, backend, x), "triton", inputs_of(7, 40, dtype)
    )
    assert float(passed.outputs[0]) == 0.0
    assert not any(grad.any() for grad in passed.gradients.values())


def test_a_second_backward_is_refused() -> None:
    inputs = {n: x.requires_grad_(True) for n, x in inputs_of(5, 40, torch.bfloat16).items()}
    (loss,) = call(labels_of(5, 5, 40), "triton", inputs)
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran twice"):
        torch.autograd.backward(loss)


def test_evaluation_computes_one_product() -> None:
    inputs, labels = inputs_of(40, 70, torch.bfloat16), labels_of(40, 33, 70)
    with torch.no_grad(), counting() as counts:
        (loss,) = call(labels, "triton", inputs)
    assert {launch.kernel for launch in counts} == {"loss_scores", "loss_gradient"}
    torch.testing.assert_close(loss, call(labels, "reference", inputs)[0])


@pytest.mark.parametrize(
    ("hidden", "other", "complaint"),
    [(40, torch.bfloat16, "multiples of 16, not 40"), (48, torch.float32, "takes one type")],
)
def test_what_the_kernels_cannot_do_is_refused(
    hidden: int, other: torch.dtype, complaint: str
) -> None:
    inputs = inputs_of(5, 40, torch.bfloat16, hidden)
    inputs["weight"] = inputs["weight"].to(other)
    with pytest.raises(ValueError, match=rf"kernels\.linear_cross_entropy: .*{complaint}"):
        call(labels_of(5, 5, 40), "triton", inputs)


@pytest.mark.parametrize("label", [40, 100, 2000])
def test_a_label_of_no_class_is_no_number(label: int) -> None:
    """Nobody writes its score; memory as it lay there could be taken for a loss."""
    labels = labels_of(5, 5, 40)
    labels[2] = label
    (loss,) = call(labels, "triton", inputs_of(5, 40, torch.bfloat16))
    assert not loss.isfinite()


def test_operations_and_bytes_are_what_the_kernels_do() -> None:
    tokens, vocab = 63, 100
    labels, inputs = labels_of(tokens, tokens, vocab), inputs_of(tokens, vocab, torch.bfloat16)
    with counting() as counts:
        run_pass(lambda backend, x: call(labels, backend, x), "triton", inputs)
    done, fewest = host.operations(tokens, vocab, HIDDEN, INTERPRETED)
    assert sum(launch.dot_operations for launch in counts) == done
    assert fewest == 6 * tokens * vocab * HIDDEN
    second = {launch.kernel: launch.distinct_bytes for launch in counts}
    moved = host.traffic(tokens - 32, vocab, HIDDEN, INTERPRETED)
    assert {name: second[name] for name in moved} == moved


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> None:
    """The shipped configurations again."""
    monkeypatch.undo()


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_operations_at_the_full_vocabulary(arch: str) -> None:
    done, fewest = host.operations(*FULL, arch)
    assert fewest <= done <= 1.01 * fewest


class Peak(TorchDispatchMode):
    """Most bytes of storages alive at once, of those that were made within."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, Any] = {}
        self.most = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
        result = operation(*args, **(kw or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        self.alive = {key: ref for key, ref in self.alive.items() if not ref.expired()}
        sizes = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self.alive.values())
        self.most = max(self.most, sum(s.nbytes() for s in sizes if s is not None))
        return result


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_memory_at_the_full_vocabulary(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is allocated besides the two gradients, at no point more than 1 GiB: allocations of the
    real host code, on tensors without memory."""
    tokens, vocab, columns = FULL
    hidden, weight = (
        torch.zeros(rows, columns, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for rows in (tokens, vocab)
    )
    labels = torch.zeros(tokens, dtype=torch.int64, device="meta")
    # A recorded launch would keep its arguments alive.
    launched: list[str] = []
    monkeypatch.setattr(host, "launch", lambda kernel, *_, **__: launched.append(kernel.__name__))
    with recording(arch), Peak() as peak:
        torch.autograd.backward(linear_cross_entropy(hidden, weight, labels, "triton"))
    assert hidden.grad is not None and weight.grad is not None
    assert launched.count("loss_scores") == 32
    # The hidden states' gradient is made when the scores are gone.
    extra = peak.most - 2 * vocab * columns
    assert 0.8 * 2**30 < extra <= 2**30
