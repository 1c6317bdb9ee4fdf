"""What is refused before a model is built."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
import torch

from tests.helpers.tiny import tiny
from zaya_train.config.errors import ConfigError
from zaya_train.parallel.apply import parallelize

if TYPE_CHECKING:
    from zaya_train.parallel.mesh import Mesh

NO_MESH = cast("Mesh", None)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_fp32_attention_on_a_gpu_is_refused_before_anything_is_built(backend: str) -> None:
    config = tiny({"precision.compute_dtype": "fp32", "kernels.attention": backend})
    rule = (
        rf"kernels\.attention={backend}: no flash attention in fp32 on cuda; set "
        r"precision\.compute_dtype=bf16, or kernels\.attention=triton, or kernels\.attention=refer"
    )
    with pytest.raises(ConfigError, match=rule):
        parallelize(config, config.model, NO_MESH, torch.device("cuda"))


@pytest.mark.parametrize(
    ("changes", "device"),
    [
        ({"precision.compute_dtype": "bf16"}, "cuda"),
        ({"precision.compute_dtype": "fp32", "kernels.attention": "reference"}, "cuda"),
        ({"precision.compute_dtype": "fp32"}, "cpu"),
    ],
)
def test_what_can_run_is_not_refused(changes: dict[str, str], device: str) -> None:
    config = tiny(changes)
    # Past the check there is no mesh to work with.
    with pytest.raises(AttributeError, match="sparse"):
        parallelize(config, config.model, NO_MESH, torch.device(device))
