"""The receipt of an export: `export_receipt.json` for programs, EXPORT.md for people.

`complete` adds to the account of every tensor, which the writer leaves, what else must hold of the
folder, and refuses it where something does not; it runs before the folder takes its name.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors
import tokenizers
import torch
import transformers

import zaya_train
from zaya_train.config.build import to_dict
from zaya_train.config.errors import CheckpointError
from zaya_train.hub.config import config_from_hf
from zaya_train.hub.convert import RECEIPT, RECEIPT_FORMAT, from_hf
from zaya_train.run import CHECKPOINTS
from zaya_train.runtime.files import file_sha256, write_json, write_text
from zaya_train.runtime.versions import code_hash
from zaya_train.tools.export_check import HOW, Subject, check, not_verified
from zaya_train.tools.export_page import page
from zaya_train.tools.export_progress import progress
from zaya_train.tools.export_tokenizer import tokenizer_section
from zaya_train.train import manifest as manifests

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from zaya_train.config.schema import ModelConfig
    from zaya_train.hub.convert import Form
    from zaya_train.tools.export_tokens import CheckTokens
    from zaya_train.train.manifest import CheckpointRecord

PAGE = "EXPORT.md"
_BARE = {"format", "layout", "keys"}
"""Sections of a folder that was written without a run."""
_WHOLE = _BARE | {
    "compared", "run", "versions", "model", "rope", "tokenizer", "agreement", "skip", "check",
    "files",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What an export is made of."""

    checkpoint: Path
    record: CheckpointRecord
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    """Full tensors under our names, as trained."""
    form: Form
    tokens: CheckTokens | None
    """What the models are compared on; None: they are not, by the user's wish."""


def complete(folder: Path, origin: Origin) -> None:
    """Fill in the receipt of a folder that is otherwise written, and write its page.

    Raises:
        CheckpointError: the folder contradicts the checkpoint, or transformers reads it otherwise.
        NumericsError: transformers computes something else than our model.
    """
    form = origin.form
    rope = rope_section(folder, origin.record)
    tokenizer = tokenizer_section(folder, form.tokenizer, form.layout) if form.tokenizer else None
    written = read_receipt(folder)
    receipt = {
        "format": RECEIPT_FORMAT,
        "layout": form.layout,
        "compared": HOW[form.layout],
        "run": _run(origin),
        "versions": versions(),
        "model": to_dict(origin.config),
        "rope": rope,
        "tokenizer": tokenizer,
        **_compared(folder, origin),
        "check": origin.tokens.to_dict() if origin.tokens else None,
        "keys": written["keys"],
    }
    write_text(folder / PAGE, page(receipt))
    write_json(folder / RECEIPT, receipt | {"files": files_of(folder)})


def read_receipt(folder: Path) -> dict[str, Any]:
    """The receipt in a folder; CheckpointError where there is none that this version reads."""
    path = folder / RECEIPT
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {RECEIPT}; `zaya export-hf` leaves one")
    try:
        receipt = json.loads(path.read_text(encoding="utf-8"))
        version = receipt["format"]
        known = bool(receipt["keys"]["tensors"]) and receipt["layout"] in HOW
        sections = set(receipt)
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not a receipt ({error!r})") from error
    if version != RECEIPT_FORMAT or not known:
        raise CheckpointError(f"{path}: format {version!r}, this version reads {RECEIPT_FORMAT}")
    if sections not in (_BARE, _WHOLE):
        odd = sorted(sections ^ (_WHOLE if "run" in sections else _BARE))
        raise CheckpointError(f"{path}: section {odd[0]} is missing or unknown")
    return dict(receipt)


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file but the receipt, by its path in the folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in files
        # A receipt cannot hold its own hash.
        if path != folder / RECEIPT
    }


def versions() -> dict[str, str]:
    """Of everything that wrote or judged the folder."""
    return {
        "zaya_train": zaya_train.__version__,
        "code": code_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "tokenizers": tokenizers.__version__,
    }


def rope_section(folder: Path, record: CheckpointRecord) -> dict[str, Any]:
    """Rotation and context of the phase that is exported, and of the folder's config.json.

    CheckpointError where they contradict each other.
    """
    config, phase = config_from_hf(folder), _phase(record)
    trained = {
        "base": phase.get("rope_base", record.model["rope_base"]),
        "fraction": record.model["rope_fraction"],
        "context_tokens": phase.get("context_tokens"),
    }
    exported = {
        "base": config.rope_base,
        "fraction": config.rope_fraction,
        "context_tokens": config.max_context_tokens,
    }
    for key in ("base", "fraction"):
        if trained[key] != exported[key]:
            raise CheckpointError(
                f"{folder}/config.json: RoPE {key} {exported[key]:g}, but phase "
                f"{record.phase_name} was trained with {trained[key]:g}"
            )
    context = trained["context_tokens"]
    if context is not None and exported["context_tokens"] < context:
        raise CheckpointError(
            f"{folder}/config.json: max_position_embeddings {exported['context_tokens']}, but "
            f"phase {record.phase_name} was trained with contexts of {context}; raise "
            "model.max_context_tokens"
        )
    return {"phase": record.phase_name, "trained": trained, "exported": exported}


def _phase(record: CheckpointRecord) -> dict[str, Any]:
    """The plan's row of the phase that made the checkpoint; empty where it was not recorded."""
    rows = dict(record.lineage.get("phases", []))
    if record.phase_name not in rows:
        rows = record.identity.get("config", {}).get("plan", {}).get("phases", {})
    return dict(rows.get(record.phase_name, {}))


def _run(origin: Origin) -> dict[str, Any]:
    """Which training state this is; names without the paths of the machine it was exported on."""
    record, place = origin.record, origin.checkpoint.resolve()
    return {
        "run": place.parent.parent.name if place.parent.name == CHECKPOINTS else None,
        "checkpoint": place.name,
        "manifest_sha256": file_sha256(place / manifests.MANIFEST_NAME),
        "step": record.step,
        "phase": record.phase_name,
        **progress(record),
        "tokens": record.train_state.get("tokens"),
        "supervised_tokens": record.train_state.get("supervised_tokens"),
        "math_hash": record.identity.get("math_hash"),
        "config_hash": record.config_hash,
        "corpora": record.lineage.get("corpora", {}),
        "trained_with": record.identity.get("versions", {}),
    }


def _compared(folder: Path, origin: Origin) -> dict[str, Any]:
    if origin.tokens is None:
        return not_verified("--no-verify")
    dtype = origin.form.dtype or torch.float32
    stored = dict(from_hf(folder, dtype).state_dict())
    for name, value in origin.tensors.items():
        if not torch.equal(stored[name], value.to(stored[name].dtype)):
            raise CheckpointError(f"{folder}: {name} is not read back as it was trained")
    cast = any(stored[name].dtype != value.dtype for name, value in origin.tensors.items())
    trained = origin.tensors if cast else None
    subject = Subject(folder, origin.form.layout, origin.config, stored, trained)
    return check(subject, origin.tokens)
