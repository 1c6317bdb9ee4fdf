"""How few operations the Triton Newton-Schulz needs for all that Muon has in the published model.

Not among tests/kernels, whose poison of fresh memory makes a meta model a real one.
"""

from __future__ import annotations

from collections import Counter

import pytest
from zaya_kernels.launch import ARCHITECTURES, INTERPRETED
from zaya_kernels.newton_schulz.op import FIVE_QUINTICS

from tests.helpers.muon_table import shapes_of_8b
from zaya_train.planning.muon import muon_plan

triton = pytest.importorskip(
    "zaya_kernels.newton_schulz.triton", reason="the extra `triton` is not installed"
)


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != INTERPRETED])
def test_operations_of_all_matrices_of_the_8b_model(arch: str) -> None:
    """Projections, convolutions, routers and experts, five steps each."""
    matrices = muon_plan(shapes_of_8b(), replicas=1, shards=1).matrices
    sides = Counter((min(m.rows, m.columns), max(m.rows, m.columns)) for m in matrices)
    done = {shape: triton.operations(*shape, FIVE_QUINTICS, arch) for shape in sides}
    mine, plain = (sum(n * done[shape][i] for shape, n in sides.items()) for i in range(2))
    assert sides.total() == 2040
    assert mine <= 0.6 * plain
