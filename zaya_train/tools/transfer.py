"""Checkpoints to Hugging Face folders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from zaya_kernels.dtypes import DTYPES

from zaya_train.config.build import build
from zaya_train.config.errors import CheckpointError, ConfigError
from zaya_train.config.schema import ModelConfig
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.hub.convert import RECEIPT, Form, require_replaceable, write_hf
from zaya_train.run import CHECKPOINTS, TOKENIZER
from zaya_train.tools.export_page import agreement_line, loss_line, lost, skip_line
from zaya_train.tools.export_progress import unfinished_line
from zaya_train.tools.export_receipt import PAGE, Origin, complete, read_receipt
from zaya_train.tools.export_tokens import CheckTokens, named_tokens, random_tokens
from zaya_train.train.manifest import read
from zaya_train.train.restore import find_newest, load_full

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from torch import Tensor

    from zaya_train.hub.names import Layout

_MODEL_PREFIX = "model."
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
VERIFY_TOKENS = 2048
"""Tokens on which an export is compared with transformers by default."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """On what an export is compared with transformers."""

    tokens: int = VERIFY_TOKENS
    data: Path | None = None
    """A corpus directory or a text file; None: random tokens."""


@dataclass(frozen=True)
class ExportRequest:
    """What `zaya export-hf` is asked for."""

    source: Path
    """A run directory (its newest verified checkpoint) or one checkpoint directory."""
    output: Path
    dtype: str = "fp32"
    """fp32 or bf16; balancing biases stay fp32."""
    tokenizer: Path | None = None
    """Folder with tokenizer.json and tokenizer_config.json; None: the one the run keeps."""
    layout: Layout = "native"
    verify: Verification | None = Verification()
    """None: not compared, and the receipt says so."""


def export_hf(request: ExportRequest, console: Console) -> Path:
    """Write a checkpoint as a Hugging Face `zaya` folder with its tokenizer and receipt.

    Nothing is left at `output`, or what was there stays, where one of these is raised:

    CheckpointError (exit 3): nothing verifies, a tensor has no place in the format, the output
    would touch the source, `request.tokenizer` is none or has ids that the model lacks, or the
    folder contradicts the checkpoint.
    NumericsError (exit 5): transformers computes something else than our model.
    ConfigError, DataError (exit 2): what it is to be compared on.
    """
    checkpoint = checkpoint_of(request.source)
    _require_apart(request, checkpoint)
    tokenizer = _tokenizer_of(request, checkpoint)
    record = read(checkpoint).record
    config = build(ModelConfig, record.model, "checkpoint.model")
    if tokenizer:
        _require_fit(tokenizer, config)
    # What can be refused is, before tens of gigabytes are read.
    require_replaceable(request.output)
    tokens = _check_tokens(request.verify, config, tokenizer)
    origin = Origin(
        checkpoint=checkpoint,
        record=record,
        config=config,
        tensors=trained_tensors(checkpoint),
        form=Form(layout=request.layout, dtype=DTYPES[request.dtype], tokenizer=tokenizer),
        tokens=tokens,
    )
    write_hf(origin.tensors, config, request.output, origin.form, partial(complete, origin=origin))
    _report(request, console)
    return request.output


def _check_tokens(
    asked: Verification | None, config: ModelConfig, tokenizer: Path | None
) -> CheckTokens | None:
    if asked is None:
        return None
    if asked.tokens < 2:
        raise ConfigError(f"--verify-tokens {asked.tokens}: at least 2, or --no-verify")
    if asked.data is None:
        return random_tokens(asked.tokens, config.vocab_size, config.max_context_tokens)
    return named_tokens(asked.data, asked.tokens, config.max_context_tokens, tokenizer)


def _report(request: ExportRequest, console: Console) -> None:
    receipt = read_receipt(request.output)
    count = receipt["keys"]["totals"]

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(
        f"exported step {receipt['run']['step']} ({count['ours']} tensors as {count['theirs']}, "
        f"{count['values']:,} values, {request.layout} layout) to {request.output}"
    )
    if unfinished := unfinished_line(receipt):
        say(f"warning: {unfinished}")
    say(agreement_line(receipt))
    say(skip_line(receipt))
    if lost(receipt):
        say(f"warning: {loss_line(receipt)}")
    if receipt["tokenizer"] is None:
        say(
            f"note: no tokenizer exported, {request.source} keeps none; `zaya generate` and "
            "transformers need one: export again and name its folder"
        )
    say(f"receipt: {request.output / PAGE}, {request.output / RECEIPT}")


def trained_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """The full tensors of a checkpoint's model under our names; CheckpointError where it does not
    verify."""
    tensors = load_full(checkpoint, _MODEL_PREFIX)
    return {name.removeprefix(_MODEL_PREFIX): value for name, value in tensors.items()}


def _require_apart(request: ExportRequest, checkpoint: Path) -> None:
    """An export replaces its output folder, so that must not share a path with what it is made
    from: the given directory, the checkpoint, and the run that the checkpoint belongs to."""
    output = request.output.resolve()
    sources = [request.source, checkpoint]
    if checkpoint.resolve().parent.name == CHECKPOINTS:
        sources.append(checkpoint.resolve().parent.parent)
    for source in sources:
        place = source.resolve()
        if output.is_relative_to(place) or place.is_relative_to(output):
            raise CheckpointError(
                f"{request.output}: an export cannot be written at, into or around the directory "
                f"it is made from ({source}); name another one"
            )


def _tokenizer_of(request: ExportRequest, checkpoint: Path) -> Path | None:
    """The tokenizer folder asked for or kept by the run; None where the run keeps none."""
    kept = checkpoint.resolve().parent.parent / TOKENIZER
    folder = request.tokenizer or (kept if kept.is_dir() else None)
    for name in _TOKENIZER_FILES if folder else ():
        if folder and not (folder / name).is_file():
            raise CheckpointError(f"{folder}: no {name}; a tokenizer folder is expected")
    return folder


def _require_fit(tokenizer: Path, config: ModelConfig) -> None:
    size = load_tokenizer(str(tokenizer)).vocab_size
    if size > config.vocab_size:
        raise CheckpointError(
            f"{tokenizer}: its tokenizer has {size} ids with the chat markers, the model only "
            f"{config.vocab_size}"
        )


def checkpoint_of(source: Path) -> Path:
    """The checkpoint directory meant by `source`: itself, or a run's newest that verifies."""
    if (source / "MANIFEST.json").is_file():
        return source
    root = source / CHECKPOINTS
    if not root.is_dir():
        raise CheckpointError(f"{source}: neither a checkpoint nor a run with {CHECKPOINTS}/")
    found, _ = find_newest(root)
    if found is None:
        raise CheckpointError(f"{root}: holds no checkpoint")
    return found.path
