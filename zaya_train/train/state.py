"""Where a run stands; everything else about its future follows from the configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
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
    """Steps that changed nothing: gradients not finite or spiking, or rows passed over."""
    past_rows: tuple[int, ...] = ()
    """Rows consumed by every phase before this one: where sources go on (data.source)."""
    skipped_in_a_row: int = 0
    """Of the skipped steps, those since the last applied one."""
    streak_first_row: int = 0
    """First row of the phase that these consumed."""
    norms: tuple[float, ...] = ()
    """Gradient norms of the newest applied steps of the phase, oldest first (train.guard)."""
    avoided: tuple[tuple[int, int], ...] = ()
    """Ranges [first, stop) of the phase's rows that roll backs decided to pass over."""
    measured: dict[str, Any] = field(default_factory=dict)
    """What the phase before this one ended with, for its gate (phases.gates)."""

    @property
    def avoids(self) -> bool:
        """Whether the coming step's rows are passed over."""
        return any(first <= self.phase_rows < stop for first, stop in self.avoided)

    def after_step(self, rows: int, row_tokens: int, supervised: int, applied: bool) -> TrainState:
        """The state once a step over `rows` rows is done."""
        in_a_row = self.skipped_in_a_row + int(not self.avoids)
        streak = self.streak_first_row if self.skipped_in_a_row else self.phase_rows
        return replace(
            self,
            step=self.step + 1,
            phase_step=self.phase_step + 1,
            phase_rows=self.phase_rows + rows,
            tokens=self.tokens + rows * row_tokens,
            supervised_tokens=self.supervised_tokens + supervised,
            skipped_steps=self.skipped_steps + int(not applied),
            skipped_in_a_row=0 if applied else in_a_row,
            streak_first_row=0 if applied or not in_a_row else streak,
        )

    def next_phase(self, measured: dict[str, Any] | None = None) -> TrainState:
        """The state at the start of the following phase: its cursor, schedule and guard begin anew.

        measured: what this phase ended with.
        """
        return replace(
            self,
            phase_index=self.phase_index + 1,
            phase_step=0,
            phase_rows=0,
            past_rows=(*self.past_rows, self.phase_rows),
            skipped_in_a_row=0,
            streak_first_row=0,
            norms=(),
            avoided=(),
            measured=measured or {},
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TrainState:
        """Of `to_dict`, also after JSON, which has no tuples; counters it lacks start at zero."""
        made = {**values, "past_rows": tuple(values["past_rows"])}
        made["norms"] = tuple(values.get("norms", ()))
        made["avoided"] = tuple((first, stop) for first, stop in values.get("avoided", ()))
        return TrainState(**made)
