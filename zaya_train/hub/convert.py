"""Hugging Face `zaya` folders in and out, bitwise, with every tensor accounted for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from zaya_train.config.errors import CheckpointError, StorageError, first_line
from zaya_train.hub.config import config_from_hf, config_to_hf
from zaya_train.hub.names import check_shapes, tensor_names
from zaya_train.model.zaya import ZayaModel
from zaya_train.runtime.files import remove_leftovers, whole_directory, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from zaya_train.config.schema import ModelConfig
    from zaya_train.model.interfaces import Surroundings

RECEIPT = "zaya-export.json"
"""Marks a folder as our export, which a later export may replace."""
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
    model = meta_model(config_from_hf(folder), around)
    state = {
        name: value.to(_dtype_of(name, dtype))
        for name, value in read_hf(folder, _shapes(model), model.config)
    }
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def read_hf(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> Iterator[tuple[str, Tensor]]:
    """(our name, full tensor) for every tensor of a model with the given shapes, one at a time.

    All names and shapes are compared with the folder before the first tensor is read.
    """
    files = dict(_tensor_files(folder))
    _require_tied_head(folder, files)
    names = tensor_names(shapes, config)
    check_shapes({n.theirs: n.their_shape for n in names.values()}, _stored_shapes(files))
    for name in names.values():
        with safe_open(files[name.theirs], framework="pt") as handle:
            yield name.ours, handle.get_tensor(name.theirs).reshape(name.our_shape).contiguous()


def _require_tied_head(folder: Path, files: dict[str, Path]) -> None:
    """Take the head out of `files`: stored, it must repeat the embedding, or it is lost."""
    head = files.pop("lm_head.weight", None)
    if head is None or "model.embed_tokens.weight" not in files:
        return
    with safe_open(head, framework="pt") as handle:
        theirs = handle.get_tensor("lm_head.weight")
    with safe_open(files["model.embed_tokens.weight"], framework="pt") as handle:
        tied = torch.equal(theirs, handle.get_tensor("model.embed_tokens.weight"))
    if not tied:
        raise CheckpointError(f"{folder}: lm_head.weight differs from the embedding it is tied to")


def _stored_shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for key, file in files.items():
        with safe_open(file, framework="pt") as handle:
            shapes[key] = tuple(handle.get_slice(key).get_shape())
    return shapes


def _dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """Balancing biases stay fp32: a bf16 bias could not hold the controller's small steps."""
    return torch.float32 if name.endswith("balancing_bias") else dtype


def _tensor_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(tensor name, file that holds it)."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file")
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                keys = list(handle.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error
        for key in keys:
            yield key, file


def to_hf(model: ZayaModel, path: Path | str, tokenizer: Path | None = None) -> None:
    """Write `model` as a Hugging Face `zaya` folder in its parameters' dtype."""
    write_hf(dict(model.state_dict()), model.config, path, tokenizer)


def write_hf(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    path: Path | str,
    tokenizer: Path | None = None,
) -> None:
    """Write full tensors under our names as a `zaya` folder, with the files of a tokenizer folder.

    Written beside `path` and renamed when whole. A folder that is there is replaced only when it
    carries our RECEIPT; CheckpointError otherwise.
    """
    target = Path(path)
    remove_leftovers(target)
    if target.is_file() or (target.is_dir() and not _may_replace(target)):
        raise CheckpointError(f"{target}: exists and is not an export of ours; not replaced")
    names = tensor_names({k: tuple(v.shape) for k, v in tensors.items()}, config)
    check_shapes(_shapes(meta_model(config)), {k: tuple(v.shape) for k, v in tensors.items()})
    out = {
        n.theirs: tensors[n.ours].detach().to("cpu").reshape(n.their_shape).contiguous()
        for n in names.values()
    }
    with whole_directory(target) as partial:
        _write_shards(out, partial)
        special = _special_ids(tokenizer) if tokenizer else {}
        write_json(
            partial / "config.json", config_to_hf(config) | {"dtype": _common_dtype(out)} | special
        )
        if tokenizer:
            # A model's folder may serve as tokenizer; its weights and settings are not copied.
            written = (file.name for file in partial.iterdir())
            skip = shutil.ignore_patterns("*.safetensors*", "*.bin", *written)
            shutil.copytree(tokenizer, partial, ignore=skip, dirs_exist_ok=True)
            write_json(partial / "generation_config.json", special)
        values = sum(tensor.numel() for tensor in out.values())
        write_json(partial / RECEIPT, {"tensors": len(out), "values": values})


def _may_replace(folder: Path) -> bool:
    """Only our own receipt says that a folder is an export; many folders hold a config.json."""
    return (folder / RECEIPT).is_file() or not any(folder.iterdir())


def _special_ids(tokenizer: Path) -> dict[str, int | None]:
    """bos, eos and pad ids of a tokenizer folder, for config.json."""
    loaded = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
    ids: dict[str, int | None] = {}
    for kind in ("bos", "eos", "pad"):
        token = settings.get(f"{kind}_token")
        text = token["content"] if isinstance(token, dict) else token
        ids[f"{kind}_token_id"] = None if text is None else loaded.token_to_id(text)
    return ids


def _common_dtype(tensors: Mapping[str, Tensor]) -> str:
    return str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")


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
        _save(shards[0], folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / file)
        where |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """StorageError where the file system refuses: the library does not raise OSError for that."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(f"{file}: not written: {first_line(error)}") from error
