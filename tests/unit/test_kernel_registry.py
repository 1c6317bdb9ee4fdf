"""What a training step launches is in the registry, so that it is compiled and has a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from zaya_kernels.grouped_mlp.op import grouped_mlp
from zaya_kernels.launch import recording

from zaya_train.main import compose
from zaya_train.model import SequenceLayout, ZayaModel
from zaya_train.model.interfaces import Surroundings

from ..helpers.models import CPU, every

pytest.importorskip("triton", reason="the extra `triton` is not installed")

from zaya_kernels.workshop.registry import REGISTRY, form, launches

ROWS, LENGTH = 8, 4096
TRITON = every("triton")


@pytest.mark.parametrize(
    "around",
    [
        Surroundings(kernels=TRITON),
        Surroundings(kernels=replace(TRITON, grouped_mlp_recompute=True), recompute="selective"),
        Surroundings(kernels=TRITON, recompute="full"),
    ],
    ids=lambda around: around.recompute,
)
def test_every_kernel_of_a_step_of_the_8b_model_is_compiled(around: Surroundings) -> None:
    """Two layers, of which one is the first and one the last, in bf16 on a chip that is not there;
    and the loss alone, as in evaluation."""
    config = replace(compose(["recipe=zaya1_8b"]).model, num_layers=2)
    with torch.device("meta"):
        model = ZayaModel(config, around)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device="meta")
    layout = SequenceLayout.of_documents([[LENGTH]] * ROWS, LENGTH, CPU)
    with recording("gfx942") as recorded:
        torch.autograd.backward(model(tokens, tokens, layout).loss)
        with torch.no_grad():
            model(tokens, tokens, layout)
    compiled = {form(launch) for _, launch in launches("gfx942")}
    assert {launch.name for launch in recorded if form(launch) not in compiled} == set()
    operations = {launch.name.split("_")[0] for launch in recorded}
    assert operations == {"norm", "cca", "attention", "router", "permute", "grouped", "loss"}


def test_a_form_of_its_own_is_no_other() -> None:
    """Another type, another constant, or an argument that is not there is other code."""
    of = {shipped.name: shipped for shipped in REGISTRY}
    forms = {}
    for name in ("router/bf16", "router/fp32", "router/first layer", "router/made again"):
        with recording("gfx942") as recorded:
            of[name].run("triton", torch.device("meta"))
        forms[name] = {form(launch) for launch in recorded}
    usual = forms.pop("router/bf16")
    assert all(found - usual for found in forms.values())


@pytest.mark.parametrize(("rows", "large"), [(511, False), (512, True)])
def test_tiles_of_experts_go_by_their_rows(rows: int, large: bool) -> None:
    """On average, for how many each one has stays on the device."""
    experts, wide = 4, 256
    shapes = ((experts * rows, wide), (experts, 2 * wide, wide), (experts, wide, wide))
    x, gate_up, down = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes)
    counts = torch.empty(experts, dtype=torch.int64, device="meta")
    with recording("gfx942") as recorded:
        grouped_mlp(x, counts, gate_up, down, "triton")
    blocks = {launch.name: launch.config.blocks["BM"] for launch in recorded}
    assert blocks["grouped_mlp_up"] == (256 if large else 128)
