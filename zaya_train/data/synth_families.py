"""Families of procedural reasoning problems: how to draw, to explain and to solve each one.

Every family is three plain functions. `draw` makes a prompt, `explain` writes the reasoning step by
step and ends at the answer, `solve` recomputes the answer from the prompt text by another route, so
that a wrong trace cannot vouch for itself.

The texts are made for byte-level models of a few hundred thousand parameters: every step of a
trace reads one labelled item of the prompt and the state just before it. Items carry labels
(`a3b7c2`) because a model finds a labelled item by matching one byte, at any distance, while
counting positions has to be learnt anew for every length.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import ascii_lowercase, digits
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

LONG_SHARE = 0.04
"""Share of problems with long traces within the families that have them; with the weights below
somewhat over 1 % of all problems."""
LONGEST_TRACE_BYTES = 2400
"""Upper end of the long traces, in round numbers; their lengths are log-uniform."""


@dataclass(frozen=True)
class Explained:
    """A worked problem: the reasoning text and the answer it ends at."""

    reasoning: str
    answer: str


@dataclass(frozen=True)
class Family:
    """One kind of problem. `weight` is its relative frequency in a mixed corpus."""

    name: str
    task: str
    weight: float
    draw: Callable[[random.Random], str]
    explain: Callable[[str], Explained]
    solve: Callable[[str], str]


def _log_uniform(rng: random.Random, low: int, high: int) -> int:
    """Integer in [low, high] whose logarithm is uniform: few long, many short."""
    return min(high, int(low * (high / low) ** rng.random()))


def _labelled(items: str) -> str:
    """`372` -> `a3b7c2`."""
    return "".join(label + item for label, item in zip(ascii_lowercase, items, strict=False))


def _draw_items(rng: random.Random, alphabet: str, low: int, high: int) -> str:
    return _labelled("".join(rng.choices(alphabet, k=rng.randint(low, high))))


def _pairs(text: str) -> list[tuple[str, str]]:
    """`a3b7` -> [("a", "3"), ("b", "7")]."""
    return list(zip(text[::2], text[1::2], strict=True))


def _operand(prompt: str, index: int) -> str:
    """The operand at `index`; 0 is the family's tag."""
    return prompt.split(" ")[index]


def _fold(text: str, state: int, step: Callable[[int, int], int]) -> tuple[str, int]:
    """Running state over labelled digits: the trace and the last state.

    Each step is label, item, state. Copying the item first makes two easy steps of a hard one:
    fetch an item, then combine it with the state beside it.
    """
    trace = []
    for label, item in _pairs(text):
        state = step(state, int(item))
        trace.append(f"{label}{item}{state}")
    return "".join(trace), state


def _draw_rounds(rng: random.Random, most_bytes_per_round: int) -> int:
    """Rounds over one list: mostly one, some two or three, and a heavy tail."""
    if rng.random() < LONG_SHARE:
        return _log_uniform(rng, 8, LONGEST_TRACE_BYTES // most_bytes_per_round)
    return rng.choices([1, 2, 3], weights=[70, 20, 10])[0]


def _explain_rounds(prompt: str, step: Callable[[int, int], int]) -> Explained:
    """Fold the list again and again, counting the rounds down to 0."""
    rounds, items = int(_operand(prompt, 1)), _operand(prompt, 2)
    state, parts = 0, []
    for left in range(rounds, 0, -1):
        trace, state = _fold(items, state, step)
        parts.append(f"{left} {trace}")
    return Explained(" ".join([*parts, "0"]), str(state))


def _digits_of(prompt: str, index: int) -> list[int]:
    return [int(character) for character in _operand(prompt, index) if character.isdigit()]


def _draw_sum(rng: random.Random) -> str:
    items = _draw_items(rng, digits, 3, 8)
    return f"S {_draw_rounds(rng, len(items) * 3 // 2 + 4)} {items}"


def _explain_sum(prompt: str) -> Explained:
    return _explain_rounds(prompt, lambda state, item: (state + item) % 10)


def _solve_sum(prompt: str) -> str:
    return str(int(_operand(prompt, 1)) * sum(_digits_of(prompt, 2)) % 10)


def _draw_parity(rng: random.Random) -> str:
    items = _draw_items(rng, "01", 7, 9)
    return f"P {_draw_rounds(rng, len(items) * 3 // 2 + 4)} {items}"


def _explain_parity(prompt: str) -> Explained:
    return _explain_rounds(prompt, lambda state, item: state ^ item)


def _solve_parity(prompt: str) -> str:
    return str(int(_operand(prompt, 1)) * _operand(prompt, 2).count("1") % 2)


def _draw_max(rng: random.Random) -> str:
    return f"X {_draw_items(rng, digits, 4, 10)}"


def _explain_max(prompt: str) -> Explained:
    trace, best = _fold(_operand(prompt, 1), 0, max)
    return Explained(trace, str(best))


def _solve_max(prompt: str) -> str:
    return sorted(character for character in prompt if character.isdigit())[-1]


def _draw_min(rng: random.Random) -> str:
    return f"N {_draw_items(rng, digits, 4, 10)}"


def _explain_min(prompt: str) -> Explained:
    trace, best = _fold(_operand(prompt, 1), 9, min)
    return Explained(trace, str(best))


def _solve_min(prompt: str) -> str:
    return sorted(character for character in prompt if character.isdigit())[0]


def _draw_count(rng: random.Random) -> str:
    wanted = rng.choice(digits)
    size = rng.randint(4, 8)
    # A share of its own per problem: counts of 5 and more would be too rare to be learnt.
    share = rng.uniform(0.1, 0.9)
    items = [wanted if rng.random() < share else rng.choice(digits) for _ in range(size)]
    return f"C {wanted} {_labelled(''.join(items))}"


def _explain_count(prompt: str) -> Explained:
    """Each step is label, item, the wanted digit, whether they are equal, count so far: to fetch
    both, compare and add at once is what a small model gets wrong."""
    wanted, count, trace = _operand(prompt, 1), 0, []
    for label, item in _pairs(_operand(prompt, 2)):
        count += item == wanted
        trace.append(f"{label}{item}{wanted}{'=' if item == wanted else '.'}{count}")
    return Explained("".join(trace), str(count))


def _solve_count(prompt: str) -> str:
    return str(_operand(prompt, 2).count(_operand(prompt, 1)))


def _draw_reverse(rng: random.Random) -> str:
    return f"R {''.join(rng.sample(ascii_lowercase, rng.randint(3, 7)))}"


def _explain_reverse(prompt: str) -> Explained:
    word = _operand(prompt, 1)
    letters = "".join(word[position] for position in range(len(word) - 1, -1, -1))
    return Explained(letters, letters)


def _solve_reverse(prompt: str) -> str:
    return "".join(reversed(prompt.removeprefix("R ")))


def _draw_sort(rng: random.Random) -> str:
    return f"O {''.join(rng.sample(digits, rng.randint(4, 7)))}"


def _explain_sort(prompt: str) -> Explained:
    """Ask of every digit in turn whether the prompt holds it."""
    items = _operand(prompt, 1)
    marks = [digit + ("+" if digit in items else "-") for digit in digits]
    return Explained("".join(marks), "".join(mark[0] for mark in marks if mark[1] == "+"))


def _solve_sort(prompt: str) -> str:
    return "".join(sorted(_operand(prompt, 1)))


def _draw_jump(rng: random.Random) -> str:
    size = rng.randint(3, 7)
    letters = ascii_lowercase[:size]
    table = "".join(letter.upper() + rng.choice(letters) for letter in letters)
    long = rng.random() < LONG_SHARE
    steps = _log_uniform(rng, *((40, LONGEST_TRACE_BYTES // 4) if long else (2, 24)))
    return f"J {table} {rng.choice(letters)} {steps}"


def _explain_jump(prompt: str) -> Explained:
    """Follow the table, counting the steps left down to 0."""
    table = dict(_pairs(_operand(prompt, 1)))
    state, steps = _operand(prompt, 2), int(_operand(prompt, 3))
    trace = [f"{steps}{state}"]
    for left in range(steps - 1, -1, -1):
        state = table[state.upper()]
        trace.append(f"{left}{state}")
    return Explained("".join(trace), state)


def _solve_jump(prompt: str) -> str:
    """Compose the table with itself by squaring instead of walking it."""
    _, table, start, steps = prompt.lower().split(" ")
    power = dict(_pairs(table))
    reached, left = {letter: letter for letter in power}, int(steps)
    while left:
        if left % 2:
            reached = {letter: power[state] for letter, state in reached.items()}
        power = {letter: power[state] for letter, state in power.items()}
        left //= 2
    return reached[start]


def _draw_add(rng: random.Random) -> str:
    width = rng.randint(2, 4)
    first, second = ("".join(rng.choices(digits, k=width)) for _ in range(2))
    return f"A {_numbered(first)}+{_numbered(second).upper()}"


def _numbered(number: str) -> str:
    """Digits labelled from the least significant one: `483` -> `c4b8a3`."""
    labels = ascii_lowercase[: len(number)][::-1]
    return "".join(label + digit for label, digit in zip(labels, number, strict=True))


def _explain_add(prompt: str) -> Explained:
    """Least significant digit first: both items, their sum, that sum with the carry; then the
    result's digits under their labels, most significant first, ready to be copied.

    Both sums have two digits, so every step is eight bytes and the carry, the first digit of the
    last sum, is always as far away. The second number's labels are capitals: were they the same,
    finding its digits would mean to tell two equal labels apart by position.
    """
    first, second = (_pairs(part)[::-1] for part in _operand(prompt, 1).split("+"))
    carry, trace, result = 0, [], ""
    for one, other in zip(first, second, strict=True):
        partial = int(one[1]) + int(other[1])
        total = partial + carry
        carry, digit = divmod(total, 10)
        trace.append(f"{''.join(one + other)}{partial:02}{total:02}")
        result = f"{digit}{result}"
    labels = [label for label, _ in reversed(first)]
    collected = "".join(label + digit for label, digit in zip(labels, result, strict=True))
    return Explained(f"{''.join(trace)}={carry}{collected}", f"{carry}{result}")


def _solve_add(prompt: str) -> str:
    numbers = ["".join(filter(str.isdigit, part)) for part in prompt.split("+")]
    return str(sum(map(int, numbers))).zfill(len(numbers[0]) + 1)


_ALL = (
    Family("sum", "digit sum mod 10, repeated", 1.4, _draw_sum, _explain_sum, _solve_sum),
    Family("parity", "parity of bits, repeated", 0.6, _draw_parity, _explain_parity, _solve_parity),
    Family("max", "largest digit", 0.5, _draw_max, _explain_max, _solve_max),
    Family("min", "smallest digit", 0.5, _draw_min, _explain_min, _solve_min),
    Family("count", "occurrences of a digit", 1.3, _draw_count, _explain_count, _solve_count),
    Family("reverse", "letters backwards", 1.3, _draw_reverse, _explain_reverse, _solve_reverse),
    Family("sort", "digits in order", 1.1, _draw_sort, _explain_sort, _solve_sort),
    Family("jump", "follow a table", 1.4, _draw_jump, _explain_jump, _solve_jump),
    Family("add", "sum of two numbers", 2.4, _draw_add, _explain_add, _solve_add),
)

FAMILIES = {family.name: family for family in _ALL}
"""Every family by name, in the order that draws choose from."""
