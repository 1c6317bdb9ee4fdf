"""What the smoke run prints."""

from __future__ import annotations

from zaya_train.tools.evaluate import EvalSample
from zaya_train.tools.smoke import _sample_line


def sample(reply: str) -> EvalSample:
    return EvalSample(
        id="0",
        family="add",
        prompt="A a1+A2",
        reply=reply,
        answer="4",
        expected="03",
        correct=False,
        finished=True,
    )


def test_a_sample_shows_the_expected_answer_beside_the_reply() -> None:
    assert _sample_line(sample("<think></think>4")) == (
        "  A a1+A2  ->  <think></think>4  (expected 03)"
    )


def test_a_long_reply_is_shortened() -> None:
    line = _sample_line(sample("that " * 500))
    assert len(line) < 300
    assert "that that ..." in line
    assert line.endswith("(expected 03)")
