"""Sampling and scoring an exported folder with transformers' own model and `generate`."""

from __future__ import annotations

import json
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from transformers import ZayaConfig, ZayaForCausalLM

from zaya_train.config.errors import CheckpointError, ConfigError, DataError, StorageError
from zaya_train.data.synth import SynthRequest, generate, write_jsonl
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.tools.evaluate import (
    EvalReport,
    EvalRequest,
    exact_match,
    print_report,
    read_rows,
    write_report,
)
from zaya_train.tools.generate import (
    STEP_COST_ROWS,
    GenerateArgs,
    GenerateRequest,
    batch_sizes,
    decode,
    generate_answers,
    load_sampler,
    run,
    styled_reply,
)

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS = ["R abc", "S 1 a3b7c2d9e1", "X", "J AbBcCa a 12", "O 5091"]
NEW_TOKENS = 24


def random_model() -> Any:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    torch.manual_seed(1)
    model: Any = ZayaForCausalLM(
        ZayaConfig(
            vocab_size=264,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            moe_intermediate_size=32,
            num_experts=4,
            router_hidden_size=16,
            max_position_embeddings=512,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
            rope_parameters={"hybrid": rope, "hybrid_sliding": rope},
        )
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # transformers starts the key temperature at 0, which makes attention a plain mean, and
            # the convolutions' biases are what padding could leak through.
            if name.endswith("qk_norm.temp"):
                weight.fill_(1.5)
            if "conv_qk" in name:
                weight.normal_(std=0.5)
    return model


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    load_tokenizer("bytes").save(folder)
    return folder


@pytest.fixture(scope="module")
def endless_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that does not emit <|end|> within the tests' budgets."""
    return save(random_model(), tmp_path_factory.mktemp("endless"))


@pytest.fixture(scope="module")
def ending_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a second end token that its replies do contain, at various places."""
    model = random_model()
    model.generation_config.eos_token_id = [1, *end_tokens()]
    return save(model, tmp_path_factory.mktemp("ending"))


def greedy(prompt: str, num_tokens: int) -> list[int]:
    """The definition: one row, no padding, no cache, argmax of the whole sequence every time."""
    model, tokenizer = random_model(), load_tokenizer("bytes")
    markers = tokenizer.marker_ids
    ids = [markers["<|user|>"], *tokenizer.encode(prompt), markers["<|end|>"]]
    ids.append(markers["<|assistant|>"])
    start = len(ids)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def end_tokens() -> list[int]:
    """The 6th token of every second greedy reply."""
    return sorted({greedy(prompt, 6)[-1] for prompt in PROMPTS[::2]})


def text(tokens: list[int]) -> str:
    return load_tokenizer("bytes").decode(tokens)


def test_batched_left_padded_cached_equals_one_by_one_without_cache(endless_dir: Path) -> None:
    expected = [text(greedy(prompt, NEW_TOKENS)) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    for batch_size in (1, 2, 64):
        request = GenerateRequest(max_new_tokens=NEW_TOKENS, batch_size=batch_size)
        assert generate_answers(endless_dir, PROMPTS, request) == expected


def test_replies_stop_before_an_end_token(ending_dir: Path) -> None:
    ends = set(end_tokens())
    expected = []
    for prompt in PROMPTS:
        tokens = greedy(prompt, NEW_TOKENS)
        stop = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
        expected.append(text(tokens[:stop]))
    assert len({len(reply) for reply in expected}) > 1
    request = GenerateRequest(max_new_tokens=NEW_TOKENS)
    assert generate_answers(ending_dir, PROMPTS, request) == expected


def test_sampling_follows_the_seed_and_leaves_the_global_generator_alone(endless_dir: Path) -> None:
    def sample(seed: int, top_p: float = 1.0, temperature: float = 50.0) -> list[str]:
        request = GenerateRequest(
            max_new_tokens=12, temperature=temperature, top_p=top_p, seed=seed
        )
        return generate_answers(endless_dir, PROMPTS[:2], request)

    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert sample(1) == sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), before)
    best = generate_answers(endless_dir, PROMPTS[:2], GenerateRequest(max_new_tokens=12))
    assert sample(1, top_p=1e-6) == best
    assert sample(1, temperature=1e-4) == best


def test_a_batch_decodes_up_to_its_largest_budget(endless_dir: Path) -> None:
    conversations = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:3]]
    sampler = load_sampler(endless_dir)
    replies = decode(sampler, conversations, [4, 3, 5], GenerateRequest())
    assert [reply.text for reply in replies] == [text(greedy(p, 5)) for p in PROMPTS[:3]]
    alone = decode(sampler, conversations, [4, 3, 5], GenerateRequest(batch_size=1))
    budgets = zip(PROMPTS, (4, 3, 5), strict=False)
    assert [reply.text for reply in alone] == [text(greedy(p, n)) for p, n in budgets]


@pytest.mark.parametrize(
    "budgets", [[], [5], [20, 20, 20], [30, 31, 40, 2000], [1, 10, 100, 1000, 1001, 1002]]
)
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_batches_are_the_cheapest_division(budgets: list[int], limit: int) -> None:
    def cost(cuts: tuple[int, ...]) -> float:
        edges = [0, *cuts, len(budgets)]
        pairs = list(pairwise(edges))
        if any(end - start > limit for start, end in pairs):
            return float("inf")
        return sum(budgets[end - 1] * (end - start + STEP_COST_ROWS) for start, end in pairs if end)

    sizes = batch_sizes(budgets, limit)
    assert sum(sizes) == len(budgets)
    chosen = tuple(sum(sizes[:k]) for k in range(1, len(sizes)))
    inner = range(1, len(budgets))
    divisions = (cuts for k in range(len(budgets)) for cuts in combinations(inner, k))
    assert cost(chosen) == min(map(cost, divisions), default=0)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_new_tokens", 0),
        ("batch_size", 0),
        ("temperature", -0.1),
        ("top_p", 0.0),
        ("top_p", 1.1),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, setting: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{setting} must be .*, got {value}"):
        generate_answers(tmp_path, ["x"], GenerateRequest(**{setting: value}))


def test_an_empty_prompt_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="prompt 1 is empty"):
        generate_answers(tmp_path, ["x", ""], GenerateRequest())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        generate_answers(tmp_path, ["x"], GenerateRequest())


def test_a_folder_without_tokenizer_or_chat_template_is_refused(tmp_path: Path) -> None:
    random_model().save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"no tokenizer\.json"):
        generate_answers(tmp_path, ["x"], GenerateRequest())
    load_tokenizer("bytes").save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["chat_template"]
    path.write_text(json.dumps(config))
    with pytest.raises(DataError, match="no chat_template"):
        generate_answers(tmp_path, ["x"], GenerateRequest())


def test_a_missing_tensor_is_named_instead_of_filled_with_noise(tmp_path: Path) -> None:
    save(random_model(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.self_attn.qk_norm.temp"
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 missing keys, first {name}"):
        generate_answers(tmp_path, ["x"], GenerateRequest())


def test_a_damaged_weights_file_is_refused(tmp_path: Path) -> None:
    save(random_model(), tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        generate_answers(tmp_path, ["x"], GenerateRequest())


def scored_rows(model_dir: Path) -> list[dict[str, Any]]:
    """Rows whose references are the model's own replies: every answer is right."""
    replies = generate_answers(model_dir, PROMPTS, GenerateRequest(max_new_tokens=NEW_TOKENS))
    return [
        {
            "id": f"row-{number}",
            "family": "even" if number % 2 == 0 else "odd",
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": reply},
            ],
            "answer": reply.rpartition("</think>")[2],
        }
        for number, (prompt, reply) in enumerate(zip(PROMPTS, replies, strict=True))
    ]


def test_exact_match_counts_by_family(ending_dir: Path) -> None:
    rows = [row for row in scored_rows(ending_dir) if len(row["answer"]) < 6]
    assert len(rows) >= 2
    right = exact_match(ending_dir, rows, EvalRequest())
    assert (right.correct, right.total, right.unfinished) == (len(rows), len(rows), 0)
    rows[-1]["answer"] += "?"
    wrong = exact_match(ending_dir, rows, EvalRequest(num_samples=1))
    assert wrong.correct == len(rows) - 1 and wrong.accuracy == 1 - 1 / len(rows)
    family = rows[-1]["family"]
    correct, total = right.by_family[family]
    assert wrong.by_family == right.by_family | {family: (correct - 1, total)}
    assert [(sample.id, sample.correct) for sample in wrong.samples] == [(rows[-1]["id"], False)]


def test_a_reply_cut_by_its_budget_is_unfinished_and_wrong(ending_dir: Path) -> None:
    rows = [row for row in scored_rows(ending_dir) if 2 < len(row["answer"]) < 6]
    request = EvalRequest(max_new_tokens=2)
    report = exact_match(ending_dir, [row | {"answer": row["answer"][:2]} for row in rows], request)
    assert (report.correct, report.unfinished) == (0, len(rows))


def test_the_bar_moves_with_every_step_and_ends_full(endless_dir: Path) -> None:
    rows = list(generate(SynthRequest(count=6, split="heldout", families=("add", "sort"))))
    moves: list[float] = []
    with Progress(disable=True) as progress:
        update = progress.update

        def seen(task: Any, *, completed: float) -> None:
            moves.append(completed)
            update(task, completed=completed)

        progress.update = seen  # type: ignore[method-assign, assignment]
        exact_match(endless_dir, rows, EvalRequest(max_new_tokens=12, batch_size=2), progress)
        (task,) = progress.tasks
    assert task.finished and moves == sorted(moves) and len(set(moves)) == task.total


def test_an_untrained_model_scores_nothing_on_real_problems(endless_dir: Path) -> None:
    rows = list(generate(SynthRequest(count=20, split="heldout", families=("add", "sort"))))
    report = exact_match(endless_dir, rows, EvalRequest(max_new_tokens=40))
    assert (report.total, report.correct, set(report.by_family)) == (20, 0, {"add", "sort"})
    assert report.unfinished == 20 and report.accuracy == 0


def test_reports_are_written_whole_and_printed(tmp_path: Path) -> None:
    report = EvalReport(4, 3, 1, 2.5, {"add": (1, 2), "sum": (2, 2)}, ())
    path = tmp_path / "out" / "eval.json"
    write_report(report, path)
    content = json.loads(path.read_text())
    assert content["accuracy"] == 0.75 and content["by_family"]["add"] == [1, 2]
    assert list(path.parent.iterdir()) == [path]
    console = Console(record=True, width=80)
    print_report(report, console)
    shown = console.export_text()
    assert "75.0%" in shown and "50.0%" in shown and "1 unfinished" in shown
    with pytest.raises(StorageError, match=r"eval\.json: not written: "):
        write_report(report, path / "below" / "eval.json")


def test_rows_survive_the_trip_through_a_file(tmp_path: Path) -> None:
    request = SynthRequest(count=5, split="heldout")
    write_jsonl(request, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == list(generate(request))


GOOD_LINE = json.dumps(next(generate(SynthRequest(count=1))))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("", "no rows"),
        (GOOD_LINE + "\n{broken\n", r"rows\.jsonl:2: not JSON"),
        ("[]\n", r"rows\.jsonl:1: `messages` must hold"),
        ('{"messages": [{"role": "user", "content": "x"}], "answer": "1"}', "`messages` must hold"),
        (GOOD_LINE.replace('"assistant"', '"user"'), "last message must be the assistant's"),
        (GOOD_LINE.replace('"content": "', '"text": "'), "must be an object with a text `content`"),
        (GOOD_LINE.replace('"answer"', '"solution"'), "`answer` must be a text"),
    ],
)
def test_bad_rows_are_named_with_their_line(tmp_path: Path, content: str, match: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=match):
        read_rows(path)


def test_a_missing_file_of_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        read_rows(tmp_path / "none.jsonl")


def test_run_prints_prompt_and_reply(endless_dir: Path) -> None:
    console = Console(record=True, width=200)
    args = GenerateArgs(
        model_dir=endless_dir, prompts=("R abc",), request=GenerateRequest(max_new_tokens=4)
    )
    replies = run(args, console)
    assert replies == [text(greedy("R abc", 4))]
    assert console.export_text().startswith("R abc\n")


def test_reasoning_is_dimmed_and_the_answer_is_not() -> None:
    styled = styled_reply("<think>1+1</think>2[bold]")
    assert styled.plain == "<think>1+1</think>2[bold]"
    spans = {styled.plain[span.start : span.end]: str(span.style) for span in styled.spans}
    assert spans == {"<think>1+1</think>": "dim", "2[bold]": "green"}
