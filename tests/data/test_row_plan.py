from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zaya_train.data.chat import encode_conversations
from zaya_train.data.row_plan import (
    Pieces,
    PlanSpec,
    RowPlan,
    join_pieces,
    plan_documents,
    plan_text,
)
from zaya_train.data.sections import Rejected, Sample
from zaya_train.data.trim import trim
from zaya_train.data.trim_table import REJECTED, RULES, UNSUPERVISED, trim_all

from .builders import CorpusFactory, problem, problems
from .conversations import conversations

if TYPE_CHECKING:
    from zaya_train.data.tokenizer import Tokenizer


def whole(lengths: list[int]) -> Pieces:
    sizes = np.array(lengths, dtype=np.int64)
    return Pieces(np.arange(len(sizes)), np.zeros_like(sizes), sizes)


def row_pieces(plan: RowPlan, index: int) -> list[tuple[int, int, int]]:
    part = slice(plan.offsets[index], plan.offsets[index + 1])
    return list(zip(*(column[part].tolist() for column in plan.pieces), strict=True))


def targets(pieces: list[tuple[int, int, int]], lengths: list[int]) -> int:
    """A token is a target's context unless its document ends with it."""
    return sum(n - (start + n == lengths[document]) for document, start, n in pieces)


@settings(max_examples=200)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(2, 50))
def test_text_rows_cover_every_token_once(lengths: list[int], row_tokens: int) -> None:
    plan = plan_text(whole(lengths), np.array(lengths), row_tokens)
    seen: Counter[tuple[int, int]] = Counter()
    partial = 0
    for index in range(len(plan)):
        pieces = row_pieces(plan, index)
        size = sum(n for _, _, n in pieces)
        assert size <= row_tokens
        partial += size < row_tokens
        assert plan.supervised[index] == targets(pieces, lengths) > 0
        assert plan.work[index] == sum(n * n for _, _, n in pieces)
        seen.update((d, t) for d, start, n in pieces for t in range(start, start + n))
    expected = {(d, t) for d, n in enumerate(lengths) for t in range(n)}
    assert partial <= 1 and set(seen.values()) == {1}
    assert all(t == lengths[d] - 1 for d, t in expected - set(seen))
    assert plan.facts["tokens"] + plan.facts["dropped_tokens"] == len(expected)


@pytest.mark.parametrize(
    ("lengths", "rows"), [([5, 4], 2), ([5, 5], 2), ([5, 6], 2), ([4, 3, 3, 2], 3), ([10], 2)]
)
def test_last_row_without_a_target_is_left_out(lengths: list[int], rows: int) -> None:
    """At 5 tokens a row, [5, 6] would leave one last token alone: nothing to predict from it."""
    assert len(plan_text(whole(lengths), np.array(lengths), 5)) == rows


def test_no_text_gives_no_row() -> None:
    assert len(plan_text(whole([]), np.array([], dtype=np.int64), 5)) == 0


@settings(max_examples=100)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=10), st.integers(2, 20))
def test_cut_pieces_join_to_what_they_were(lengths: list[int], row_tokens: int) -> None:
    plan = plan_text(whole(lengths), np.array(lengths), row_tokens)
    order = np.lexsort((plan.pieces.starts, plan.pieces.documents))
    joined = join_pieces(plan.pieces.take(order))
    assert len(set(joined.documents.tolist())) == len(joined.documents)
    assert int(joined.lengths.sum()) == plan.facts["tokens"]


def test_conversation_rows_hold_trimmed_documents_and_count_targets(
    corpora: CorpusFactory,
) -> None:
    corpus = corpora.open_chat("c", [*problems(80), problem("", answer="x" * 400)])
    spec = PlanSpec(row_tokens=128, max_documents=4)
    plan = plan_documents(corpus, spec)
    assert plan.facts["rejected"] == 1
    assert (np.diff(plan.work) >= 0).all() and (plan.supervised > 0).all()
    placed = Counter[int]()
    for index in range(len(plan)):
        pieces = row_pieces(plan, index)
        assert len(pieces) <= 4 and sum(n for _, _, n in pieces) <= 128
        count = 0
        for document, start, length in pieces:
            sample = corpus.sample(document)
            kept = trim(sample, 128)
            assert not isinstance(kept, Rejected) and (start, length) == (0, kept.length)
            count += int(kept.supervised(sample).sum())
        assert plan.supervised[index] == count
        placed.update(document for document, _, _ in pieces)
    assert placed == dict.fromkeys(range(80), 1)


def test_loss_on_all_counts_every_token_but_the_first(corpora: CorpusFactory) -> None:
    corpus = corpora.open_chat("c", problems(20))
    plan = plan_documents(corpus, PlanSpec(row_tokens=128, max_documents=9, loss_on="all"))
    for index in range(len(plan)):
        assert plan.supervised[index] == sum(n - 1 for _, _, n in row_pieces(plan, index))


@settings(max_examples=25, deadline=None)
@given(st.lists(conversations(), min_size=1, max_size=12), st.integers(1, 400))
def test_table_of_a_corpus_equals_trim_of_each(
    tmp_path_factory: pytest.TempPathFactory,
    bytes_tokenizer: Tokenizer,
    rows: list[list[dict[str, str]]],
    budget: int,
) -> None:
    kept = [
        row for row in rows if isinstance(encode_conversations(bytes_tokenizer, [row])[0], Sample)
    ]
    if not kept:
        return
    factory = CorpusFactory(tmp_path_factory.mktemp("table"), bytes_tokenizer)
    corpus = factory.open_chat("c", kept)
    table = trim_all(corpus, budget)
    for number in range(len(corpus)):
        sample = corpus.sample(number)
        outcome = trim(sample, budget)
        if isinstance(outcome, Rejected):
            assert table.outcomes[number] == REJECTED and table.lengths[number] == 0
            continue
        assert table.outcomes[number] not in (REJECTED, UNSUPERVISED)
        assert RULES[table.outcomes[number]] == outcome.rule
        assert table.lengths[number] == outcome.length
        assert table.supervised[number] == outcome.supervised(sample).sum()
