"""What a step computed, and what share that is of what the devices could (MFU)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from zaya_train.model.flops import Work, forward_flops, train_flops

if TYPE_CHECKING:
    from zaya_train.config.schema import ModelConfig
    from zaya_train.train.step import StepResult


class DeviceRates(Protocol):
    """FLOP/s of one device (runtime.peaks)."""

    @property
    def measured(self) -> float:
        """Of a plain matrix product."""
        ...

    def seconds_at_least(self, flops: float, expert_flops: float) -> float | None:
        """By its maker; None where not known."""
        ...


@dataclass(frozen=True)
class Throughput:
    """Counts a phase's steps."""

    model: ModelConfig
    ranks: int
    rates: DeviceRates

    def of(self, result: StepResult, seconds: float) -> dict[str, float]:
        """Fields of the step's metrics row: `flops` of the model, forward and backward, over all
        ranks; `mfu`, of the data sheet's peak, if that is known; `mfu_measured`, of a plain product
        on this device. Nothing for rows passed over.

        The peak of experts in fp8 is fp8's; the plain product is of the compute dtype, of which
        they may reach more than all.

        Exact: tokens, skipped experts, supervised tokens and attention's pairs are the step's own.
        Padding and what is made again count as no work.
        """
        tokens = int(result.load[0].sum())
        if not tokens:
            return {}
        work = Work(
            tokens=tokens,
            expert_tokens=int(result.load[:, : self.model.num_experts].sum()),
            pairs=result.pairs,
            supervised=result.supervised,
        )
        flops = train_flops(self.model, work)
        expert_flops = 3 * forward_flops(self.model, work).experts
        rate = flops / seconds / self.ranks
        found = {"flops": float(flops), "mfu_measured": rate / self.rates.measured}
        least = self.rates.seconds_at_least(flops, expert_flops)
        if least is not None:
            found["mfu"] = least / seconds / self.ranks
        return found
