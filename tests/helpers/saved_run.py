"""A run directory with one checkpoint, as `zaya export-hf` finds it."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.run import CHECKPOINTS, TOKENIZER
from zaya_train.train.checkpoint import CheckpointStore

from ..faults.states import record

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.model import ZayaModel
    from zaya_train.train.manifest import CheckpointRecord


def made_record(model: ZayaModel, context_tokens: int = 256) -> CheckpointRecord:
    """Step 1 of a phase `short` with the model's own RoPE base."""
    phase = {"rope_base": model.config.rope_base, "context_tokens": context_tokens}
    made = record(1)
    return replace(
        made,
        model=asdict(model.config),
        phase_name="short",
        train_state={"tokens": 640, "supervised_tokens": 600},
        lineage={"seed": 0, "phases": [["short", phase]], "corpora": {"problems": "c0ffee"}},
        identity={"math_hash": "0123abcd", "versions": {"torch": "2.x"}},
    )


def save_run(run: Path, model: ZayaModel, made: CheckpointRecord | None = None) -> Path:
    """Save the model as a checkpoint of `run`, with the bytes tokenizer beside it."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        store = CheckpointStore(run / CHECKPOINTS, keep_last=2)
        state = {f"model.{name}": value for name, value in model.state_dict().items()}
        store.save(state, made or made_record(model))
        store.close()
    finally:
        dist.destroy_process_group()
    load_tokenizer("bytes").save(run / TOKENIZER)
    return run
