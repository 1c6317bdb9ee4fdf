from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from zaya_train.config.errors import DataError
from zaya_train.data.aggregate import AggregateRequest, aggregate, make_example, tail
from zaya_train.data.corpus import Corpus
from zaya_train.data.prepare import PrepareRequest, prepare
from zaya_train.data.sections import Kind, Rejected
from zaya_train.data.trim import Trimmed, trim

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.data.tokenizer import Tokenizer


def row(**changes: Any) -> dict[str, Any]:
    rollouts = [f"try {n} " + "x" * 50 + f" gives {n}" for n in range(6)]
    return {
        "id": "p1",
        "prompt": "2+2?",
        "rollouts": rollouts,
        "solution": "<think>" + "compare " * 20 + "</think>4",
    } | changes


def request(tmp_path: Path, **changes: Any) -> AggregateRequest:
    settings: dict[str, Any] = {"candidates": 3, "tail_tokens": 10} | changes
    return AggregateRequest(
        input=str(tmp_path / "in.jsonl"), output=tmp_path / "out.jsonl", **settings
    )


def write(tmp_path: Path, *rows: dict[str, Any]) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_an_example_holds_the_tails_and_trims_like_any_other(tmp_path: Path) -> None:
    write(tmp_path, row(), row(id="p2"))
    assert aggregate(request(tmp_path)) == {"kept": 2}
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    question = made[0]["messages"][0]["content"]
    assert "Problem:\n2+2?" in question and question.count("its end:\n") == 3
    tails = [part.split("its end:\n")[1] for part in question.split("\n\n")[2:]]
    assert all(len(text) == 10 and text[:-1] == "xx gives " for text in tails)
    assert len(set(tails)) == 3
    assert made[0]["messages"] != made[1]["messages"]
    out = prepare(PrepareRequest(input=str(tmp_path / "out.jsonl"), output=tmp_path / "corpus"))
    sample = Corpus.open(out / "train").sample(0)
    kept = trim(sample, len(sample.tokens) - 40)
    assert isinstance(kept, Trimmed) and kept.removed_tokens == 40
    prompt = sample.sections[sample.sections["kind"] == Kind.PROMPT][0]
    assert kept.keep[0][1] > int(prompt["end"])


def test_same_seed_same_examples(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    first, again, other = (
        make_example(bytes_tokenizer, row(), request(tmp_path, seed=seed), "f:1")
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_tails_are_whole_characters_within_their_tokens(bytes_tokenizer: Tokenizer) -> None:
    text = "ab\u6570\u5b66"
    ends = {most: tail(bytes_tokenizer, text, most) for most in range(1, 9)}
    assert ends == {
        1: "",
        2: "",
        3: "\u5b66",
        4: "\u5b66",
        5: "\u5b66",
        6: text[2:],
        7: text[1:],
        8: text,
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": 3}, "bad_row"),
        ({"rollouts": "text"}, "bad_row"),
        ({"rollouts": ["a", "b"]}, "too_few_rollouts"),
        ({"solution": "<think>open"}, "think_not_closed"),
        ({"rollouts": ["a\ud800", "b", "c"]}, "not_unicode"),
        ({"solution": "<think>x</think> "}, "empty_answer"),
    ],
)
def test_rows_that_make_no_example_have_a_reason(
    tmp_path: Path, bytes_tokenizer: Tokenizer, changes: dict[str, Any], reason: str
) -> None:
    made = make_example(bytes_tokenizer, row(**changes), request(tmp_path), "f:1")
    assert isinstance(made, Rejected) and made.reason == reason
    write(tmp_path, row(**changes))
    with pytest.raises(DataError, match=reason):
        aggregate(request(tmp_path))
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize("changes", [{"candidates": 0}, {"tail_tokens": 0}])
def test_settings_below_one_are_refused(tmp_path: Path, changes: dict[str, int]) -> None:
    write(tmp_path, row())
    with pytest.raises(DataError, match="at least 1"):
        aggregate(request(tmp_path, **changes))
