"""`zaya diff` on sides built by hand: where a difference begins and which phases are before it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.helpers.tiny import PHASE, tiny
from zaya_train.config.build import to_dict
from zaya_train.config.kinds import math_hash
from zaya_train.tools.diff import compare_sides
from zaya_train.tools.diff_sides import Side, load_side
from zaya_train.train.attempts import record_attempt
from zaya_train.train.identity import RUN_FILE, identity_of, record_identity

if TYPE_CHECKING:
    from zaya_train.train.identity import Identity

VERSIONS = {"code": "c", "torch": "t", "device": "d"}
WEB = {"data.sources.web.path": "web"}


def identity(changes: dict[str, Any] | None = None, **corpora: str) -> Identity:
    values = json.loads(json.dumps({"problems": "aa11", **corpora}))
    return identity_of(tiny(changes), values, 2, VERSIONS)


def side(*segments: tuple[int, Identity]) -> Side:
    return Side(Path("run"), segments)


def phases(*names: str) -> dict[str, Any]:
    return {"plan.phases": dict.fromkeys(names, PHASE)}


@pytest.mark.parametrize(
    ("first", "second", "common"),
    [
        (("short", "long"), ("x", "short", "long"), []),
        (("short", "long"), ("short", "x", "long"), ["short"]),
        (("short", "long"), ("short", "long", "x"), ["short", "long"]),
        (("short", "long", "x"), ("short", "x", "long"), ["short"]),
        (("short", "long"), ("short", "long"), ["short", "long"]),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_phases_are_common_up_to_the_first_that_only_one_side_has(
    first: tuple[str, ...], second: tuple[str, ...], common: list[str], turned: bool
) -> None:
    sides = [side((0, identity(phases(*names)))) for names in (first, second)]
    result = compare_sides(*reversed(sides)) if turned else compare_sides(*sides)
    assert (result.same, result.common_phases()) == (first == second, common)


def test_a_source_that_a_later_attempt_adds_concerns_the_phase_that_draws_it() -> None:
    drawing = {**WEB, "plan.phases.long.mixture": {"problems": 1.0, "web": 1.0}}
    sides = [side((0, identity()), (4, identity(drawing, web=digest))) for digest in ("b", "c")]
    result = compare_sides(*sides)
    assert [(f.key, f.after_step) for f in result.findings] == [("data.sources.web", 4)]
    assert result.common_phases() == ["short"]


def test_a_source_that_no_common_phase_draws_concerns_none_of_them() -> None:
    drawing = {**WEB, "plan.phases.long.mixture": {"web": 1.0}}
    left_out = {**WEB, **phases("short", "x")}
    sides = [
        side((0, identity(drawing, web=digest)), (4, identity(left_out))) for digest in ("b", "c")
    ]
    assert compare_sides(*sides).common_phases() == ["short", "x"]


@pytest.mark.parametrize("mixture", [{"problems": 1.0}, {"problems": 1.0, "web": 0.0}])
def test_what_is_said_of_a_source_that_nobody_draws_from_is_nothing(
    mixture: dict[str, float],
) -> None:
    base = {"plan.phases.long.mixture": mixture}
    there = {**base, **WEB, "data.sources.web.max_documents": 9}
    here = {**base, **WEB}
    assert math_hash(tiny(here)) == math_hash(tiny(there))
    assert compare_sides(side((0, identity(here))), side((0, identity(there)))).findings == ()
    if "web" not in mixture:
        assert math_hash(tiny(base)) == math_hash(tiny(there))
        result = compare_sides(side((0, identity(base))), side((0, identity(there))))
        assert result.same


def test_the_documents_of_a_source_count_from_the_phase_that_draws_it() -> None:
    drawing = {**WEB, "plan.phases.long.mixture": {"web": 1.0}}
    limited = {**drawing, "data.sources.web.max_documents": 9}
    assert math_hash(tiny(drawing)) != math_hash(tiny(limited))
    unused = {**WEB, "data.sources.web.max_documents": 9}
    sides = [
        side((0, identity(before)), (4, identity(after, web="b")))
        for before, after in ((WEB, drawing), (unused, limited))
    ]
    result = compare_sides(*sides)
    assert [(f.key, f.effect, f.after_step) for f in result.findings] == [
        ("data.sources.web.max_documents", "curve", 4)
    ]
    assert result.common_phases() == ["short"]


def test_the_documents_of_a_source_that_one_side_draws_from_are_named() -> None:
    drawing = {**WEB, "plan.phases.long.mixture": {"web": 1.0}, "data.sources.web.max_documents": 9}
    sides = [side((0, identity(WEB))), side((0, identity(drawing)))]
    for ordered in (sides, sides[::-1]):
        keys = {finding.key for finding in compare_sides(*ordered).findings}
        assert "data.sources.web.max_documents" in keys


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("checkpoint.branch_from", "elsewhere"),
        ("checkpoint.initial_weights", "folder"),
        ("model.init_std", 0.5),
    ],
)
def test_where_a_run_starts_from_is_nothing_to_one_that_resumes(key: str, value: Any) -> None:
    base, other = identity(), identity({key: value})
    resumed = compare_sides(side((0, other)), side((0, other), (10, base)))
    assert [(f.key, f.effect) for f in resumed.findings] == [(key, "none")]
    assert not compare_sides(side((0, other)), side((0, base))).same
    # The difference at the start is not forgotten behind it.
    assert not compare_sides(side((0, other), (10, base)), side((0, base), (10, other))).same


def recorded(run_dir: Path, *attempts: tuple[int, int, dict[str, Any]]) -> Path:
    for number, step, changes in attempts:
        record_attempt(run_dir, number, to_dict(tiny(changes)))
        record_identity(run_dir, number, step, identity(changes))
    return run_dir


def test_a_record_that_begins_with_a_later_attempt_says_nothing_of_the_steps_before(
    tmp_path: Path,
) -> None:
    other = {"optim.clip_norm": 2.0}
    whole = recorded(tmp_path / "whole", (1, 0, other), (2, 40, {}))
    late = recorded(tmp_path / "late", (2, 40, {}), (3, 60, {}))
    assert [start for start, _ in load_side(late).segments] == [40, 60]
    for sides, name in (((whole, late), "B"), ((late, whole), "A")):
        result = compare_sides(load_side(sides[0]), load_side(sides[1]))
        assert result.findings == ()
        assert result.unknown == (f"steps 1 to 40 of {name}",)
    assert (late / RUN_FILE).is_file()


def test_a_first_attempt_counts_from_the_start_and_one_that_began_anew_replaces_it(
    tmp_path: Path,
) -> None:
    """A branch begins at the step of its checkpoint."""
    run = recorded(tmp_path / "run", (1, 9, {"optim.clip_norm": 2.0}), (2, 9, {}), (3, 12, {}))
    segments = load_side(run).segments
    assert [start for start, _ in segments] == [0, 12]
    assert segments[0][1].config["optim"]["clip_norm"] == 1.0
