"""Each bug planted in a Triton attention kernel is caught, as in `test_planted_bugs`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from zaya_train.model import SequenceLayout

from ..helpers.kernels import random
from ..helpers.models import CPU
from ..helpers.mutation import assert_caught, of_kernels, plant
from .test_attention import call

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.attention import triton as host
from zaya_kernels.attention import triton_kernels as kernels

from .test_planted_bugs import compare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("interpreter")


def check() -> None:
    """Two chunks against the row: a document in both, one that ends inside the first."""
    chunks = [(75, 120), (20, 50)]
    plan = SequenceLayout.of_documents([[33, 87]], 120, CPU, chunks).attention
    inputs = {"q": random(1, 75, 4, 16, seed=1, dtype=torch.float32)}
    for at, name in enumerate("kv"):
        inputs[name] = random(1, 120, 2, 16, seed=2 + at, dtype=torch.float32)

    def run(backend: str, x: Mapping[str, Tensor]) -> Sequence[Tensor]:
        # Values of another stride than keys.
        together = torch.cat([x["v"], torch.zeros_like(x["v"])], dim=-1)
        return call(backend, {**x, "v": together[..., :16]}, plan)

    compare(run, run, inputs, 4e-6)


BUGS = {
    "attention_forward": {
        "diagonal of the queries off by one": ("= (position + 1) //", "= (position + 33) //"),
        "mask off by one": (
            "hidden = (first + o_n)[None, :] >", "hidden = (first + o_n)[None, :] >=",
        ),
        "queries past the segment": ("o_m, left - 1", "o_m, left"),
        "old maximum not scaled": ("a_sum * shrink + ", "a_sum + "),
        "keys of another group": ("i_head // GROUP * head_k", "(1 - i_head // GROUP) * head_k"),
        "row sums without their logarithm": ("tl.log2(a_sum)", "a_sum"),
    },
    "attention_backward_queries": {
        "a block of the diagonal left out": (
            "range(whole, last + 1, BN)", "range(whole, last, BN)",
        ),
        "keys of the next document": ("o_k = tl.minimum(o_n, last - first)", "o_k = o_n"),
        "stored past the segment": ("m_m = o_m < left", "m_m = o_m <= left"),
        "values by the keys' stride": ("p_v = v + key * stride_v", "p_v = v + key * stride_k"),
        "mean under the weights left out": ("- b_delta[:, None]", "- 0.0 * b_delta[:, None]"),
    },
    "attention_backward_keys": {
        "statistics of the next head": (
            "tl.cast(i_query, tl.int64) * num_places", "0 * num_places",
        ),
        "first segment of a document only": ("range(num_segments * GROUP)", "range(GROUP)"),
        "one head of a group only": ("i_head * GROUP + i % GROUP", "i_head * GROUP"),
        "diagonal of the keys off by one": ("position + BN - 1 - lead", "position - lead"),
        "mask of the keys off by one": (
            "(position + o_n)[:, None] >", "(position + o_n)[:, None] >=",
        ),
        "tail of a segment left out": ("            careful += 1", "            careful += 0"),
        "tail of a segment not masked": ("(first + o_m >= count)", "(first + o_m >= count + 99)"),
        "tail in another place": ("first >= whole, rest, 0)", "first >= whole, 0 * rest, 0)"),
        "keys past the document": ("m_n = (o_n < left)", "m_n = (o_n < left + 1)"),
        "gradient of keys not scaled": ("(a_k * scale_grad)", "(a_k * 1.0)"),
    },
}  # fmt: skip


@of_kernels(BUGS)
def test_a_bug_in_attention_is_caught(
    kernel: str, bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(BUGS[kernel][bug], kernels, (host, [kernel]), tmp_path, monkeypatch)
    assert_caught(check)


def test_without_a_bug_nothing_is_caught() -> None:
    check()
