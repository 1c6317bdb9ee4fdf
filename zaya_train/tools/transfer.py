"""Checkpoints to Hugging Face folders, and Hugging Face folders to model configurations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from zaya_kernels.dtypes import DTYPES

from zaya_train.config.build import build, to_dict
from zaya_train.config.errors import CheckpointError
from zaya_train.config.schema import ModelConfig
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.hub.config import config_from_hf
from zaya_train.hub.convert import Form, meta_model, read_hf, write_hf
from zaya_train.run import CHECKPOINTS, TOKENIZER
from zaya_train.runtime.files import write_text
from zaya_train.train.manifest import read
from zaya_train.train.restore import find_newest, load_full

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from torch import Tensor

_MODEL_PREFIX = "model."
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class ExportRequest:
    """What `zaya export-hf` is asked for."""

    source: Path
    """A run directory (its newest verified checkpoint) or one checkpoint directory."""
    output: Path
    dtype: str = "fp32"
    """fp32 or bf16; balancing biases stay fp32."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json and tokenizer_config.json; None: the one the run keeps."""


def export_hf(request: ExportRequest, console: Console) -> Path:
    """Write a checkpoint as a Hugging Face `zaya` folder with its tokenizer.

    CheckpointError (exit 3) where nothing verifies, a tensor has no place in the format, the output
    would touch the source, or `request.tokenizer` is none or has ids that the model lacks.
    """
    checkpoint = _checkpoint_of(request.source)
    _require_apart(request, checkpoint)
    tokenizer = _tokenizer_of(request, checkpoint)
    tensors = load_full(checkpoint, _MODEL_PREFIX)
    record = read(checkpoint).record
    config = build(ModelConfig, record.model, "checkpoint.model")
    weights = {
        name.removeprefix(_MODEL_PREFIX): _cast(name, value, DTYPES[request.dtype])
        for name, value in tensors.items()
    }
    if tokenizer:
        _require_fit(tokenizer, config)
    write_hf(weights, config, request.output, Form(tokenizer=tokenizer))
    console.print(
        f"exported step {record.step} ({len(weights)} tensors, "
        f"{sum(t.numel() for t in weights.values()):,} values) to {request.output}"
    )
    if tokenizer is None:
        console.print(
            f"note: no tokenizer exported, {request.source} keeps none; `zaya generate` and "
            "transformers need one: export again and name its folder"
        )
    if config.skip_output != "zero":
        console.print(
            "note: transformers' `zaya` gives zero where this model gives a skipped token its "
            "input (model.skip_output=identity); the two differ on tokens routed to the skip class"
        )
    return request.output


def _require_apart(request: ExportRequest, checkpoint: Path) -> None:
    """An export replaces its output folder, so that must not share a path with what it is made
    from: the given directory, the checkpoint, and the run that the checkpoint belongs to."""
    output = request.output.resolve()
    sources = [request.source, checkpoint]
    if checkpoint.resolve().parent.name == CHECKPOINTS:
        sources.append(checkpoint.resolve().parent.parent)
    for source in sources:
        place = source.resolve()
        if output.is_relative_to(place) or place.is_relative_to(output):
            raise CheckpointError(
                f"{request.output}: an export cannot be written at, into or around the directory "
                f"it is made from ({source}); name another one"
            )


def _tokenizer_of(request: ExportRequest, checkpoint: Path) -> Path | None:
    """The tokenizer folder asked for or kept by the run; None where the run keeps none."""
    kept = checkpoint.resolve().parent.parent / TOKENIZER
    folder = request.tokenizer or (kept if kept.is_dir() else None)
    for name in _TOKENIZER_FILES if folder else ():
        if folder and not (folder / name).is_file():
            raise CheckpointError(f"{folder}: no {name}; a tokenizer folder is expected")
    return folder


def _require_fit(tokenizer: Path, config: ModelConfig) -> None:
    size = load_tokenizer(str(tokenizer)).vocab_size
    if size > config.vocab_size:
        raise CheckpointError(
            f"{tokenizer}: its tokenizer has {size} ids with the chat markers, the model only "
            f"{config.vocab_size}"
        )


def _cast(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if name.endswith("balancing_bias") else value.to(dtype)


def _checkpoint_of(source: Path) -> Path:
    """The checkpoint directory meant by `source`."""
    if (source / "MANIFEST.json").is_file():
        return source
    root = source / CHECKPOINTS
    if not root.is_dir():
        raise CheckpointError(f"{source}: neither a checkpoint nor a run with {CHECKPOINTS}/")
    found, _ = find_newest(root)
    if found is None:
        raise CheckpointError(f"{root}: holds no checkpoint")
    return found.path


@dataclass(frozen=True)
class ImportRequest:
    """What `zaya import-hf` is asked for."""

    folder: Path
    model_yaml: Path
    """Where the Hydra model configuration is written."""


def import_hf(request: ImportRequest, console: Console) -> ModelConfig:
    """Account for every tensor of a `zaya` folder and write the model configuration to train it.

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
    console.print(f"{request.folder}: all {count} tensors accounted for, {values:,} values")
    console.print(f"model configuration: {request.model_yaml}")
    console.print(f"train it with checkpoint.initial_weights={request.folder}")
    return config


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        # YAML 1.1 reads 1e-05 as a string without the dot.
        return repr(value) if "e" not in repr(value) else f"{value:.17e}"
    return str(value)
