"""A source over phases: nothing twice, nothing skipped, whatever the contexts and mixtures."""

from __future__ import annotations

import fcntl
import shutil
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from zaya_train.config.errors import DataError, StorageError
from zaya_train.data import plan_store
from zaya_train.data.corpus import Corpus
from zaya_train.data.row_plan import PlanSpec
from zaya_train.data.source import Past, RowSource, SourceRequest, open_source
from zaya_train.data.stream import PastPhase, PhaseStream

from .builders import CorpusFactory, data_config, phase_config, problems

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.config.schema import PhaseConfig

WORDS = "the quick brown fox jumps over the lazy dog"


def request(row_tokens: int, past: Past | None = None, **settings: Any) -> SourceRequest:
    balance, loss_on = settings.pop("balance_rows", 1), settings.pop("loss_on", "assistant")
    spec = PlanSpec(row_tokens=row_tokens, max_documents=99, balance_rows=balance, loss_on=loss_on)
    return SourceRequest(name="s", seed=3, spec=spec, past=past or Past(), **settings)


def seen(source: RowSource, draws: range) -> Counter[tuple[int, int]]:
    """(document, token) of text, (document, 0) of conversations."""
    found: Counter[tuple[int, int]] = Counter()
    text = source.corpus.manifest.kind == "text"
    for draw in draws:
        for document, start, length in zip(*source.pieces(draw), strict=True):
            tokens = range(int(start), int(start + length)) if text else [0]
            found.update((int(document), token) for token in tokens)
    return found


@pytest.fixture
def chat(corpora: CorpusFactory) -> Corpus:
    return corpora.open_chat("chat", problems(120))


@pytest.fixture
def text(corpora: CorpusFactory) -> Corpus:
    path = corpora.text("text", [f"{n} {WORDS}"[: 20 + n] * (1 + n % 3) for n in range(60)])
    return Corpus.open(path)


@pytest.mark.parametrize("kind", ["chat", "text"])
@pytest.mark.parametrize("balance", [1, 4])
def test_three_contexts_make_one_epoch(kind: str, balance: int, chat: Corpus, text: Corpus) -> None:
    corpus = chat if kind == "chat" else text
    settings: dict[str, Any] = {"balance_rows": balance}
    first = open_source(corpus, request(160, **settings))
    total = seen(first, range(5))
    past = Past().then(160, "assistant", 5)
    second = open_source(corpus, request(320, past, **settings))
    assert second.carried is not None and second.report.carried_rows == len(second.carried)
    total += seen(second, range(3))
    past = past.then(320, "assistant", 3)
    third = open_source(corpus, request(512, past, **settings))
    assert third.carried is not None
    total += seen(third, range(len(third.carried)))
    if kind == "chat":
        assert total == {(n, 0): 1 for n in range(len(corpus))}
    else:
        everything = {(n, t) for n in range(len(corpus)) for t in range(int(corpus.lengths[n]))}
        assert set(total.values()) == {1}
        missing = everything - set(total)
        assert all(t == corpus.lengths[n] - 1 for n, t in missing)
    again = range(len(third.carried), len(third.carried) + len(third.plan))
    assert set(seen(third, again).values()) == {1}


@pytest.mark.parametrize("kind", ["chat", "text"])
def test_loss_on_may_change_at_every_phase(kind: str, chat: Corpus, text: Corpus) -> None:
    """Contexts alone would name another past: rows of plans that were never drawn from."""
    corpus = chat if kind == "chat" else text
    past, total = Past(), Counter[tuple[int, int]]()
    phases = [(160, "all", 4), (160, "assistant", 3), (320, "all", 2), (512, "assistant", None)]
    for row_tokens, loss_on, rows in phases:
        source = open_source(corpus, request(row_tokens, past, loss_on=loss_on))
        rows = len(source.carried or ()) if rows is None else rows
        total += seen(source, range(rows))
        past = past.then(row_tokens, loss_on, rows)
    assert set(total.values()) == {1}
    if kind == "chat":
        assert len(total) == len(corpus)


def test_same_context_goes_on_with_the_same_plan(chat: Corpus) -> None:
    alone = open_source(chat, request(256))
    later = open_source(chat, request(256, Past().then(256, "assistant", 7)))
    assert later.carried is None and later.plan.key == alone.plan.key
    for draw in range(40):
        assert later.row(draw).documents.tolist() == alone.row(draw + 7).documents.tolist()


def test_plans_of_the_past_are_made_where_they_are_gone(
    chat: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process: a lock that is not free at once would never be."""
    flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: flock(file, how | fcntl.LOCK_NB))
    past = Past().then(160, "assistant", 5).then(320, "assistant", 3)
    before = open_source(chat, request(512, past))
    shutil.rmtree(chat.path / "plans")
    again = open_source(chat, request(512, past))
    assert before.carried is not None and again.carried is not None
    assert len(list((chat.path / "plans").glob("*/plan.json"))) == 5
    for draw in range(len(before.carried)):
        assert again.pieces(draw).documents.tolist() == before.pieces(draw).documents.tolist()


def test_a_finished_epoch_leaves_nothing(chat: Corpus) -> None:
    rows = len(open_source(chat, request(160)).plan)
    source = open_source(chat, request(320, Past().then(160, "assistant", 2 * rows)))
    assert source.carried is not None and len(source.carried) == 0
    assert seen(source, range(len(source.plan))) == {(n, 0): 1 for n in range(len(chat))}


def test_past_joins_equal_contexts_and_skips_nothing_drawn() -> None:
    past = Past().then(4, "all", 2).then(4, "all", 3).then(8, "all", 0).then(8, "all", 1)
    past = past.then(4, "all", 1).then(4, "assistant", 6).then(4, "assistant", 1)
    draws = (4, "all", 5), (8, "all", 1), (4, "all", 1), (4, "assistant", 7)
    assert past.draws == draws


@pytest.mark.parametrize("drawn", [0, 1, 5, None])
def test_what_is_left_is_what_the_rest_of_the_epoch_would_draw(
    chat: Corpus, drawn: int | None
) -> None:
    """Carried rows while they last (None: all drawn), then the epoch under way."""
    past = Past().then(160, "assistant", 5)
    carried = len(open_source(chat, request(320, past)).carried or ())
    for extra in (0, 3):
        rows = carried + extra if drawn is None else drawn
        source = open_source(chat, request(320, past.then(320, "assistant", rows)))
        rest = carried - rows if drawn is not None else -extra % len(source.plan)
        expected = seen(source, range(rest))
        assert Counter((int(n), 0) for n in source.left().documents) == expected


def test_capped_source_uses_a_fixed_choice_of_documents(chat: Corpus) -> None:
    source = open_source(chat, request(256, max_documents=30))
    documents = seen(source, range(len(source.plan)))
    assert len(documents) == 30 and set(documents.values()) == {1}
    assert source.report.whole + source.report.tail_cut == 30
    other = open_source(chat, replace(request(256, max_documents=30), seed=4))
    assert seen(other, range(len(other.plan))) != documents


def test_plans_are_stored_once_and_read_again(
    chat: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = open_source(chat, request(256))
    folder = chat.path / "plans" / first.plan.key
    before = (folder / plan_store.PLAN_FILE).stat().st_mtime_ns

    def never(*_: object) -> None:
        raise AssertionError("planned again")

    monkeypatch.setattr(plan_store, "_store", never)
    again = open_source(chat, request(256))
    assert (folder / plan_store.PLAN_FILE).stat().st_mtime_ns == before
    assert again.row(3).tokens.tolist() == first.row(3).tokens.tolist()
    with pytest.raises(AssertionError, match="planned again"):
        open_source(chat, request(257))


def test_other_content_gets_another_plan(corpora: CorpusFactory) -> None:
    keys = {
        open_source(corpora.open_chat(name, problems(20, seed=seed)), request(256)).plan.key
        for name, seed in (("a", 0), ("b", 1), ("c", 0))
    }
    assert len(keys) == 2


@pytest.mark.parametrize("name", ["lengths", "documents", "plan.json"])
def test_a_damaged_plan_is_named(chat: Corpus, name: str) -> None:
    source = open_source(chat, request(256))
    file = chat.path / "plans" / source.plan.key / (name if "." in name else f"{name}.bin")
    content = bytearray(file.read_bytes())
    content[0] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"{file.name}: .*; remove"):
        open_source(chat, request(256))


def test_a_place_that_takes_no_plans_is_named(chat: Corpus, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"plans cannot be stored: .*data.plan_dir"):
        open_source(chat, replace(request(256), plan_dir=str(tmp_path / "file" / "plans")))
    source = open_source(chat, replace(request(256), plan_dir=str(tmp_path / "elsewhere")))
    assert (tmp_path / "elsewhere" / source.plan.key).is_dir()
    assert not (chat.path / "plans").exists()


def test_a_document_that_changed_under_its_plan_is_named(chat: Corpus) -> None:
    source = open_source(chat, request(160))
    pieces = source.pieces(0)
    with pytest.raises(DataError, match="is not what was planned"):
        source.reader.read(pieces._replace(lengths=pieces.lengths - 1))


def test_mixture_edits_carry_every_cursor(corpora: CorpusFactory) -> None:
    """Phases that mix two sources differently, at two contexts, the first with the loss on all
    tokens: each source is read as if it had been alone."""
    sources = {
        "a": corpora.chat("a", problems(90)),
        "b": corpora.text("b", [f"{n} {WORDS}" for n in range(90)]),
    }
    phases: list[tuple[str, PhaseConfig, int]] = [
        ("one", replace(phase_config(128, {"a": 0.7, "b": 0.3}), loss_on="all"), 11),
        ("two", phase_config(128, {"a": 0.2, "b": 0.8}), 9),
        ("three", phase_config(256, {"b": 1.0}), 2),
        ("four", phase_config(256, {"a": 0.5, "b": 0.5}), 10),
    ]
    data = data_config(sources, balance_rows=1)
    found: dict[str, Counter[tuple[int, int]]] = {"a": Counter(), "b": Counter()}
    past: list[PastPhase] = []
    for name, phase, rows in phases:
        stream = PhaseStream(data, name, phase, 0, past)
        if name == "two":
            draws = [source.request.past.draws for source in stream.sources.values()]
            assert [draw[0][:2] for draw in draws] == [(128, "all")] * 2
        for index in range(rows):
            source, pieces = stream.pieces(index)
            for document, start, length in zip(*pieces, strict=True):
                tokens = range(int(start), int(start + length)) if source == "b" else [0]
                found[source].update((int(document), token) for token in tokens)
        past.append(PastPhase(name, phase, rows))
    for counter in found.values():
        assert set(counter.values()) == {1}


def test_rows_of_equal_work_come_together(chat: Corpus) -> None:
    source = open_source(chat, request(512, balance_rows=4))
    count = len(source.plan) // 4 * 4
    work = np.array([source.work(draw) for draw in range(count)]).reshape(-1, 4)
    alone = open_source(chat, request(512))
    apart = np.array([alone.work(draw) for draw in range(count)]).reshape(-1, 4)
    assert (work.max(axis=1) / work.mean(axis=1)).mean() < 1.1
    assert (apart.max(axis=1) / apart.mean(axis=1)).mean() > 1.1
