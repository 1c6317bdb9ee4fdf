"""`zaya kernels bench` on the CPU: what it writes, and what it refuses to time."""

from __future__ import annotations

import errno
import xml.etree.ElementTree as ElementTree
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from zaya_kernels.norm_residual.op import NORM_BACKENDS
from zaya_kernels.workshop.cases import Case, passed
from zaya_kernels.workshop.registry import REGISTRY
from zaya_kernels.workshop.timing import WARM_ROUNDS, Sample, Spread, alternating

from zaya_train.main import compose, main
from zaya_train.tools import doctor_kernels, kernel_shapes
from zaya_train.tools.kernel_cases import operations_at
from zaya_train.tools.kernel_results import COLUMNS, read
from zaya_train.tools.kernel_rivals import contenders
from zaya_train.tools.kernel_shapes import SHAPES, Shape, Timed, to_check

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

NORM = ["--op", "norm_residual (norm)", "--shape", "smoke_odd"]
LIBRARY = ["--backend", "eager", "--backend", "torch.rms_norm"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def bench(out: Path, *words: str, rounds: int = 1) -> int:
    fixed = ["--device", "cpu", "--rounds", str(rounds), "--out", str(out)]
    return main(["kernels", "bench", *fixed, *words])


def operations(name: str = "smoke_odd") -> dict[str, Timed]:
    shape = next(shape for shape in SHAPES if shape.name == name)
    model = compose([f"recipe={shape.recipe}"]).model
    return {timed.op: timed for timed in operations_at(model, shape, CPU)}


def test_rows_are_written_and_later_ones_added(tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.csv"
    assert bench(out, *NORM, *LIBRARY, rounds=3) == 0
    first = out.read_text()
    rows = read(out)
    assert tuple(first.splitlines()[0].split(",")) == COLUMNS == tuple(rows[0])
    passes = ["forward", "backward", "both"]
    assert [(row["backend"], row["pass"]) for row in rows] == [
        (name, direction) for name in ("eager", "torch.rms_norm") for direction in passes
    ]
    for row in rows:
        milliseconds = [float(row[f"ms_{key}"]) for key in ("low", "median", "high")]
        assert milliseconds == sorted(milliseconds) and milliseconds[0] > 0
        parts = (("gb_per_second", "copy_gb_per_second"), ("tflops", "gemm_tflops"))
        shares = [float(row[found]) / float(row[most]) for found, most in parts]
        assert float(row["share"]) == pytest.approx(max(shares), rel=1e-4)
        assert (row["op"], row["shape"], row["dtype"]) == (NORM[1], "smoke_odd", "fp32")
        assert row["torch"] == torch.__version__ and row["rounds"] == "3"
        assert row["dirty"] in ("True", "False") and row["device"] and row["commit"]
    assert bench(out, *NORM, *LIBRARY) == 0
    assert out.read_text().startswith(first) and len(read(out)) == 2 * len(rows)


def test_a_table_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.csv"
    out.write_text("device,arch,speed\na,b,1\n")
    assert bench(out, *NORM) == 2
    captured = capsys.readouterr()
    assert f"{out}: not a table of kernel timings: its header differs in" in captured.err
    assert out.read_text() == "device,arch,speed\na,b,1\n" and "GB/s" not in captured.out


def test_a_refused_write_leaves_the_table_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.csv"
    assert bench(out, *NORM, *LIBRARY) == 0
    before = out.read_text()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("zaya_train.runtime.files.sync_path", full)
    assert bench(out, *NORM, *LIBRARY) == 4
    assert out.read_text() == before


def wrong_output(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return NORM_BACKENDS["reference"](x, weight, eps) * 1.001


def wrong_gradient(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = NORM_BACKENDS["reference"](x, weight, eps)
    return out.detach() + (out - out.detach()) * 1.001


def not_a_number(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return NORM_BACKENDS["reference"](x, weight, eps) * float("nan")


@pytest.mark.parametrize(
    ("bug", "where"),
    [(wrong_output, "output 0"), (wrong_gradient, "gradient of x"), (not_a_number, "output 0")],
)
def test_what_is_wrong_is_not_timed(
    bug: Callable[..., Tensor],
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(NORM_BACKENDS, "eager", bug)
    out = tmp_path / "results.csv"
    assert bench(out, *NORM, *LIBRARY) == 1
    said = capsys.readouterr().out
    assert f"not timed, wrong: {NORM[1]} smoke_odd eager: {where}: error" in said
    assert {row["backend"] for row in read(out)} == {"torch.rms_norm"}


def test_what_is_wrong_only_where_it_is_timed_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong_at_length(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        bug = wrong_output if x.numel() // x.shape[-1] > 8 else NORM_BACKENDS["reference"]
        return bug(x, weight, eps)

    monkeypatch.setattr(kernel_shapes, "_CHECKED", ((8,),))
    monkeypatch.setitem(NORM_BACKENDS, "reference2", wrong_at_length)
    words = ["--backend", "eager", "--backend", "reference2"]
    out = tmp_path / "results.csv"
    assert bench(out, *NORM, *words) == 1
    assert "smoke_odd reference2: output 0: error" in capsys.readouterr().out
    assert {row["backend"] for row in read(out)} == {"eager"}
    # Where eager is wrong itself nothing can be compared with it.
    monkeypatch.setitem(NORM_BACKENDS, "eager", wrong_output)
    assert bench(tmp_path / "none.csv", *NORM, *words) == 1
    assert "reference2: eager, its yardstick at this shape, is wrong" in capsys.readouterr().out
    assert read(tmp_path / "none.csv") == []


def test_every_back_end_is_timed_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.csv"
    # All but torch.compile, whose compilations are left to the nightly run.
    names = ["eager", "reference", "sdpa", "gram", "triton", "flash_attn", "aiter", "liger"]
    names += ["grouped_mm", "native", "transformer_engine"]
    names += ["torch.rms_norm", "torch.whole_logits", "torch.optim.Muon"]
    words = [word for name in names for word in ("--backend", name)]
    assert bench(out, "--shape", "smoke_odd", *words) == 0
    said = capsys.readouterr().out
    rows = read(out)
    for op, timed in operations().items():
        done = {row["backend"] for row in rows if row["op"] == op}
        for rival in contenders(timed, CPU):
            missing = f"{op} smoke_odd: not run: {rival.name}: " in said
            assert rival.name == "compile" or (rival.name in done) != missing, (op, rival)
        assert f"{op} smoke_odd: not run: triton: needs a GPU" in said
        assert {"eager", "reference"} <= done
    assert "torch.optim.Muon orthogonalises in bf16, not in torch.float32" in said
    plots = sorted(path for path in tmp_path.iterdir() if path.suffix == ".svg")
    assert len(plots) == len(operations())
    for path in plots:
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    text = next(path for path in plots if "grouped_mlp" in path.name).read_text()
    for label in ("grouped_mm, both", "eager, forward", "roof, fp32", "operations per byte"):
        assert label in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--op", "atention"], "--op atention: no such name; did you mean attention?"),
        (["--shape", "smok"], "--shape smok: no such name; did you mean smoke?"),
        (["--backend", "flash_atn"], "--backend flash_atn: no such name; did you mean flash_attn?"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(
    words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.csv"
    assert bench(out, *words) == 2
    assert expected in capsys.readouterr().err and not out.exists()


def test_all_parts_of_norm_residual_go_by_its_key(tmp_path: Path) -> None:
    out = tmp_path / "results.csv"
    words = ["--op", "norm_residual", "--shape", "smoke_odd", "--backend", "eager"]
    assert bench(out, *words, "--dtype", "bf16") == 0
    expected = {f"norm_residual ({part})" for part in ("norm", "residual", "fused", "stream")}
    assert {row["op"] for row in read(out)} == expected
    assert {row["dtype"] for row in read(out)} == {"bf16"}


def test_every_registered_operation_is_timed() -> None:
    timed = {name.split(" ")[0] for name in operations()}
    assert timed == {shipped.op for shipped in REGISTRY}


def test_the_doctor_compares_what_is_timed() -> None:
    config = compose(["recipe=smoke_cpu"])
    checked = {check.timed.op: check.backend for check in doctor_kernels._checks(config)}
    assert checked.keys() == operations().keys()
    assert all(getattr(config.kernels, op.split(" ")[0]) == name for op, name in checked.items())


def test_what_changes_no_arithmetic_is_cut() -> None:
    model = compose(["recipe=zaya1_8b"]).model
    found = {
        timed.op: timed.inputs
        for timed in operations_at(model, SHAPES[-1], CPU, most=doctor_kernels._MOST)
        if timed.op in ("grouped_mlp", "linear_cross_entropy", "newton_schulz")
    }
    assert found["grouped_mlp"]["down"].shape == (2, model.hidden_size, model.expert_ffn_size)
    assert found["linear_cross_entropy"]["weight"].shape[0] == 4096
    # Of the sides' ratio.
    assert found["newton_schulz"]["matrices"].shape == (2, 512, 256)


def test_on_a_gpu_our_kernels_run_and_the_reference_does_not() -> None:
    found = {r.name: r for r in contenders(operations()["attention"], torch.device("cuda"))}
    assert found["triton"].run and found["compile"].run
    assert found["reference"].run is None and "CPU only" in found["reference"].reason


def test_large_shapes_are_checked_at_a_smaller_one() -> None:
    for shape in SHAPES:
        assert len({sum(row) for row in shape.rows}) == 1
        small = to_check(shape)
        assert small.tokens <= 2048
        assert small == shape or (shape.tokens > 2048 and small.recipe == shape.recipe)


def test_products_are_what_torch_counts() -> None:
    """The forward's of operations that are products; cca and attention mask theirs."""
    for name in ("router", "grouped_mlp", "linear_cross_entropy"):
        timed = operations()[name]
        with FlopCounterMode(display=False) as counter:
            timed.call(timed.backends["reference"], dict(timed.inputs))
        expected = timed.operations
        if name == "linear_cross_entropy":
            # The reference computes logits of unsupervised tokens, too.
            expected = expected * 125 // 100
        assert counter.get_total_flops() == expected


def test_operations_are_those_the_kernels_count() -> None:
    from zaya_kernels.linear_cross_entropy.triton import operations as of_loss
    from zaya_kernels.newton_schulz.gram import operations as of_newton
    from zaya_kernels.newton_schulz.op import FIVE_QUINTICS

    found = operations("smoke")
    loss, newton = found["linear_cross_entropy"], found["newton_schulz"]
    (tokens, hidden), vocabulary = loss.inputs["hidden"].shape, loss.inputs["weight"].shape[0]
    supervised = tokens - len(range(0, tokens, 5))
    assert 3 * loss.operations == of_loss(supervised, vocabulary, hidden, "gfx942")[1]
    count, rows, columns = newton.inputs["matrices"].shape
    assert newton.operations == 2 * count * of_newton(columns, rows, FIVE_QUINTICS)[1]
    pairs = sum(i + 1 for row in ((128,),) * 8 for length in row for i in range(length))
    assert found["attention"].operations == 2 * 2 * 4 * 32 * pairs


def outputs_of(timed: Timed) -> list[Tensor]:
    rounded = timed.rounded(torch.bfloat16)
    return list(timed.call(timed.backends["eager"], rounded))


def test_bytes_are_the_fewest_the_kernels_count() -> None:
    from zaya_kernels.cca.triton import traffic as of_cca
    from zaya_kernels.moe_permute.triton import traffic as of_permute
    from zaya_kernels.norm_residual.triton import traffic as of_norm

    found = operations("smoke")
    bytes_of = {
        name: timed.work(timed.rounded(torch.bfloat16), outputs_of(timed))
        for name, timed in found.items()
        if "norm" in name or name in ("cca", "moe_permute")
    }
    norm, residual = (bytes_of[f"norm_residual ({part})"] for part in ("norm", "residual"))
    # Fused, the new stream is not read again.
    fewest = of_norm(1024, 128, "gfx942", backward=False)[1]
    assert norm["forward"].bytes + residual["forward"].bytes - 4 * 1024 * 128 == fewest
    assert bytes_of["norm_residual (fused)"]["forward"].bytes == fewest
    # The stream that is handed on is not written.
    stream = bytes_of["norm_residual (stream)"]
    assert stream["forward"].bytes == norm["forward"].bytes
    assert stream["backward"].bytes == norm["backward"].bytes + 4 * 1024 * 128
    assert residual["both"].bytes == residual["forward"].bytes + residual["backward"].bytes
    forward, _ = of_cca((8, 128, 4, 2, 32, 16), (2, 2), "gfx942")
    assert bytes_of["cca"]["forward"].bytes == pytest.approx(forward.fewest, rel=0.01)
    # It counts rows of the gradient for tokens of no expert too, one in nine here.
    fewest = of_permute(1024, 1024 * 8 // 9, 128, 8)[1]
    assert bytes_of["moe_permute"]["both"].bytes == pytest.approx(fewest, rel=0.04)


def test_calls_take_turns_and_warm_rounds_do_not_count() -> None:
    order: list[str] = []

    def call(name: str) -> Sample:
        order.append(name)
        return Sample(float(len(order)), None)

    found = alternating({name: partial(call, name) for name in "abc"}, 2)
    assert WARM_ROUNDS == 2 and "".join(order) == "abcbcacababc"
    assert [sample.forward for sample in found["c"]] == [7.0, 12.0]


def test_spread_stays_within_the_samples() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0]).low >= 1.0 and Spread.of([1.0, 2.0]).high <= 2.0
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 1.8, 4.2)


def test_gradients_are_compared_too() -> None:
    timed = operations()["norm_residual (norm)"]
    case = Case("norm", lambda _, x: timed.call(wrong_gradient, x), timed.inputs)
    assert {"output 0", "gradient of x", "gradient of weight"} == set(
        passed(case, "", timed.inputs)
    )


@pytest.mark.nightly
def test_torch_compile_is_timed_or_says_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.csv"
    assert bench(out, "--backend", "compile", "--shape", "smoke_odd") == 0
    said, done = capsys.readouterr().out, {row["op"] for row in read(out)}
    for op in operations():
        assert (op in done) != (f"{op} smoke_odd: not run: compile: " in said), op


def test_a_shape_is_rows_of_one_length() -> None:
    shape = Shape("two", "smoke_cpu", ((3, 5), (8,)))
    assert (shape.row_tokens, shape.tokens) == (8, 16)
    made: Any = operations("smoke")["attention"].inputs["q"]
    assert tuple(made.shape) == (8, 128, 4, 32)
