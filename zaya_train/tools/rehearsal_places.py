"""Which component a tensor belongs to, told from where the code stands that allocates it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from zaya_train.planning.components import (
    ACTIVATIONS,
    AGAIN,
    BACKWARD,
    BUFFERS,
    FULL_GRADIENTS,
    GATHERED,
    GRADIENTS,
    LOSS,
    STEP,
)

if TYPE_CHECKING:
    from types import CodeType, FrameType

SHAPES_ONLY = "shapes only"
"""DTensor works out the shape of a result on fake tensors of the whole size: nothing real."""

_PLACES = (
    # File, function ("" for any), component.
    ("distributed/tensor/_sharding_prop.py", "", SHAPES_ONLY),
    ("_fully_shard/_fsdp_param.py", "alloc_all_gather_outputs", GATHERED),
    ("_fully_shard/_fsdp_param.py", "init_all_gather_outputs", GATHERED),
    ("_fully_shard/_fsdp_param.py", "init_unsharded_param", GATHERED),
    # Refills what one rank alone holds whole.
    ("_fully_shard/_fsdp_param_group.py", "wait_for_unshard", GATHERED),
    ("_fully_shard/_fsdp_param.py", "to_accumulated_grad_if_needed", FULL_GRADIENTS),
    ("_fully_shard/_fsdp_param.py", "accumulate_unsharded_grad_if_needed", FULL_GRADIENTS),
    ("_fully_shard/_fsdp_collectives.py", "foreach_all_gather", BUFFERS),
    ("_fully_shard/_fsdp_collectives.py", "foreach_all_gather_copy_out", BUFFERS),
    ("_fully_shard/_fsdp_collectives.py", "foreach_reduce", GRADIENTS),
    ("linear_cross_entropy/eager.py", "", LOSS),
    ("zaya_train/optim/", "", STEP),
    ("zaya_train/train/step.py", "global_norm", STEP),
    ("zaya_train/train/step.py", "_reduce", STEP),
)
_ENGINE = ("torch/autograd/graph.py", "_engine_run_backward")
_CHECKPOINT = ("torch/utils/checkpoint.py", "unpack_hook")


@cache
def _known(code: CodeType) -> str:
    """Component, BACKWARD or AGAIN for a function that says something, else nothing."""
    for file, function, component in (*_PLACES, (*_ENGINE, BACKWARD), (*_CHECKPOINT, AGAIN)):
        if file in code.co_filename and function in ("", code.co_name):
            return component
    return ""


def place_of(frame: FrameType | None) -> tuple[str, str]:
    """Stage (forward, backward, optimizer) and component of an allocation made at `frame`."""
    seen = []
    while frame is not None:
        if known := _known(frame.f_code):
            seen.append(known)
        frame = frame.f_back
    if STEP in seen:
        return "optimizer", STEP
    stage = "backward" if BACKWARD in seen else "forward"
    return stage, seen[0] if seen else ACTIVATIONS
