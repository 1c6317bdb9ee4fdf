"""Answers from an exported Hugging Face folder, by transformers' own `generate`.

Nothing of this project's model code is used here on purpose: what answers is the interchange format
as everybody else would load it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.text import Text
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)

from zaya_train.config.errors import CheckpointError, ConfigError, DataError, first_line
from zaya_train.data.tokenizer import THINK_CLOSE
from zaya_train.hub.config import config_layout, read_config

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console
    from rich.progress import Progress
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]
"""Chat messages, oldest first."""
STEP_COST_ROWS = 100
"""Fixed cost of one decoding step, in rows: a step of a 4-layer, width-128 model took 10 ms for
6 rows and 30 ms for 200 on one CPU thread, so about the time of 100 rows is overhead."""


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """How to decode.

    temperature 0 is greedy; top_p and seed matter only above it. batch_size is a limit in rows.
    """

    max_new_tokens: int = 512
    batch_size: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """`zaya generate`: a model folder and the prompts to answer."""

    model_dir: Path
    prompts: tuple[str, ...]
    request: GenerateRequest = field(default_factory=GenerateRequest)


@dataclass(frozen=True)
class Reply:
    """One assistant turn, think part included; `finished` when the model ended it itself."""

    text: str
    finished: bool


@dataclass(frozen=True)
class Sampler:
    """A model and its tokenizer, ready to answer; made by `load_sampler`."""

    model: Any  # transformers' own annotations of generate() and to() do not type-check
    tokenizer: PreTrainedTokenizerBase
    end_ids: tuple[int, ...]


def generate_answers(model_dir: Path, prompts: list[str], request: GenerateRequest) -> list[str]:
    """Answer every prompt as a conversation of one user turn; think parts are included.

    Raises CheckpointError when the folder holds no complete model, ConfigError for impossible
    decoding settings, DataError for a tokenizer without chat template or an empty prompt.
    """
    check_request(request)
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"generate: prompt {number} is empty")
    sampler = load_sampler(model_dir, request.device)
    conversations = [[{"role": "user", "content": prompt}] for prompt in prompts]
    budgets = [request.max_new_tokens] * len(prompts)
    return [reply.text for reply in decode(sampler, conversations, budgets, request)]


def check_request(request: GenerateRequest) -> None:
    """Raise ConfigError for settings that cannot decode."""
    rules = {
        "max_new_tokens": (request.max_new_tokens, request.max_new_tokens >= 1, "at least 1"),
        "batch_size": (request.batch_size, request.batch_size >= 1, "at least 1"),
        "temperature": (request.temperature, request.temperature >= 0, "at least 0"),
        "top_p": (request.top_p, 0 < request.top_p <= 1, "above 0, at most 1"),
    }
    for name, (value, holds, rule) in rules.items():
        if not holds:
            raise ConfigError(f"generate: {name} must be {rule}, got {value}")


def load_sampler(model_dir: Path, device: Literal["auto", "cpu", "cuda"] = "auto") -> Sampler:
    """Load an exported folder in fp32; errors as in `generate_answers`."""
    _require_native(model_dir)
    tokenizer = _load_tokenizer(model_dir)
    model = load_model(model_dir).to(_device(device)).eval()
    configured = model.generation_config.eos_token_id
    end_ids = {tokenizer.eos_token_id}
    end_ids |= set(configured if isinstance(configured, list) else [configured])
    return Sampler(model, tokenizer, tuple(sorted(end_ids - {None})))


def decode(
    sampler: Sampler,
    conversations: Sequence[Conversation],
    budgets: Sequence[int],
    request: GenerateRequest,
    progress: Progress | None = None,
) -> list[Reply]:
    """Continue every conversation with an assistant turn.

    budgets: for each conversation the new tokens it may need. They decide what is batched together;
    a batch decodes up to its largest budget, so a row may get more than its own.
    progress: gets a bar of the decoding steps.
    """
    prompts = [_prompt_ids(sampler, conversation) for conversation in conversations]
    replies: dict[int, Reply] = {}
    order = sorted(range(len(prompts)), key=lambda row: (budgets[row], len(prompts[row])))
    # generate() draws from the global generator; leave it as it was.
    with torch.random.fork_rng(enabled=request.temperature > 0), torch.inference_mode():
        if request.temperature > 0:
            torch.manual_seed(request.seed)
        batches = _batches(order, batch_sizes([budgets[row] for row in order], request.batch_size))
        steps = _Steps(progress, sum(budgets[rows[-1]] for rows in batches))
        for rows in batches:
            settings = _settings(sampler, request, budgets[rows[-1]])
            decoded = _decode_batch(sampler, [prompts[row] for row in rows], settings, steps)
            replies |= dict(zip(rows, decoded, strict=True))
            steps.batch_done(budgets[rows[-1]])
    return [replies[row] for row in range(len(prompts))]


def _batches(order: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
    ends = list(accumulate(sizes))
    return [order[end - size : end] for end, size in zip(ends, sizes, strict=True)]


class _Steps(StoppingCriteria):
    """Counts decoding steps for a bar; stops nothing."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress = progress
        self.task = progress.add_task("decoding", total=total) if progress else None
        self.before = 0
        """Budgets of the batches that are done."""
        self.done = 0
        """Steps of this batch."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.done += 1
        self._show()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def batch_done(self, budget_tokens: int) -> None:
        """All rows of a batch have ended, perhaps before their budget."""
        self.before, self.done = self.before + budget_tokens, 0
        self._show()

    def _show(self) -> None:
        if self.progress is not None and self.task is not None:
            self.progress.update(self.task, completed=self.before + self.done)


def batch_sizes(budgets: Sequence[int], limit: int) -> list[int]:
    """Cut rows with ascending budgets into batches of the least total cost.

    A batch costs its largest budget times (its rows + STEP_COST_ROWS): one long row must not keep a
    full batch waiting, and every further batch repeats the overhead of all its steps.
    """
    best: list[tuple[int, list[int]]] = [(0, [])]
    for end in range(1, len(budgets) + 1):
        sizes = range(1, min(limit, end) + 1)
        cost, size = min(
            (best[end - size][0] + budgets[end - 1] * (size + STEP_COST_ROWS), size)
            for size in sizes
        )
        best.append((cost, [*best[end - size][1], size]))
    return best[-1][1]


def run(args: GenerateArgs, console: Console) -> list[str]:
    """Answer the prompts and print each with its reasoning dimmed; returns the raw replies."""
    replies = generate_answers(args.model_dir, list(args.prompts), args.request)
    for prompt, reply in zip(args.prompts, replies, strict=True):
        console.print(Text(prompt, style="bold"))
        console.print(styled_reply(reply))
    return replies


def styled_reply(reply: str) -> Text:
    """The reply with everything up to the last `</think>` dimmed."""
    reasoning, close, answer = reply.rpartition(THINK_CLOSE)
    return Text.assemble((reasoning + close, "dim"), (answer, "green"))


def _device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("generate: device is cuda, but torch sees no accelerator")
    return torch.device(name)


def _load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    # Without this file transformers makes up an empty tokenizer for the model type.
    if not (model_dir / "tokenizer.json").is_file():
        raise DataError(
            f"{model_dir}: no tokenizer.json, not a model folder; `zaya export-hf` makes one"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), padding_side="left")
    except (OSError, ValueError) as error:
        raise DataError(f"{model_dir}: tokenizer cannot be loaded: {first_line(error)}") from error
    for name in ("chat_template", "pad_token", "eos_token"):
        if getattr(tokenizer, name, None) is None:
            raise DataError(f"{model_dir}: the tokenizer has no {name}, cannot build prompts")
    return tokenizer


def load_model(
    model_dir: Path, dtype: torch.dtype | Literal["auto"] = torch.float32, experts: str = ""
) -> Any:
    """transformers' model of a folder in the native layout.

    experts: its implementation of the experts; by default the fastest of the three for tiny models.
    All give the same tokens.

    Raises:
        CheckpointError: it cannot be loaded, or a tensor is missing, surplus or of another shape.
    """
    _require_native(model_dir)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            dtype=dtype,
            output_loading_info=True,
            experts_implementation=experts or "grouped_mm",
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{model_dir}: cannot be loaded: {first_line(error)}") from error
    model, report = loaded
    # transformers fills a missing tensor with random numbers and only warns.
    for rule in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(map(str, report[rule]))
        if names:
            raise CheckpointError(
                f"{model_dir}: {len(names)} {rule.replace('_', ' ')}, first {names[0]}"
            )
    return model


def _prompt_ids(sampler: Sampler, conversation: Conversation) -> list[int]:
    template: Any = sampler.tokenizer.apply_chat_template
    return template(conversation, add_generation_prompt=True, tokenize=True, return_dict=False)


def _require_native(model_dir: Path) -> None:
    path = model_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{model_dir}: no config.json, not an exported model folder")
    if config_layout(path, read_config(model_dir)) != "native":
        raise CheckpointError(
            f"{model_dir}: in the legacy layout, which transformers does not read; export it with "
            "--layout native"
        )


def _settings(sampler: Sampler, request: GenerateRequest, budget_tokens: int) -> GenerationConfig:
    sampling: dict[str, Any] = {"do_sample": False}
    if request.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": 0,
        }
    return GenerationConfig(
        max_new_tokens=budget_tokens,
        eos_token_id=list(sampler.end_ids),
        pad_token_id=sampler.tokenizer.pad_token_id,
        use_cache=True,
        **sampling,
    )


def _decode_batch(
    sampler: Sampler, prompts: list[list[int]], settings: GenerationConfig, steps: _Steps
) -> list[Reply]:
    padded = sampler.tokenizer.pad(
        {"input_ids": prompts}, padding=True, return_tensors="pt", padding_side="left"
    ).to(sampler.model.device)
    sequences = sampler.model.generate(
        input_ids=padded["input_ids"],
        attention_mask=padded["attention_mask"],
        generation_config=settings,
        stopping_criteria=StoppingCriteriaList([steps]),
    )
    new_tokens = sequences[:, padded["input_ids"].shape[1] :].tolist()
    return [_reply(sampler, row) for row in new_tokens]


def _reply(sampler: Sampler, tokens: list[int]) -> Reply:
    end = next((i for i, token in enumerate(tokens) if token in sampler.end_ids), None)
    # Think markers are special tokens too: they must survive.
    text = sampler.tokenizer.decode(tokens[:end], skip_special_tokens=False)
    return Reply(str(text), finished=end is not None)
