"""Where a run stands; everything else about its future follows from the configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class TrainState:
    """Counters of work done."""

    step: int = 0
    """Optimizer steps, skipped ones included."""
    phase_index: int = 0
    phase_step: int = 0
    phase_rows: int = 0
    """Rows of the phase consumed: the data cursor."""
    tokens: int = 0
    """Tokens consumed over all phases."""
    supervised_tokens: int = 0
    skipped_steps: int = 0
    """Steps whose gradients were not finite and that changed nothing."""
    past_rows: tuple[int, ...] = ()
    """Rows consumed by every phase before this one: where sources go on (data.source)."""

    def after_step(self, rows: int, row_tokens: int, supervised: int, applied: bool) -> TrainState:
        """The state once a step over `rows` rows is done."""
        return replace(
            self,
            step=self.step + 1,
            phase_step=self.phase_step + 1,
            phase_rows=self.phase_rows + rows,
            tokens=self.tokens + rows * row_tokens,
            supervised_tokens=self.supervised_tokens + supervised,
            skipped_steps=self.skipped_steps + int(not applied),
        )

    def next_phase(self) -> TrainState:
        """The state at the start of the following phase: its cursor and schedule begin anew."""
        return replace(
            self,
            phase_index=self.phase_index + 1,
            phase_step=0,
            phase_rows=0,
            past_rows=(*self.past_rows, self.phase_rows),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TrainState:
        return TrainState(**{**values, "past_rows": tuple(values["past_rows"])})
