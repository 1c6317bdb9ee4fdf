"""Hugging Face `zaya` folders in and out, bitwise, with every tensor accounted for."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from zaya_train.config.errors import CheckpointError, StorageError
from zaya_train.hub.config import config_from_hf, config_to_hf
from zaya_train.hub.names import check_tensors, tensor_names
from zaya_train.model.zaya import ZayaModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from torch import Tensor

    from zaya_train.config.schema import ModelConfig
    from zaya_train.model.interfaces import Surroundings

_SHARD_BYTES = 5 * 10**9
"""Largest safetensors file, as transformers' save_pretrained."""


def meta_model(config: ModelConfig, around: Surroundings | None = None) -> ZayaModel:
    """The model without storage: names, shapes and counts."""
    with torch.device("meta"):
        return ZayaModel(config, around)


def _shapes(model: ZayaModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def from_hf(
    path: Path | str, dtype: torch.dtype = torch.float32, around: Surroundings | None = None
) -> ZayaModel:
    """Model of a Hugging Face `zaya` folder, parameters in `dtype`, on the CPU.

    CheckpointError names any tensor that is missing, surplus or of another shape.
    """
    folder = Path(path)
    config = config_from_hf(folder)
    model = meta_model(config, around)
    names = tensor_names(_shapes(model), config)
    files = dict(_tensor_files(folder))
    # Tied: the head repeats the embedding in files that carry it.
    files.pop("lm_head.weight", None)
    expected = {n.theirs: n.their_shape for n in names.values()}
    found = {key: tensor for key, tensor in _read(files)}
    check_tensors(expected, found)
    state = {}
    for name in names.values():
        value = found.pop(name.theirs).reshape(name.our_shape)
        state[name.ours] = value.to(_dtype_of(name.ours, dtype)).contiguous()
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Balancing biases stay fp32: a bf16 bias could not hold the controller's small steps."""
    return torch.float32 if name.endswith("balancing_bias") else dtype


def _tensor_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(tensor name, file that holds it)."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file")
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (not a mapping)
                yield key, file


def _read(files: Mapping[str, Path]) -> Iterator[tuple[str, Tensor]]:
    for key, file in files.items():
        with safe_open(file, framework="pt") as handle:
            yield key, handle.get_tensor(key)


def to_hf(model: ZayaModel, path: Path | str) -> None:
    """Write `model` as a Hugging Face `zaya` folder in its parameters' dtype."""
    tensors = dict(model.state_dict())
    write_hf(tensors, model.config, path)


def write_hf(tensors: Mapping[str, Tensor], config: ModelConfig, path: Path | str) -> None:
    """Write full tensors under our names as a `zaya` folder.

    Written beside `path` and renamed when whole. A folder that is there is replaced only when it
    holds an earlier export; CheckpointError otherwise.
    """
    target = Path(path)
    if target.exists() and not (target / "config.json").is_file() and any(target.iterdir()):
        raise CheckpointError(f"{target}: exists and is not an exported model; not replaced")
    names = tensor_names({k: tuple(v.shape) for k, v in tensors.items()}, config)
    check_tensors(_shapes(meta_model(config)), tensors)
    out = {
        n.theirs: tensors[n.ours].detach().to("cpu").reshape(n.their_shape).contiguous()
        for n in names.values()
    }
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        _write_shards(out, partial)
        _write_json(partial / "config.json", config_to_hf(config) | {"dtype": _common_dtype(out)})
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    except OSError as error:
        raise StorageError(f"{target}: export failed: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _common_dtype(tensors: Mapping[str, Tensor]) -> str:
    return str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """safetensors files of at most _SHARD_BYTES, with an index when there are several."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        nbytes = tensors[name].numel() * tensors[name].element_size()
        if shards[-1] and size + nbytes > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensors[name]
        size += nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(folder / "model.safetensors.index.json", index)
