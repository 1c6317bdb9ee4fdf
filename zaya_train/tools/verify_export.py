"""`zaya verify-export`: is a folder still what its receipt says, and does it still agree?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from zaya_train.config.build import build, to_dict
from zaya_train.config.errors import CheckpointError, DataError
from zaya_train.config.schema import ModelConfig
from zaya_train.hub.accounting import content_sha256, described, totals
from zaya_train.hub.config import config_from_hf
from zaya_train.hub.convert import folder_layout, from_hf, tensor_files
from zaya_train.tools.export_check import Subject, check
from zaya_train.tools.export_page import agreement_line
from zaya_train.tools.export_receipt import files_of, read_receipt
from zaya_train.tools.export_tokenizer import tokenizer_section
from zaya_train.tools.export_tokens import CheckTokens
from zaya_train.tools.transfer import checkpoint_of, trained_tensors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.console import Console

_LOSS_TOLERANCE = 1e-4
"""Largest relative change of the loss of the same tokens between machines, in fp32."""


@dataclass(frozen=True)
class VerifyRequest:
    """What `zaya verify-export` is asked for."""

    folder: Path
    against: Path | None = None
    """A run or a checkpoint that the folder's tensors must come from."""
    files_only: bool = False
    """Compare files, tensors and totals; compute nothing."""


def verify_export(request: VerifyRequest, console: Console) -> None:
    """Check a folder against its receipt and print a line for each thing that holds.

    Raises:
        DataError (2): no such folder.
        CheckpointError (3): no receipt, or the first thing that differs from it.
        NumericsError (5): transformers computes something else than our model.
    """
    folder = request.folder
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    receipt = read_receipt(folder)
    _say(console, _tensors(folder, receipt))
    _say(console, _files(folder, receipt))
    if "run" not in receipt:
        _say(console, "written without a run: nothing besides its tensors was recorded")
        return
    _say(console, _settings(folder, receipt))
    if receipt["tokenizer"]:
        _say(console, _tokenizer(folder, receipt))
    _say(console, _agreement(folder, receipt, request))
    if request.against:
        _say(console, _origin(request.against, receipt))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _tensors(folder: Path, receipt: Mapping[str, Any]) -> str:
    """Names, shapes, types, hashes and totals."""
    if (layout := folder_layout(folder)) != receipt["layout"]:
        raise CheckpointError(f"{folder}: of the {layout} layout, receipt: {receipt['layout']}")
    entries = receipt["keys"]["tensors"]
    listed = {part["name"]: part for entry in entries for part in entry["theirs"]}
    files = tensor_files(folder)
    for name in sorted(listed.keys() ^ files.keys()):
        where = "receipt" if name in listed else f"{files[name].name}"
        raise CheckpointError(f"{folder}: tensor {name} is in the {where} alone")
    for name, part in listed.items():
        with safe_open(files[name], framework="pt") as handle:
            found = described(handle.get_tensor(name)) | {"file": files[name].name}
        for key, value in found.items():
            if value != part[key]:
                raise CheckpointError(
                    f"{folder}: tensor {name}: {key} {_short(value)}, receipt: {_short(part[key])}"
                )
    _require_equal(f"{folder}: totals", totals(entries), receipt["keys"]["totals"])
    count = receipt["keys"]["totals"]
    return f"tensors: all {count['theirs']:,} as recorded, {count['values']:,} values"


def _files(folder: Path, receipt: Mapping[str, Any]) -> str:
    if "files" not in receipt:
        return "files: not recorded"
    _require_equal(f"{folder}: file", files_of(folder), receipt["files"])
    return f"files: all {len(receipt['files'])} as recorded"


def _settings(folder: Path, receipt: Mapping[str, Any]) -> str:
    """config.json against the recorded model and rotation."""
    found, stated = config_from_hf(folder), build(ModelConfig, receipt["model"], "receipt.model")
    for key, value in to_dict(found).items():
        # Which output a skipped token gets is not in the format.
        if key != "skip_output" and value != (recorded := getattr(stated, key)):
            raise CheckpointError(f"{folder}/config.json: {key} {value}, receipt: {recorded}")
    rope = {"base": found.rope_base, "fraction": found.rope_fraction}
    trained = {key: receipt["rope"]["trained"][key] for key in rope}
    _require_equal(f"{folder}/config.json: RoPE", rope, trained)
    return f"config.json: the recorded model, RoPE of phase {receipt['rope']['phase']}"


def _tokenizer(folder: Path, receipt: Mapping[str, Any]) -> str:
    found = tokenizer_section(folder, folder, receipt["layout"])
    _require_equal(f"{folder}: tokenizer", found, receipt["tokenizer"])
    return "tokenizer and chat template: as recorded, and the same to transformers"


def _agreement(folder: Path, receipt: Mapping[str, Any], request: VerifyRequest) -> str:
    if request.files_only:
        return "agreement: not repeated (--files-only)"
    if not receipt["agreement"]["verified"]:
        return f"agreement: not verified at export ({receipt['agreement']['reason']})"
    kept = receipt["check"]
    tokens = CheckTokens(kept["source"], tuple(map(tuple, kept["documents"])))
    stored = dict(from_hf(folder, _stored_dtype(receipt)).state_dict())
    config = build(ModelConfig, receipt["model"], "receipt.model")
    found = check(Subject(folder, receipt["layout"], config, stored), tokens)
    before = receipt["agreement"]["fp32"]["loss"]
    for side, value in before.items():
        now = found["agreement"]["fp32"]["loss"][side]
        if side in ("ours", "theirs") and abs(now - value) > _LOSS_TOLERANCE * abs(value):
            raise CheckpointError(
                f"{folder}: loss of {side} on the recorded tokens: {now:.6f}, receipt: {value:.6f}"
            )
    return f"agreement: {agreement_line({**receipt, **found})}"


def _stored_dtype(receipt: Mapping[str, Any]) -> torch.dtype:
    first = next(e for e in receipt["keys"]["tensors"] if e["ours"] == "embedding")
    dtype: torch.dtype = getattr(torch, first["theirs"][0]["dtype"])
    return dtype


def _origin(source: Path, receipt: Mapping[str, Any]) -> str:
    """The recorded hashes of our tensors against a checkpoint's."""
    checkpoint = checkpoint_of(source)
    tensors = trained_tensors(checkpoint)
    entries = {entry["ours"]: entry for entry in receipt["keys"]["tensors"]}
    for name in sorted(entries.keys() ^ tensors.keys()):
        where = "receipt" if name in entries else "checkpoint"
        raise CheckpointError(f"{checkpoint}: tensor {name} is in the {where} alone")
    for name, entry in entries.items():
        if (found := content_sha256(tensors[name])) != entry["sha256"]:
            raise CheckpointError(
                f"{checkpoint}: tensor {name}: sha256 {_short(found)}, receipt: "
                f"{_short(entry['sha256'])}; the export is of step {receipt['run']['step']}"
            )
    return f"origin: all {len(tensors):,} tensors are those of {checkpoint}"


def _require_equal(what: str, found: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    for key in sorted(found.keys() | stated.keys()):
        if found.get(key) != stated.get(key):
            raise CheckpointError(
                f"{what} {key}: {_short(found.get(key))}, receipt: {_short(stated.get(key))}"
            )


def _short(value: object) -> str:
    if isinstance(value, dict) and "sha256" in value:
        return f"{value.get('bytes', '')} bytes, sha256 {str(value['sha256'])[:12]}".strip()
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."
