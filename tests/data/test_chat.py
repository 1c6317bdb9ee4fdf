from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from zaya_train.data.chat import (
    encode_conversations,
    encode_texts,
    final_answer,
    parse_conversation,
)
from zaya_train.data.sections import Kind, Rejected, RejectReason, Role, Sample

from .builders import problem

if TYPE_CHECKING:
    from zaya_train.data.tokenizer import Tokenizer


def encode(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> Sample:
    (sample,) = encode_conversations(tokenizer, [messages])
    assert isinstance(sample, Sample), sample
    return sample


def parts(tokenizer: Tokenizer, sample: Sample) -> list[tuple[str, Role, Kind, int, bool]]:
    return [
        (
            tokenizer.decode(sample.tokens[row["start"] : row["end"]]),
            Role(row["role"]),
            Kind(row["kind"]),
            int(row["turn"]),
            bool(row["supervised"]),
        )
        for row in sample.sections
    ]


def test_sections_of_a_reasoned_answer(bytes_tokenizer: Tokenizer) -> None:
    sample = encode(bytes_tokenizer, problem("sum"))
    user, assistant = Role.USER, Role.ASSISTANT
    assert parts(bytes_tokenizer, sample) == [
        ("<|user|>", user, Kind.MARKUP, 0, False),
        ("2+2?", user, Kind.PROMPT, 0, False),
        ("<|end|>", user, Kind.MARKUP, 0, False),
        ("<|assistant|>", assistant, Kind.MARKUP, 1, False),
        ("<think>", assistant, Kind.MARKUP, 1, True),
        ("sum", assistant, Kind.REASONING, 1, True),
        ("</think>", assistant, Kind.MARKUP, 1, True),
        ("4", assistant, Kind.ANSWER, 1, True),
        ("<|end|>", assistant, Kind.MARKUP, 1, True),
    ]


def test_only_assistant_tokens_are_targets(bytes_tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "<think>quoted</think>"},
        {"role": "assistant", "content": "<think>a</think>call"},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "done"},
    ]
    sample = encode(bytes_tokenizer, messages)
    targets = bytes_tokenizer.decode(sample.tokens[sample.supervised()])
    assert targets == "<think>a</think>call<|end|>done<|end|>"
    think = bytes_tokenizer.marker_ids["<think>"]
    assert (sample.tokens == think).sum() == 1


def test_several_think_blocks_in_one_turn(bytes_tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "look<think>a</think>x<think></think>y"},
    ]
    kinds = [(text, kind) for text, _, kind, _, _ in parts_of(bytes_tokenizer, messages)]
    assert kinds[4:] == [
        ("look", Kind.ANSWER),
        ("<think>", Kind.MARKUP),
        ("a", Kind.REASONING),
        ("</think>", Kind.MARKUP),
        ("x", Kind.ANSWER),
        ("<think>", Kind.MARKUP),
        ("", Kind.REASONING),
        ("</think>", Kind.MARKUP),
        ("y", Kind.ANSWER),
        ("<|end|>", Kind.MARKUP),
    ]


def parts_of(
    tokenizer: Tokenizer, messages: list[dict[str, Any]]
) -> list[tuple[str, Role, Kind, int, bool]]:
    return parts(tokenizer, encode(tokenizer, messages))


def test_sections_tile_and_text_is_kept(bytes_tokenizer: Tokenizer) -> None:
    messages = problem("\n caf\u00e9 \n", answer="\n\n4 ", prompt=" <|end|> ")
    sample = encode(bytes_tokenizer, messages)
    assert sample.sections["start"][0] == 0 and sample.sections["end"][-1] == len(sample.tokens)
    assert (sample.sections["start"][1:] == sample.sections["end"][:-1]).all()
    expected = "<|user|> <|end|> <|end|><|assistant|><think>\n caf\u00e9 \n</think>\n\n4 <|end|>"
    assert bytes_tokenizer.decode(sample.tokens) == expected


MALFORMED = {
    RejectReason.NO_MESSAGES: [],
    RejectReason.UNKNOWN_ROLE: [{"role": "robot", "content": "x"}],
    RejectReason.EMPTY_MESSAGE: [{"role": "user", "content": ""}],
    RejectReason.LAST_NOT_ASSISTANT: [{"role": "user", "content": "x"}],
    RejectReason.NOT_UNICODE: [{"role": "user", "content": "half a pair: \ud83d"}],
    RejectReason.NO_PROMPT: [{"role": "assistant", "content": "x"}],
    RejectReason.THINK_NOT_CLOSED: problem("")[:1]
    + [{"role": "assistant", "content": "<think>never ends"}],
    RejectReason.THINK_NOT_OPENED: problem("")[:1]
    + [{"role": "assistant", "content": "<think>a</think>b</think>c"}],
    RejectReason.THINK_NESTED: problem("")[:1]
    + [{"role": "assistant", "content": "<think>a<think>b</think>c</think>d"}],
    RejectReason.EMPTY_ANSWER: problem("reasons", answer=" \n"),
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_conversations_have_a_code(reason: RejectReason) -> None:
    outcome = parse_conversation(MALFORMED[reason])
    assert isinstance(outcome, Rejected) and outcome.reason == reason


def test_rejects_keep_their_place_in_a_batch(bytes_tokenizer: Tokenizer) -> None:
    batch = [problem("a", "1"), MALFORMED[RejectReason.THINK_NESTED], problem("bb", "2")]
    first, second, third = encode_conversations(bytes_tokenizer, batch)
    assert isinstance(second, Rejected)
    assert isinstance(first, Sample) and isinstance(third, Sample)
    assert bytes_tokenizer.decode(first.tokens).endswith("<think>a</think>1<|end|>")
    assert bytes_tokenizer.decode(third.tokens).endswith("<think>bb</think>2<|end|>")


def test_missing_content_is_rejected_not_raised() -> None:
    outcome = parse_conversation([{"role": "user"}])
    assert isinstance(outcome, Rejected) and outcome.reason == RejectReason.EMPTY_MESSAGE


def test_text_is_one_supervised_section(bytes_tokenizer: Tokenizer) -> None:
    texts = ["a\udfff", "some <think> text", " \n"]
    torn, sample, empty = encode_texts(bytes_tokenizer, texts)
    assert isinstance(torn, Rejected) and torn.reason == RejectReason.NOT_UNICODE
    assert isinstance(sample, Sample) and isinstance(empty, Rejected)
    assert empty.reason == RejectReason.EMPTY_TEXT
    assert len(sample.sections) == 1 and sample.supervised().all()
    assert bytes_tokenizer.decode(sample.tokens) == "some <think> text<|end|>"
    assert sample.tokens[-1] == bytes_tokenizer.end_id


@pytest.mark.parametrize(
    ("content", "answer"),
    [("<think>a</think> 4\n", "4"), ("plain", "plain"), ("a</think>b</think>c", "c")],
)
def test_final_answer(content: str, answer: str) -> None:
    assert final_answer(content) == answer
