"""An exported folder against our model: agreement with transformers, and the skip class's verdict.

Both sections go into the receipt as they are; `check` raises where the folder must not be used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from zaya_train.config.errors import NumericsError
from zaya_train.hub.config import DIALECTS
from zaya_train.tools.export_agreement import (
    LOGIT_TOLERANCE,
    MARGIN_TOLERANCE,
    Comparison,
    problems,
    skipped,
)
from zaya_train.tools.export_passes import (
    SKIP_BIAS,
    Pass,
    model_of,
    our_pass,
    restore_skip_biases,
    their_pass,
    twin_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    from zaya_train.config.schema import ModelConfig
    from zaya_train.hub.names import Layout
    from zaya_train.tools.export_passes import SkipOutput
    from zaya_train.tools.export_tokens import CheckTokens

HOW = {
    "native": "loaded by transformers from the folder",
    "legacy": "transformers reads the native layout only: read back by zaya-train and handed to it "
    "under the native names",
}


@dataclass(frozen=True)
class Subject:
    """What is compared: a folder, and the model that it is to hold."""

    folder: Path
    layout: Layout
    config: ModelConfig
    """As trained, with its own skip_output."""
    stored: Mapping[str, Tensor]
    """Our names -> values as the folder holds them."""
    trained: Mapping[str, Tensor] | None = None
    """Before a cast; None where there was none."""


def check(subject: Subject, tokens: CheckTokens) -> dict[str, Any]:
    """Sections `agreement` and `skip`.

    Raises:
        NumericsError: a tolerance is exceeded, or values are not finite.
        CheckpointError: transformers does not load the folder, or holds other values than its file.
    """
    documents = [torch.tensor(document) for document in tokens.documents]
    # What merged transformers computes for a skipped token, whatever was trained.
    mine = _passes(subject.stored, subject.config, "zero", documents)
    agreement, other, loading = _against_twin(subject, tokens, documents, mine)
    skip = _skip(subject, documents, (mine, other)) | loading
    if any(value.dtype == torch.bfloat16 for value in subject.stored.values()):
        agreement["stored_dtype"] = _in_stored_dtype(subject, mine, documents)
    if subject.trained is not None:
        agreement["cast"] = _cast(subject.trained, subject.config, mine, documents)
    return {"agreement": agreement, "skip": skip}


def _passes(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    skip_output: SkipOutput,
    documents: Sequence[Tensor],
) -> list[Pass]:
    """What our model makes of every document. The passes stay and the model does not: a published
    one is ten times as large, and two at a time are what a host cannot hold."""
    model = model_of(tensors, config, skip_output)
    return [our_pass(model, ids) for ids in documents]


def _against_twin(
    subject: Subject, tokens: CheckTokens, documents: Sequence[Tensor], mine: Sequence[Pass]
) -> tuple[dict[str, Any], list[Pass], dict[str, Any]]:
    """transformers in fp32: the section `agreement`, its choices and scores, and what loading
    changed, of a folder that it loads itself."""
    twin, read = twin_of(subject.folder, subject.layout, torch.float32, subject.stored)
    reset = restore_skip_biases(twin, read)
    comparison, other = Comparison(), []
    for ids, own in zip(documents, mine, strict=True):
        other.append(their_pass(twin, ids, own.choices))
        comparison.add(ids, own, other[-1])
        # Its choices and scores are all that is needed of it from here on.
        other[-1].logits, other[-1].streams = torch.empty(0), []
    agreement = _agreement(comparison.result())
    if found := problems(agreement["fp32"]):
        raise NumericsError(
            f"export: transformers computes something else than our model on {tokens.source}: "
            + "; ".join(found)
        )
    if subject.layout != "native":
        return agreement, other, {}
    loading = {
        "loading": "lost" if reset else "kept",
        "biases_reset_by_transformers": _reset(twin, documents, reset),
    }
    return agreement, other, loading


def _agreement(result: dict[str, Any]) -> dict[str, Any]:
    return {
        "verified": True,
        "logit_tolerance": LOGIT_TOLERANCE,
        "margin_tolerance": MARGIN_TOLERANCE,
        "fp32": result,
    }


def not_verified(reason: str) -> dict[str, Any]:
    """The sections of an export that was not compared."""
    return {
        "agreement": {"verified": False, "reason": reason},
        "skip": {"verified": False, "reason": reason},
    }


def _skip(
    subject: Subject, documents: Sequence[Tensor], passes: tuple[Sequence[Pass], Sequence[Pass]]
) -> dict[str, Any]:
    experts, config = subject.config.num_experts, subject.config
    mine, other = passes
    layers = skipped(mine, experts)
    target = DIALECTS[subject.layout].skip_output
    scores = [torch.cat(rows) for rows in zip(*(p.scores for p in other), strict=True)]
    closest = [float((row[:, experts] - row[:, :experts].amax(-1)).max()) for row in scores]
    taken = [_skips(found, experts) for found in mine]
    same = config.skip_output == target
    touched = [number for number, rows in enumerate(taken) if bool(rows.any())]
    section: dict[str, Any] = {
        "verified": True,
        "trained": config.skip_output,
        "target": target,
        "verdict": "same" if same else ("differs" if any(layers) else "unused"),
        "tokens": sum(map(len, documents)),
        "skipped_by_layer": layers,
        "closest_by_layer": closest,
        "touched_tokens": sum(int(rows.cumsum(0).bool().sum()) for rows in taken),
        "touched_documents": touched,
    }
    if any(layers):
        section["difference"] = _difference(
            subject, [documents[i] for i in touched], [mine[i] for i in touched]
        )
    return section


def _skips(found: Pass, experts: int) -> Tensor:
    """[S] tokens that took the skip class in some layer."""
    return (torch.stack(found.choices) == experts).any(0)


def _difference(
    subject: Subject, documents: Sequence[Tensor], zero: Sequence[Pass]
) -> dict[str, Any]:
    """What the other output of skipped tokens changes in the documents that have any."""
    comparison = Comparison()
    identity = _passes(subject.stored, subject.config, "identity", documents)
    for ids, first, second in zip(documents, identity, zero, strict=True):
        comparison.add_unscored(ids, first, second)
    result = comparison.summary()
    return {
        "logits_largest": result["largest"],
        "loss_identity": result["loss"]["ours"],
        "loss_zero": result["loss"]["theirs"],
    }


def _reset(twin: Any, documents: Sequence[Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """Layers whose trained skip bias transformers loses when it loads the folder, and how many
    choices that changes."""
    changed = 0
    restored = [their_pass(twin, ids).choices for ids in documents] if layers else []
    for number in layers:
        twin.model.layers[number].mlp.gate.balancing_biases[-1] = SKIP_BIAS
    for ids, before in zip(documents, restored, strict=False):
        pairs = zip(their_pass(twin, ids).choices, before, strict=True)
        changed += sum(int((one != two).sum()) for one, two in pairs)
    return {"layers": list(layers), "to": SKIP_BIAS, "choices_changed": changed}


def _in_stored_dtype(
    subject: Subject, mine: Sequence[Pass], documents: Sequence[Tensor]
) -> dict[str, Any]:
    """transformers as it computes by itself, in the stored type, against fp32; no tolerance."""
    twin, _ = twin_of(subject.folder, subject.layout, None, subject.stored)
    comparison = Comparison()
    for ids, own in zip(documents, mine, strict=True):
        comparison.add(ids, own, their_pass(twin, ids))
    return {"dtype": str(twin.dtype).removeprefix("torch."), **comparison.result()}


def _cast(
    trained: Mapping[str, Tensor],
    config: ModelConfig,
    mine: Sequence[Pass],
    documents: Sequence[Tensor],
) -> dict[str, Any]:
    """What rounding the weights costs our own model; no tolerance."""
    comparison = Comparison()
    before = _passes(trained, config, "zero", documents)
    for ids, first, second in zip(documents, before, mine, strict=True):
        comparison.add_unscored(ids, first, second)
    return comparison.summary()
