"""A plan as a chain of jobs: which phase a job may run, and what its layout must suit."""

from __future__ import annotations

import pytest

from tests.helpers.tiny import tiny
from zaya_train.config.check import problems
from zaya_train.config.errors import ConfigError
from zaya_train.phases.chain import only_phase_is_done


def test_without_a_choice_nothing_is_done_early() -> None:
    assert not only_phase_is_done(tiny(), 0) and not only_phase_is_done(tiny(), 1)


def test_the_chosen_phase_runs_once_and_in_its_turn() -> None:
    first, second = (tiny({"run.only_phase": name}) for name in ("short", "long"))
    assert not only_phase_is_done(first, 0) and only_phase_is_done(first, 1)
    assert not only_phase_is_done(second, 1) and only_phase_is_done(second, 2)
    with pytest.raises(ConfigError, match="long starts from the end of short"):
        only_phase_is_done(second, 0)


def test_a_layout_needs_to_suit_the_chosen_phase_alone() -> None:
    """On one rank the second phase's two context ranks have no place."""
    assert any("plan.phases.long" in line for line in problems(tiny(), 1))
    assert not list(problems(tiny({"run.only_phase": "short"}), 1))
    assert any("plan.phases.long" in line for line in problems(tiny({"run.only_phase": "long"}), 1))
    (line,) = problems(tiny({"run.only_phase": "shrot"}), 2)
    assert line == "run.only_phase: shrot is not one of short, long"
