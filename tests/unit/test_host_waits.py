"""The host reads nothing from the device in a layer with all experts, Triton's or grouped_mm's.

Tensors on `meta` have no numbers: whatever reads one, or makes a shape of one, raises. Launches are
recorded instead of run.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from zaya_kernels.launch import ARCHITECTURES, recording

from zaya_train.config.schema import KernelsConfig
from zaya_train.model import ZayaModel
from zaya_train.model.interfaces import Surroundings
from zaya_train.model.recompute import RoutingTape

from ..helpers.models import TINY

if TYPE_CHECKING:
    from zaya_train.config.schema import NativeKernelName, RecomputeKind

pytest.importorskip("triton", reason="the extra `triton` is not installed")

TRITON = KernelsConfig(
    norm_residual="triton", router="triton", moe_permute="triton", grouped_mlp="triton"
)


def pass_on(
    device: torch.device,
    kernels: KernelsConfig,
    recompute: RecomputeKind,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Forward and backward of the mixture of experts of the second layer."""
    with device:
        model = ZayaModel(
            replace(TINY, num_layers=2), Surroundings(kernels=kernels, recompute=recompute)
        )
        moe, norm = (model.layers[1].get_submodule(name) for name in ("moe", "moe_norm"))
        x = torch.randn(1, 40, TINY.hidden_size, dtype=dtype, requires_grad=True)
        previous = torch.zeros(1, 40, TINY.router_size)
        valid = torch.ones(1, 40, dtype=torch.bool)
    model.to(dtype)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_()
    out, *_ = moe(lambda: (x, norm(x)), previous, valid, RoutingTape())
    torch.autograd.backward(out, torch.ones_like(out))
    assert x.grad is not None


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("permute", ["eager", "triton"])
def test_nothing_is_read(permute: NativeKernelName, recompute: RecomputeKind) -> None:
    for arch in ARCHITECTURES:
        with recording(arch) as launches:
            pass_on(torch.device("meta"), replace(TRITON, moe_permute=permute), recompute)
        names = [launch.name for launch in launches]
        assert "grouped_mlp_grad_down" in names
        assert ("permute_scatter_backward" in names) == (permute == "triton")


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_grouped_mm_reads_nothing(recompute: RecomputeKind) -> None:
    """Where torch has a kernel of its own, for which its form without numbers stands: bf16."""
    kernels = replace(TRITON, moe_permute="eager", grouped_mlp="grouped_mm")
    with recording("gfx942"):
        pass_on(torch.device("meta"), kernels, recompute, torch.bfloat16)


@pytest.mark.parametrize("permute", ["eager", "triton"])
def test_experts_of_torch_wait_for_their_counts(permute: NativeKernelName) -> None:
    """So the test above can fail."""
    kernels = replace(TRITON, moe_permute=permute, grouped_mlp="eager")
    # torch's own class for reading a number of a tensor that has none.
    with recording("gfx942"), pytest.raises(NotImplementedError, match="meta tensor"):
        pass_on(torch.device("meta"), kernels, "none")


@pytest.mark.gpu
@pytest.mark.parametrize("permute", ["eager", "triton"])
def test_nothing_is_waited_for_on_a_gpu(permute: NativeKernelName) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    device, kernels = torch.device("cuda"), replace(TRITON, moe_permute=permute)
    pass_on(device, kernels, "none")  # Compiles, which may wait.
    torch.cuda.set_sync_debug_mode("error")
    try:
        pass_on(device, kernels, "none")
    finally:
        torch.cuda.set_sync_debug_mode("default")
