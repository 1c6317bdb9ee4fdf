"""What became of every tensor in an export: names, shapes, types and hashes on both sides."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from zaya_train.config.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from torch import Tensor

    from zaya_train.hub.names import TensorName


def content_sha256(tensor: Tensor) -> str:
    """Hash of a tensor's values in its own type: the bytes that safetensors stores."""
    return hashlib.sha256(_bytes(tensor).numpy().data).hexdigest()


def account(
    names: Iterable[TensorName],
    ours: Mapping[str, Tensor],
    written: Mapping[str, Tensor],
    files: Mapping[str, Path],
) -> dict[str, Any]:
    """Entries of every tensor and totals, with what was written read back from `files`.

    ours: full tensors before any cast, by our name. written: by their name.
    files: the file of every tensor of theirs.

    Raises:
        CheckpointError: a file does not hold the bytes that were given it, or a tensor or value of
            one side has no place on the other.
    """
    entries = [_entry(name, ours[name.ours], written, files) for name in names]
    placed = [part["name"] for entry in entries for part in entry["theirs"]]
    values = [sum(tensor.numel() for tensor in side.values()) for side in (ours, written)]
    if sorted(placed) != sorted(files) or len(entries) != len(ours) or values[0] != values[1]:
        raise CheckpointError(
            f"export: {len(ours)} tensors of {values[0]:,} values became {len(files)} of "
            f"{values[1]:,}, of which {len(set(placed))} are accounted for"
        )
    return {"totals": totals(entries), "tensors": entries}


def totals(entries: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Counts over the entries of `account`; buffers are the balancing biases."""
    result = dict.fromkeys(("ours", "theirs", "parameters", "buffers", "values", "bytes"), 0)
    for entry in entries:
        size = torch.Size(entry["shape"]).numel()
        result["ours"] += 1
        result["theirs"] += len(entry["theirs"])
        result["buffers" if is_buffer(entry["ours"]) else "parameters"] += size
        result["values"] += size
        for part in entry["theirs"]:
            width = getattr(torch, part["dtype"]).itemsize
            result["bytes"] += torch.Size(part["shape"]).numel() * width
    return result


def is_buffer(ours: str) -> bool:
    """Whether a tensor of ours is a balancing bias, which no gradient trains."""
    return ours.endswith("balancing_bias")


def _entry(
    name: TensorName,
    ours: Tensor,
    written: Mapping[str, Tensor],
    files: Mapping[str, Path],
) -> dict[str, Any]:
    first = written[name.theirs[0]]
    changes = []
    if first.dtype != ours.dtype:
        changes.append(f"cast {dtype_name(ours)} to {dtype_name(first)}")
    if len(name.theirs) > 1 or name.their_shape == name.our_shape[1:]:
        changes.append(f"split along its first dimension into {len(name.theirs)}")
    elif name.their_shape != name.our_shape:
        changes.append(f"reshape {list(name.our_shape)} to {list(name.their_shape)}")
    return {
        "ours": name.ours,
        "shape": list(name.our_shape),
        "dtype": dtype_name(ours),
        "sha256": content_sha256(ours),
        "changes": changes,
        "theirs": [_part(theirs, written[theirs], files[theirs]) for theirs in name.theirs],
    }


def _part(name: str, written: Tensor, file: Path) -> dict[str, Any]:
    with safe_open(file, framework="pt") as handle:
        found = handle.get_tensor(name)
    if found.dtype != written.dtype or not torch.equal(_bytes(found), _bytes(written)):
        raise CheckpointError(f"{file}: tensor {name} does not read back as it was written")
    return {"name": name, "file": file.name, **described(found)}


def described(tensor: Tensor) -> dict[str, Any]:
    """Shape, type and content hash."""
    return {
        "shape": list(tensor.shape),
        "dtype": dtype_name(tensor),
        "sha256": content_sha256(tensor),
    }


def dtype_name(tensor: Tensor) -> str:
    """torch's name of the type without its prefix."""
    return str(tensor.dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8)
