"""Hugging Face `zaya` folders in and out, bitwise, with every tensor accounted for."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from zaya_train.config.errors import CheckpointError, StorageError, first_line
from zaya_train.hub.accounting import account, dtype_name, is_buffer
from zaya_train.hub.config import config_from_hf, config_layout, config_to_hf, read_config
from zaya_train.hub.names import check_shapes, layout_of_name, tensor_names
from zaya_train.model.zaya import ZayaModel
from zaya_train.runtime.files import remove_leftovers, whole_directory, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor

    from zaya_train.config.schema import ModelConfig
    from zaya_train.hub.names import Layout, TensorName
    from zaya_train.model.interfaces import Surroundings

RECEIPT = "export_receipt.json"
"""What an export consists of; marks a folder as ours, which a later export may replace."""
RECEIPT_FORMAT = 1
_EARLIER_RECEIPT = "zaya-export.json"
"""The mark of exports before there were receipts."""
_SHARD_BYTES = 5 * 10**9
"""Largest safetensors file, as transformers' save_pretrained."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a folder is written."""

    layout: Layout = "native"
    dtype: torch.dtype | None = None
    """Of the parameters; None: as they are. Balancing biases stay as they are."""
    tokenizer: Path | None = None
    """Folder whose files go along."""


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

    Of a folder of either layout. All names and shapes are compared with the folder before the first
    tensor is read.
    """
    layout = folder_layout(folder)
    files = tensor_files(folder)
    _require_tied_head(folder, files)
    names = tensor_names(shapes, config, layout)
    expected = {theirs: n.their_shape for n in names.values() for theirs in n.theirs}
    check_shapes(expected, _stored_shapes(files))
    for name in names.values():
        parts = []
        for theirs in name.theirs:
            with safe_open(files[theirs], framework="pt") as handle:
                parts.append(handle.get_tensor(theirs))
        whole = torch.stack(parts) if len(parts) > 1 else parts[0]
        yield name.ours, whole.reshape(name.our_shape).contiguous()


def folder_layout(folder: Path) -> Layout:
    """The layout of a `zaya` folder, which its config.json and every tensor's name must agree on.

    CheckpointError names the key or tensor that does not.
    """
    path = folder / "config.json"
    layout = config_layout(path, read_config(folder))
    for name in sorted(tensor_files(folder)):
        other = layout_of_name(name)
        if other not in (None, layout):
            raise CheckpointError(
                f"{folder}: config.json is of the {layout} layout, but tensor {name} is one of the "
                f"{other} layout"
            )
    return layout


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
    return torch.float32 if is_buffer(name) else dtype


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor in a folder; CheckpointError for a file that is not whole, or a
    tensor that two files hold."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file")
    found: dict[str, Path] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                keys = list(handle.keys())
        except SafetensorError as error:
            raise CheckpointError(f"{file}: not a whole safetensors file: {error}") from error
        for key in keys:
            if key in found:
                raise CheckpointError(f"{file}: holds {key}, as {found[key].name} does")
            found[key] = file
    return found


def to_hf(model: ZayaModel, path: Path | str, form: Form | None = None) -> None:
    """Write `model` as a Hugging Face `zaya` folder; in its parameters' dtype unless told."""
    write_hf(dict(model.state_dict()), model.config, path, form)


def write_hf(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    path: Path | str,
    form: Form | None = None,
    finish: Callable[[Path], None] | None = None,
) -> None:
    """Write full tensors under our names as a `zaya` folder that holds a RECEIPT of them.

    Written beside `path` and renamed when whole. A folder that is there is replaced only when it
    carries our RECEIPT; CheckpointError otherwise.

    finish: gets the folder before it takes its name; where it raises, nothing is left.
    """
    target, form = Path(path), form or Form()
    remove_leftovers(target)
    require_replaceable(target)
    shapes = {k: tuple(v.shape) for k, v in tensors.items()}
    names = list(tensor_names(shapes, config, form.layout).values())
    check_shapes(_shapes(meta_model(config)), shapes)
    settings = config_to_hf(config, form.layout)
    out = _in_their_form(names, tensors, form.dtype)
    with whole_directory(target) as partial:
        files = _write_shards(out, partial)
        special = _special_ids(form.tokenizer) if form.tokenizer else {}
        settings |= {"dtype": dtype_name(out["model.embed_tokens.weight"])} | special
        write_json(partial / "config.json", settings)
        if form.tokenizer:
            # A model's folder may serve as tokenizer; its weights and settings are not copied.
            skip = shutil.ignore_patterns(*_NOT_OF_TOKENIZERS, *(f.name for f in partial.iterdir()))
            shutil.copytree(form.tokenizer, partial, ignore=skip, dirs_exist_ok=True)
            write_json(partial / "generation_config.json", special)
        keys = account(names, tensors, out, files)
        receipt = {"format": RECEIPT_FORMAT, "layout": form.layout, "keys": keys}
        write_json(partial / RECEIPT, receipt)
        # Half as much again as the model in bf16, and nobody's any more.
        del out
        if finish:
            finish(partial)


_NOT_OF_TOKENIZERS = ("*.safetensors*", "*.bin", RECEIPT, _EARLIER_RECEIPT, "EXPORT.md")


def _in_their_form(
    names: Iterable[TensorName], tensors: Mapping[str, Tensor], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Their name -> tensor as it is stored; a split one shares its memory."""
    out: dict[str, Tensor] = {}
    for name in names:
        value = tensors[name.ours].detach().to("cpu")
        if dtype is not None and not is_buffer(name.ours):
            value = value.to(dtype)
        parts = value.reshape(len(name.theirs), *name.their_shape).contiguous().unbind()
        out |= dict(zip(name.theirs, parts, strict=True))
    return out


def require_replaceable(target: Path) -> None:
    """CheckpointError where something stands at `target` that is no export of ours, or an export
    that has got files of somebody else's, which replacing it would delete."""
    if target.is_file() or (target.is_dir() and not _may_replace(target)):
        raise CheckpointError(f"{target}: exists and is not an export of ours; not replaced")
    if added := _added_files(target):
        raise CheckpointError(
            f"{target}: holds {added[0]}, which the export there did not write ({len(added)} such "
            "files); not replaced: move them away, or export to another place"
        )


def _added_files(folder: Path) -> list[str]:
    """Files beside those that the receipt lists; none where it lists no files."""
    receipt = folder / RECEIPT
    if not receipt.is_file():
        return []
    try:
        listed = json.loads(receipt.read_text(encoding="utf-8")).get("files")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{receipt}: not a receipt ({error!r}); not replaced") from error
    if listed is None:
        return []
    present = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted({path.as_posix() for path in present} - {*listed, RECEIPT})


def _may_replace(folder: Path) -> bool:
    """Only our own receipt says that a folder is an export; many folders hold a config.json."""
    marked = any((folder / name).is_file() for name in (RECEIPT, _EARLIER_RECEIPT))
    return marked or not any(folder.iterdir())


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


def _write_shards(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Path]:
    """safetensors files of at most _SHARD_BYTES, with an index when there are several; the file of
    every tensor."""
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
        return dict.fromkeys(shards[0], folder / "model.safetensors")
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(shard, folder / file)
        where |= dict.fromkeys(shard, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    write_json(folder / "model.safetensors.index.json", index)
    return {name: folder / file for name, file in where.items()}


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    """StorageError where the file system refuses: the library does not raise OSError for that."""
    try:
        save_file(tensors, file, metadata={"format": "pt"})
    except SafetensorError as error:
        raise StorageError(f"{file}: not written: {first_line(error)}") from error
