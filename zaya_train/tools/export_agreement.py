"""Does transformers compute what our model does: logits, loss and expert choices on given tokens.

Both compute in fp32 from the stored weights, so only rounding may differ. Where that tips an expert
choice, everything behind it would be another computation; so transformers' tokens go to the experts
of our choice, every token is judged, and its own choices by how much it prefers them.

Legend: L layers, S tokens, C router classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from zaya_train.config.errors import NumericsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from zaya_train.tools.export_passes import Pass

LOGIT_TOLERANCE = 1e-4
"""Largest difference of a logit, in standard deviations of the logits. Right conversions of 4 to 40
layers stayed below 2e-5; the smallest mistake that showed, a norm's epsilon, made 2e-3
(docs/lab-log.md)."""
MARGIN_TOLERANCE = 5e-4
"""Largest preference for another expert, in standard deviations of a token's biased probabilities:
a router that hardly prefers any expert must still prefer the same."""
_ROUNDING = 5e-7
"""Added to that: some roundings of a probability in fp32."""
_PERCENTILES = (50, 90, 99)


@dataclass
class Comparison:
    """Two models over several documents; `add` each, then `result`."""

    differences: list[Tensor] = field(default_factory=list)
    """[S] per document: largest difference of a token's logits."""
    spreads: list[Tensor] = field(default_factory=list)
    """[S] per document: standard deviation of our logits over the vocabulary."""
    losses: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """[S - 1] per document: our and their loss of each next token."""
    same: list[Tensor] = field(default_factory=list)
    """[L, S] per document: equal choices."""
    margins: list[Tensor] = field(default_factory=list)
    """[L, S] per document: by how much their scores prefer their choice to ours."""
    score_spreads: list[Tensor] = field(default_factory=list)
    """[L] per document: standard deviation of their scores over the experts."""
    streams: list[Tensor] = field(default_factory=list)
    """[L] per document: largest difference of the stream, over its root mean square."""

    def add(self, ids: Tensor, ours: Pass, theirs: Pass) -> None:
        """One document [S]. NumericsError where either computes values that are not finite."""
        self.add_unscored(ids, ours, theirs)
        mine, other, scores = map(torch.stack, (ours.choices, theirs.choices, theirs.scores))
        chosen = [scores.gather(2, choice.unsqueeze(2)).squeeze(2) for choice in (other, mine)]
        self.margins.append(chosen[0] - chosen[1])
        # Without the skip class, whose bias of -1 is no preference among experts.
        self.score_spreads.append(scores[..., :-1].std(-1, correction=0).mean(-1))
        pairs = zip(ours.streams, theirs.streams, strict=True)
        self.streams.append(torch.stack([_relative(one, two) for one, two in pairs]))

    def add_unscored(self, ids: Tensor, ours: Pass, theirs: Pass) -> None:
        """One document [S] of which only `summary` is asked."""
        for name, found in (("our model", ours), ("the other model", theirs)):
            if not bool(torch.isfinite(found.logits).all()):
                raise NumericsError(f"export: {name} computes logits that are not finite")
        self.differences.append((ours.logits - theirs.logits).abs().amax(-1))
        self.spreads.append(ours.logits.std(-1))
        self.losses.append((_losses(ours.logits, ids), _losses(theirs.logits, ids)))
        self.same.append(torch.stack(ours.choices) == torch.stack(theirs.choices))

    def summary(self) -> dict[str, Any]:
        """Largest difference of a logit in standard deviations, loss, share of equal choices."""
        spread = torch.cat(self.spreads).mean()
        mine, other = (torch.cat(side) for side in zip(*self.losses, strict=True))
        return {
            "tokens": sum(map(len, self.differences)),
            "documents": len(self.differences),
            "logit_std": float(spread),
            "largest": _largest(torch.cat(self.differences) / spread),
            "loss": {
                "ours": float(mine.mean()),
                "theirs": float(other.mean()),
                "largest_difference_of_a_token": _largest((mine - other).abs()),
            },
            "equal_choices": float(torch.cat(self.same, 1).float().mean()),
        }

    def result(self) -> dict[str, Any]:
        """`summary`, with the logits of tokens by themselves and the choices of every layer."""
        summary = self.summary()
        relative = torch.cat(self.differences) / summary["logit_std"]
        layers = [self._layer(number, row) for number, row in enumerate(torch.cat(self.same, 1))]
        return summary | {
            "logits": {
                "largest": _largest(relative),
                **{f"p{q}": _percentile(relative, q) for q in _PERCENTILES},
            },
            "layers": layers,
        }

    def _layer(self, number: int, same: Tensor) -> dict[str, Any]:
        margins = torch.cat([m[number] for m in self.margins])[~same]
        spread = float(torch.stack([s[number] for s in self.score_spreads]).mean())
        return {
            "layer": number,
            "equal": float(same.float().mean()),
            "differing": int((~same).sum()),
            "largest_margin": _largest(margins),
            "margin_tolerance": _ROUNDING + MARGIN_TOLERANCE * spread,
            "stream_difference": float(torch.stack([s[number] for s in self.streams]).max()),
        }


def problems(result: dict[str, Any]) -> list[str]:
    """What exceeds its tolerance, with the numbers; in the order of the computation."""
    found = []
    for layer in result["layers"]:
        margin, tolerance = layer["largest_margin"], layer["margin_tolerance"]
        # Written so that what is no number exceeds it.
        if not margin <= tolerance:
            found.append(
                f"layer {layer['layer']} sends {layer['differing']} tokens to other experts, by "
                f"margins of up to {margin:.2g} (tolerance {tolerance:.1e})"
            )
    largest = result["logits"]["largest"]
    if not largest <= LOGIT_TOLERANCE:
        layers = result["layers"]
        worst = next(
            (x for x in layers if not x["stream_difference"] <= LOGIT_TOLERANCE), layers[-1]
        )
        found.append(
            f"logits differ by {largest:.2g} of their standard deviation (tolerance "
            f"{LOGIT_TOLERANCE:.0e}); behind layer {worst['layer']} the stream differs by "
            f"{worst['stream_difference']:.2g} of its root mean square"
        )
    return found


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    return cross_entropy(logits[:-1].double(), ids[1:], reduction="none")


def _relative(one: Tensor, two: Tensor) -> Tensor:
    return (one - two).abs().max() / one.square().mean().sqrt()


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


def _percentile(values: Tensor, percent: int) -> float:
    """Nearest rank; 0 of nothing."""
    if not len(values):
        return 0.0
    rank = max(1, math.ceil(percent / 100 * len(values)))
    return float(values.kthvalue(rank).values)


def skipped(passes: Sequence[Pass], num_experts: int) -> list[int]:
    """Tokens that took the skip class, by layer."""
    return [
        sum(int((found.choices[layer] == num_experts).sum()) for found in passes)
        for layer in range(len(passes[0].choices))
    ]
