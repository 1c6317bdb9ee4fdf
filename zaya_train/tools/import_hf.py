"""Hugging Face folders to model configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zaya_train.config.build import to_dict
from zaya_train.config.errors import CheckpointError
from zaya_train.hub.config import config_from_hf
from zaya_train.hub.convert import folder_layout, meta_model, read_hf, tensor_files
from zaya_train.runtime.files import write_text

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from zaya_train.config.schema import ModelConfig


@dataclass(frozen=True)
class ImportRequest:
    """What `zaya import-hf` is asked for."""

    folder: Path
    model_yaml: Path
    """Where the Hydra model configuration is written."""


def import_hf(request: ImportRequest, console: Console) -> ModelConfig:
    """Account for every tensor of a `zaya` folder of either layout and write the model
    configuration to train it.

    Training then starts with `checkpoint.initial_weights=FOLDER`; nothing is converted on disk.
    """
    config = config_from_hf(request.folder)
    shapes = {n: tuple(t.shape) for n, t in meta_model(config).state_dict().items()}
    count = values = 0
    for name, tensor in read_hf(request.folder, shapes, config):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{request.folder}: tensor {name} is not finite")
        count += 1
        values += tensor.numel()
    lines = [f"# From {request.folder.name} by `zaya import-hf`."]
    lines += [f"{key}: {_yaml(value)}" for key, value in to_dict(config).items()]
    write_text(request.model_yaml, "\n".join(lines) + "\n")
    stored = len(tensor_files(request.folder))
    layout = folder_layout(request.folder)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(
        f"{request.folder}: {layout} layout, all {stored} tensors accounted for as {count} of "
        f"ours, {values:,} values"
    )
    say(f"model configuration: {request.model_yaml}")
    say(
        f"skip_output: {config.skip_output}, as the {layout} layout's code computes it; the format "
        "does not say what was trained"
    )
    say(f"train it with checkpoint.initial_weights={request.folder}")
    return config


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        # YAML 1.1 reads 1e-05 as a string without the dot.
        return repr(value) if "e" not in repr(value) else f"{value:.17e}"
    return str(value)
