from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers, trainers

from zaya_train.config.errors import DataError
from zaya_train.data.chat import encode_conversations, split_reasoning
from zaya_train.data.fields import Document
from zaya_train.data.sections import Kind, Rejected, RejectReason, Sample
from zaya_train.data.tokenizer import Tokenizer, load_tokenizer
from zaya_train.data.trim import trim
from zaya_train.data.trim_text import (
    REJECTED_SUFFIX,
    TrimRequest,
    TrimSummary,
    show_summary,
    trim_conversations,
    trim_file,
)

from .builders import problem
from .conversations import Turns, conversations, generated

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A byte-level BPE with merges, so that one token may hold several characters or a part of
    one."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [turn["content"] for turns in generated(100, 1) for turn in turns]
    backend.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    backend.save(str(path))
    return load_tokenizer(str(path))


def document(turns: Turns) -> Document:
    return Document(id="a", messages=tuple(turns), text="", answer="", family="")


def tokens_of(tokenizer: Tokenizer, turns: Turns) -> Sample | Rejected:
    return encode_conversations(tokenizer, [turns])[0]


def answers(tokenizer: Tokenizer, turns: Turns) -> list[list[int]]:
    return [
        tokenizer.encode(text)
        for turn in turns
        if turn["role"] == "assistant"
        for kind, text in parts(turn["content"])
        if kind == Kind.ANSWER
    ]


def answer_texts(turns: Turns) -> list[str]:
    return [
        "".join(text for kind, text in parts(turn["content"]) if kind == Kind.ANSWER)
        for turn in turns
        if turn["role"] == "assistant"
    ]


def parts(content: str) -> list[tuple[Kind, str]]:
    found = split_reasoning(content)
    assert not isinstance(found, RejectReason)
    return found


def last_reasoning(turns: Turns) -> str:
    return [text for kind, text in parts(turns[-1]["content"]) if kind == Kind.REASONING][-1]


@settings(max_examples=300, deadline=None)
@given(conversations(), st.integers(1, 300), st.booleans())
def test_written_text_reads_back_as_what_was_kept(
    bytes_tokenizer: Tokenizer, merged: Tokenizer, turns: Turns, budget: int, use_bytes: bool
) -> None:
    tokenizer = bytes_tokenizer if use_bytes else merged
    before = tokens_of(tokenizer, turns)
    [outcome] = trim_conversations(tokenizer, [document(turns)], budget)
    if isinstance(before, Rejected):
        assert isinstance(outcome.left, Rejected) and outcome.left.reason == before.reason
        return
    kept = trim(before, budget)
    if isinstance(kept, Rejected) or isinstance(outcome.left, Rejected):
        assert outcome.left == kept
        return
    receipt, messages = outcome.left.receipt, outcome.left.messages
    after = tokens_of(tokenizer, messages)
    assert isinstance(after, Sample), after
    assert receipt["tokens"] <= kept.length <= budget
    assert receipt["tokens"] + receipt["removed_tokens"] == len(before.tokens)
    assert sum(cut["end"] - cut["start"] for cut in receipt["removed"]) == receipt["removed_tokens"]
    assert [turn["role"] for turn in messages] == [turn["role"] for turn in turns]
    assert answer_texts(messages) == answer_texts(turns)
    # Answers of one turn meet where the reasoning between them went, and merge on the way back.
    if len(answers(tokenizer, messages)) == len(answers(tokenizer, turns)):
        assert answers(tokenizer, messages) == answers(tokenizer, turns)
        assert len(after.tokens) == receipt["tokens"]
    if receipt["rule"] == "whole":
        assert messages == turns
    elif "<think>" in turns[-1]["content"]:
        assert last_reasoning(turns).startswith(last_reasoning(messages))
    if use_bytes and receipt["rule"] == "tail_cut":
        assert budget - len(after.tokens) <= 3


def test_a_cut_never_breaks_a_character(bytes_tokenizer: Tokenizer) -> None:
    turns = problem("\u6570" * 20)
    total = len(tokens_of(bytes_tokenizer, turns).tokens)  # type: ignore[union-attr]
    for budget in range(total - 60, total):
        [outcome] = trim_conversations(bytes_tokenizer, [document(turns)], budget)
        assert not isinstance(outcome.left, Rejected)
        text = last_reasoning(outcome.left.messages)
        assert set(text) <= {"\u6570"}
        assert len(text) == (budget - (total - 60)) // 3


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_file_gives_kept_rows_rejects_and_a_summary(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "whole", "messages": problem("short")},
        {"id": "cut", "messages": problem("x" * 100)},
        {"id": "long", "messages": problem("x", answer="y" * 100)},
        {
            "id": "open",
            "messages": problem("x")[:1] + [{"role": "assistant", "content": "<think>"}],
        },
        {"id": "none", "messages": "no list"},
        {"id": 7, "other": 1},
    ]
    source = write(tmp_path / "x.jsonl", rows)
    output = tmp_path / "sub" / "y.jsonl"
    summary = trim_file(TrimRequest(input=source, output=output, budget_tokens=60))
    kept, rejected = read(output), read(tmp_path / "sub" / f"y.jsonl{REJECTED_SUFFIX}")
    assert [row["id"] for row in kept] == ["whole", "cut"]
    assert kept[0]["messages"] == rows[0]["messages"]
    assert kept[1]["trim"] == {
        "rule": "tail_cut",
        "tokens": 60,
        "tokens_before": 111,
        "removed_tokens": 51,
        "removed": [{"turn": 1, "start": 57, "end": 108}],
    }
    assert [(row.get("id"), row["reason"]) for row in rejected] == [
        ("long", "answers_exceed_budget"),
        ("open", "think_not_closed"),
        (None, "bad_row"),
        (None, "bad_row"),
    ]
    assert rejected[3]["place"] == f"{source}:6" and "missing field" in rejected[3]["detail"]
    assert summary.rows == 6 and summary.outcomes["rejected"] == 4
    assert [p.name for p in output.parent.iterdir()] == ["y.jsonl", f"y.jsonl{REJECTED_SUFFIX}"]
    console = Console(record=True, width=100)
    show_summary(summary, console)
    shown = console.export_text()
    for text in ("kept whole", "earlier reasoning dropped", "bad_row", "tokens removed", "16.67%"):
        assert text in shown


def test_earlier_reasoning_is_listed_with_its_place(tmp_path: Path) -> None:
    turns = [*problem("a" * 40), *problem("b" * 10)]
    source = write(tmp_path / "x.jsonl", [{"messages": turns}])
    trim_file(TrimRequest(input=source, output=tmp_path / "y.jsonl", budget_tokens=36))
    [row] = read(tmp_path / "y.jsonl")
    assert row["trim"]["rule"] == "earlier_dropped"
    assert row["messages"][1]["content"] == "4"
    assert [cut["turn"] for cut in row["trim"]["removed"]] == [1]


@pytest.mark.parametrize(
    ("budget", "rows", "rule"),
    [
        (0, [{"messages": problem("x")}], "at least 1"),
        (9, [{"text": "plain"}], "no reasoning to trim"),
        (9, [], "empty file"),
        (3, [{"messages": problem("x")}], "all 1 rows are rejected at a budget of 3 tokens"),
    ],
)
def test_refusals_leave_nothing(
    tmp_path: Path, budget: int, rows: list[dict[str, Any]], rule: str
) -> None:
    source = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(DataError, match=rule):
        trim_file(TrimRequest(input=source, output=tmp_path / "y.jsonl", budget_tokens=budget))
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_summary_of_nothing_has_no_rows() -> None:
    assert TrimSummary(5).rows == 0


def test_neither_the_input_nor_an_earlier_output_is_replaced(tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [{"messages": problem("x" * 100)}])
    before = (tmp_path / "x.jsonl").read_text()
    for overwrite in (False, True):
        request = TrimRequest(
            input=source, output=tmp_path / "x.jsonl", budget_tokens=64, overwrite=overwrite
        )
        with pytest.raises(DataError, match="is the input"):
            trim_file(request)
    assert (tmp_path / "x.jsonl").read_text() == before
    output = tmp_path / "y.jsonl"
    output.write_text("precious")
    with pytest.raises(DataError, match="exists; --overwrite replaces it"):
        trim_file(TrimRequest(input=source, output=output, budget_tokens=64))
    assert output.read_text() == "precious"
    trim_file(TrimRequest(input=source, output=output, budget_tokens=64, overwrite=True))
    assert len(read(output)) == 1


def test_neither_the_input_nor_earlier_rejects_are_replaced_by_rejects(tmp_path: Path) -> None:
    row = json.dumps({"messages": problem("x" * 100)}) + "\n"
    rejects = tmp_path / f"y.jsonl{REJECTED_SUFFIX}"
    rejects.write_text(row)
    (tmp_path / "x.jsonl").write_text(row)
    request = TrimRequest(
        input=str(tmp_path / "x.jsonl"), output=tmp_path / "y.jsonl", budget_tokens=64
    )
    with pytest.raises(DataError, match=r"y\.jsonl\.rejected\.jsonl: exists; --overwrite"):
        trim_file(request)
    with pytest.raises(DataError, match=r"y\.jsonl\.rejected\.jsonl: is the input"):
        trim_file(replace(request, input=str(rejects), overwrite=True))
    assert rejects.read_text() == row
    trim_file(replace(request, overwrite=True))
    assert rejects.read_text() == ""


def test_halves_of_surrogate_pairs_in_names_are_escaped(tmp_path: Path) -> None:
    rows = [
        {"id": "kept\ud800", "messages": problem("\u00e4")},
        {"id": "torn\ud800", "messages": problem("x", answer="y" * 100)},
    ]
    source = write(tmp_path / "x.jsonl", rows)
    trim_file(TrimRequest(input=source, output=tmp_path / "y.jsonl", budget_tokens=60))
    assert read(tmp_path / "y.jsonl")[0]["id"] == "kept\ud800"
    assert read(tmp_path / f"y.jsonl{REJECTED_SUFFIX}")[0]["id"] == "torn\ud800"
