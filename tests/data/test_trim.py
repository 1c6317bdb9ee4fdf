from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_train.data.sections import Kind, Rejected, RejectReason, Sample
from zaya_train.data.trim import Trimmed, TrimRule, trim

from .builders import sample_of

exchange = st.tuples(
    st.integers(0, 30),
    st.lists(st.tuples(st.integers(-1, 40), st.integers(1, 20)), min_size=1, max_size=3),
)
conversation = st.lists(exchange, min_size=1, max_size=4).map(sample_of)
Case = tuple[Sample, int]


@st.composite
def case(draw: st.DrawFn) -> Case:
    """A conversation and a budget, often one at which a rule gives way to the next."""
    sample = draw(conversation)
    total = len(sample.tokens)
    reasoning = int((sample.sections["kind"] == Kind.REASONING).sum())
    edges = [total, total - last_reasoning_length(sample)]
    edges.append(total - 2 * reasoning - int(reasoning_tokens(sample)))
    budget = draw(st.one_of(st.integers(1, total + 5), st.sampled_from(edges)))
    return sample, max(1, budget + draw(st.integers(-1, 1)))


def reasoning_tokens(sample: Sample) -> int:
    rows = reasoning_rows(sample)
    return int((rows["end"] - rows["start"]).sum())


def kept(sample: Sample, budget: int) -> Trimmed:
    outcome = trim(sample, budget)
    assert isinstance(outcome, Trimmed), outcome
    return outcome


def reasoning_rows(sample: Sample) -> np.ndarray:
    rows: np.ndarray = sample.sections[sample.sections["kind"] == Kind.REASONING]
    return rows


def last_reasoning_length(sample: Sample) -> int:
    rows = reasoning_rows(sample)
    if not len(rows) or rows["turn"][-1] != sample.sections["turn"][-1]:
        return 0
    return int(rows["end"][-1] - rows["start"][-1])


@settings(max_examples=400)
@given(case())
def test_kept_documents_fit_and_keep_everything_but_reasoning(case: Case) -> None:
    sample, budget = case
    outcome = trim(sample, budget)
    if isinstance(outcome, Rejected):
        return
    tokens = outcome.tokens(sample)
    assert len(tokens) == outcome.length <= budget
    assert outcome.length + outcome.removed_tokens == len(sample.tokens)
    assert (np.diff(tokens) > 0).all()
    removed = np.setdiff1d(sample.tokens, tokens)
    marker_or_reasoning = np.zeros(len(sample.tokens), dtype=bool)
    for row in reasoning_rows(sample):
        marker_or_reasoning[int(row["start"]) - 1 : int(row["end"]) + 1] = True
    assert marker_or_reasoning[removed].all()


@settings(max_examples=400)
@given(case())
def test_each_rule_does_exactly_what_it_says(case: Case) -> None:
    sample, budget = case
    total, last = len(sample.tokens), last_reasoning_length(sample)
    rows = reasoning_rows(sample)
    earlier = rows[: len(rows) - 1] if len(rows) and last_turn_reasons(sample) else rows
    earlier_tokens = int((earlier["end"] - earlier["start"] + 2).sum())
    outcome = trim(sample, budget)
    if total <= budget:
        assert isinstance(outcome, Trimmed) and outcome.rule == TrimRule.WHOLE
        assert outcome.keep == ((0, total),)
    elif total - last <= budget and last:
        assert isinstance(outcome, Trimmed) and outcome.rule == TrimRule.TAIL_CUT
        assert outcome.length == budget
        assert_prefix(sample, outcome)
    elif len(earlier) and total - earlier_tokens - last <= budget:
        assert isinstance(outcome, Trimmed) and outcome.rule == TrimRule.EARLIER_DROPPED
        assert outcome.length == min(budget, total - earlier_tokens)
        for row in earlier:
            block = np.arange(int(row["start"]) - 1, int(row["end"]) + 1)
            assert not np.isin(block, outcome.tokens(sample)).any()
    else:
        assert isinstance(outcome, Rejected)
        assert outcome.reason == RejectReason.ANSWERS_EXCEED_BUDGET


def last_turn_reasons(sample: Sample) -> bool:
    rows = reasoning_rows(sample)
    return bool(len(rows)) and rows["turn"][-1] == sample.sections["turn"][-1]


def assert_prefix(sample: Sample, outcome: Trimmed) -> None:
    """The kept part of the last reasoning is its start; what follows it is complete."""
    start, end = (int(reasoning_rows(sample)[-1][name]) for name in ("start", "end"))
    left = end - start - outcome.removed_tokens
    tokens = outcome.tokens(sample)
    assert tokens[: start + left].tolist() == list(range(start + left))
    assert tokens[start + left :].tolist() == list(range(end, len(sample.tokens)))


def test_tail_of_last_reasoning_goes_first() -> None:
    sample = sample_of([(5, [(10, 3)]), (5, [(10, 3)])])
    outcome = kept(sample, len(sample.tokens) - 10)
    assert outcome.rule == TrimRule.TAIL_CUT and outcome.removed_tokens == 10


def test_one_token_more_drops_earlier_reasoning_and_restores_the_last() -> None:
    sample = sample_of([(5, [(10, 3)]), (5, [(10, 3)])])
    outcome = kept(sample, len(sample.tokens) - 11)
    assert outcome.rule == TrimRule.EARLIER_DROPPED
    # 12 tokens of the earlier block leave, so the last reasoning is whole again.
    assert outcome.removed_tokens == 12


def test_answers_alone_over_budget_are_rejected_with_the_numbers() -> None:
    sample = sample_of([(5, [(10, 30)])])
    smallest = len(sample.tokens) - 10
    assert kept(sample, smallest).length == smallest
    outcome = trim(sample, smallest - 1)
    assert isinstance(outcome, Rejected)
    assert outcome.detail == f"{smallest} tokens without reasoning, budget {smallest - 1}"


def test_supervision_follows_the_kept_tokens() -> None:
    sample = sample_of([(5, [(10, 3)])])
    outcome = kept(sample, len(sample.tokens) - 4)
    mask = sample.supervised()
    assert outcome.supervised(sample).tolist() == mask[outcome.tokens(sample)].tolist()
    assert outcome.supervised(sample).sum() == mask.sum() - 4


@pytest.mark.parametrize("budget", [0, -3])
def test_no_budget_rejects(budget: int) -> None:
    assert isinstance(trim(sample_of([(1, [(1, 1)])]), budget), Rejected)


def test_reasoning_of_an_earlier_turn_is_dropped_whole_never_cut() -> None:
    sample = sample_of([(5, [(10, 3)]), (5, [(-1, 3)])])
    outcome = kept(sample, len(sample.tokens) - 1)
    assert outcome.rule == TrimRule.EARLIER_DROPPED and outcome.removed_tokens == 12


def test_exactly_the_budget_is_left_alone() -> None:
    sample = sample_of([(5, [(10, 3)])])
    assert kept(sample, len(sample.tokens)).rule == TrimRule.WHOLE
