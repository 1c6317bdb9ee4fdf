"""The procedural corpus: true answers, disjoint splits, reproducible rows, whole files."""

from __future__ import annotations

import json
import resource
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest

from zaya_train.config.errors import DataError, StorageError
from zaya_train.data.synth import SynthRequest, families, generate, split_of, write_jsonl

if TYPE_CHECKING:
    from pathlib import Path

Row = dict[str, Any]


def prompt_of(row: Row) -> str:
    return str(row["messages"][0]["content"])


def reply_of(row: Row) -> str:
    return str(row["messages"][1]["content"])


def size_of(row: Row) -> int:
    """Tokens of the shipped chat format: one per byte, six markers."""
    markers = len("<think></think>")
    return len(prompt_of(row)) + len(reply_of(row)) - markers + 6


@pytest.fixture(scope="module")
def mixed() -> list[Row]:
    return list(generate(SynthRequest(count=6000, seed=3)))


@pytest.mark.parametrize("name", sorted(families()))
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_answers_are_what_the_independent_solver_finds(name: str, split: Any) -> None:
    rows = list(generate(SynthRequest(count=400, seed=1, split=split, families=(name,))))
    assert {row["family"] for row in rows} == {name}
    assert [families()[name].solve(prompt_of(row)) for row in rows] == [r["answer"] for r in rows]


@pytest.mark.parametrize(
    ("family", "prompt", "answer"),
    [
        ("sum", "S 2 a9b4", "6"),
        ("parity", "P 3 a1b0c0", "1"),
        ("max", "X a3b7c2", "7"),
        ("min", "N a3b7c2", "2"),
        ("count", "C 7 a7b1c7", "2"),
        ("reverse", "R abz", "zba"),
        ("sort", "O 5091", "0159"),
        ("jump", "J AbBcCa a 4", "b"),
        ("add", "A b9a8+B0A7", "105"),
    ],
)
def test_explanation_and_solver_agree_with_hand_made_cases(
    family: str, prompt: str, answer: str
) -> None:
    assert families()[family].explain(prompt).answer == answer
    assert families()[family].solve(prompt) == answer


@pytest.mark.parametrize(
    ("family", "prompt", "reasoning"),
    [
        ("sum", "S 2 a9b4", "2 a99b43 1 a92b46 0"),
        ("count", "C 7 a7b1c7", "a77=1b17.1c77=2"),
        ("sort", "O 5091", "0+1+2-3-4-5+6-7-8-9+"),
        ("jump", "J AbBcCa a 2", "2a1b0c"),
        ("add", "A b9a8+B0A7", "a8A71515b9B00910=1b0a5"),
    ],
)
def test_traces_step_by_step(family: str, prompt: str, reasoning: str) -> None:
    assert families()[family].explain(prompt).reasoning == reasoning


def test_rows_are_chat_messages_with_reasoning_and_the_answer(mixed: list[Row]) -> None:
    for row in mixed[:500]:
        assert [turn["role"] for turn in row["messages"]] == ["user", "assistant"]
        reasoning, answer = reply_of(row).removeprefix("<think>").split("</think>")
        assert reasoning and answer == row["answer"]
        assert 1 <= len(answer) <= 12
        assert prompt_of(row).isascii() and "<" not in prompt_of(row)
    assert len({row["id"] for row in mixed}) == len(mixed)


def test_splits_share_no_problem_whatever_the_seeds() -> None:
    train = {prompt_of(row) for seed in (0, 1) for row in generate(SynthRequest(4000, seed))}
    held_out = {
        prompt_of(row) for seed in (0, 9) for row in generate(SynthRequest(1500, seed, "heldout"))
    }
    assert not train & held_out
    assert {split_of(prompt) for prompt in train} == {"train"}
    assert {split_of(prompt) for prompt in held_out} == {"heldout"}


def test_the_split_is_a_stable_function_of_the_text() -> None:
    # Literal values: a changed hash would move problems of an existing corpus across the splits.
    cases = [f"X a{number}b7c2" for number in range(40)]
    held_out = ["X a17b7c2", "X a19b7c2", "X a20b7c2", "X a34b7c2"]
    assert [case for case in cases if split_of(case) == "heldout"] == held_out


def test_a_row_depends_on_seed_split_and_index_only() -> None:
    rows = list(generate(SynthRequest(count=40, seed=5)))
    assert list(islice(generate(SynthRequest(count=1000, seed=5)), 40)) == rows
    other_seed = list(generate(SynthRequest(count=40, seed=6)))
    assert all(prompt_of(a) != prompt_of(b) for a, b in zip(rows, other_seed, strict=True))


def test_held_out_problems_are_mostly_distinct() -> None:
    rows = list(generate(SynthRequest(count=200, seed=2, split="heldout")))
    assert len({prompt_of(row) for row in rows}) >= 190
    assert {row["family"] for row in rows} == set(families())


def test_lengths_have_a_short_body_and_a_heavy_tail(mixed: list[Row]) -> None:
    sizes = sorted(map(size_of, mixed))
    tail = [size for size in sizes if size > 128]
    assert sizes[int(len(sizes) * 0.95)] <= 110
    assert 0.01 <= len(tail) / len(sizes) <= 0.03
    assert 0.15 <= sum(tail) / sum(sizes) <= 0.4
    assert sum(size > 1024 for size in sizes) >= 15
    assert 2000 < sizes[-1] <= 4096


def test_most_prompts_are_short(mixed: list[Row]) -> None:
    assert max(len(prompt_of(row)) for row in mixed) <= 30


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (SynthRequest(count=-1), "count must be 1 or more, got -1"),
        (SynthRequest(count=0), "count must be 1 or more, got 0"),
        (SynthRequest(count=1, split="test"), "split must be one of train, heldout, got 'test'"),  # type: ignore[arg-type]
        (SynthRequest(count=1, families=("sum", "poem")), r"unknown families \['poem'\]"),
        (SynthRequest(count=1, families=()), "no families named"),
    ],
)
def test_bad_requests_fail_before_the_first_row(request_: SynthRequest, match: str) -> None:
    with pytest.raises(DataError, match=match):
        generate(request_)


def test_jsonl_holds_the_generated_rows(tmp_path: Path) -> None:
    request = SynthRequest(count=50, seed=4)
    path = tmp_path / "corpora" / "train.jsonl"
    size_bytes = write_jsonl(request, path)
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(generate(request))
    assert size_bytes == path.stat().st_size
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("old\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(StorageError, match=r"train\.jsonl: not written: File too large"):
            write_jsonl(SynthRequest(count=2000), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="not written"):
        write_jsonl(SynthRequest(count=1), tmp_path / "file" / "train.jsonl")
