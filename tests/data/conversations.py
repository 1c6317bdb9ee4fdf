"""Conversations of every shape the data path may meet, well formed or not."""

from __future__ import annotations

import random

from hypothesis import strategies as st

Turns = list[dict[str, str]]

WORDS = (
    "so",
    "wait",
    "x = 3",
    "hmm,\n\n",
    "caf\u00e9",
    "\u6570\u5b66",
    "\U0001f600",
    "  ",
    "0.1",
    "<",
    "|user|>",
)
_TEXT = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@st.composite
def assistant_turn(draw: st.DrawFn) -> str:
    """Think blocks and answers; now and then with a tag missing, nested or left open."""
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        parts += [f"<think>{draw(_TEXT)}</think>", draw(_TEXT)]
    content = "".join(parts) + draw(st.sampled_from(["42", " ok\n", "\u7b54", "", " "]))
    damage = draw(st.integers(0, 19))
    if damage == 0:
        return content.replace("</think>", "", 1)
    if damage == 1:
        return content.replace("<think>", "", 1)
    if damage == 2:
        return f"<think>{content}</think>x"
    return content


@st.composite
def conversations(draw: st.DrawFn) -> Turns:
    """System, user, tool and assistant turns; the last one is mostly the assistant's."""
    turns: Turns = []
    if draw(st.booleans()):
        turns.append({"role": "system", "content": draw(_TEXT) or "s"})
    for _ in range(draw(st.integers(1, 4))):
        role = draw(st.sampled_from(["user", "user", "tool"]))
        turns.append({"role": role, "content": draw(_TEXT) or "q"})
        turns.append({"role": "assistant", "content": draw(assistant_turn())})
    if draw(st.integers(0, 19)) == 0:
        turns.append({"role": "user", "content": "more"})
    return turns


def generated(count: int, seed: int) -> list[Turns]:
    """`count` conversations by a plain random generator, with reasoning of lognormal length."""
    rng = random.Random(seed)
    return [_one(rng) for _ in range(count)]


def _one(rng: random.Random) -> Turns:
    turns: Turns = [{"role": "system", "content": _words(rng, 20)}] if rng.random() < 0.3 else []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        turns.append({"role": rng.choice(("user", "user", "tool")), "content": _words(rng, 30)})
        content = ""
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            reasoning = _words(rng, int(rng.lognormvariate(4.0, 1.5)))
            content += f"<think>{reasoning}</think>{_words(rng, 5)}"
        content += rng.choice(("42", " done.\n", "\u7b54\u3048", "", "x" * rng.randint(1, 600)))
        turns.append({"role": "assistant", "content": _damaged(rng, content)})
    return turns


def _words(rng: random.Random, longest: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(1, max(1, longest))))


def _damaged(rng: random.Random, content: str) -> str:
    damage = rng.random()
    if damage < 0.02:
        return content.replace("</think>", "", 1)
    if damage < 0.04:
        return content.replace("<think>", "", 1)
    if damage < 0.05:
        return f"<think>{content}</think>y"
    return content
