"""What is done with one shard of an input: checking its rows, and tokenising them.

Both are functions of the shard and a small job alone, so that they give the same in any process.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy as np

from zaya_train.config.errors import DataError
from zaya_train.data.chat import encode_conversations, encode_texts, is_unicode, json_line
from zaya_train.data.chat_template import compile_template
from zaya_train.data.corpus_writer import make_block
from zaya_train.data.fast_encoder import COMPARE_EVERY, PLAIN, Comparison, fast_tokenizer
from zaya_train.data.fields import GSM8K_MARKER, Document, Fields, marked_answer, to_document
from zaya_train.data.outcome import SHOWN_REJECTS, describe_reject
from zaya_train.data.sections import Rejected, Sample
from zaya_train.data.shards import ShardResult, read_shard, shard_path, write_shard
from zaya_train.data.tokenizer import load_tokenizer
from zaya_train.runtime.files import storing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from zaya_train.data.reading import Shard
    from zaya_train.data.tokenizer import TemplateSource, Tokenizer

TRAIN, HELDOUT = "train", "heldout"
_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 1 << 21
LocatedDocument = tuple[str, Document]
"""(place such as `file:line`, document)."""


@dataclass(frozen=True)
class ShardSurvey:
    """Facts of a shard's rows, all of which are in order."""

    rows: int
    marked: bool
    """Whether every response has GSM8K's answer marker; only asked of pairs."""
    hashes: NDArray[np.uint64]
    """[rows] group hashes, or none where no split is asked."""


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """How to tokenise; what a worker process is told."""

    output: Path
    """For messages."""
    folder: Path
    """Where shards go."""
    tokenizer: Path
    """Folder it was saved in."""
    template: TemplateSource | None
    """Chat template of conversations; None: the shipped format."""
    fields: Fields
    heldout_below: int
    """Documents whose group hash is smaller are held out."""
    encoder: str = PLAIN
    """One of fast_encoder.ENCODERS."""
    compare_every: int = COMPARE_EVERY
    """Documents of which a fast encoder's ids are compared: every so manieth."""


def survey_shard(shard: Shard, fields: Fields, hashed: bool) -> ShardSurvey:
    """Check every row of a shard.

    Raises:
        DataError: a row that breaks a rule, with its place.
    """
    rows, marked = 0, fields.layout == "pair"
    hashes: list[int] = []
    for _, document in _documents(shard, fields):
        rows += 1
        if hashed:
            hashes.append(document.group_hash())
        marked = marked and _has_marker(document)
    return ShardSurvey(rows, marked, np.array(hashes, dtype=np.uint64))


def shard_encoder(
    job: EncodeJob, tokenizer: Tokenizer | None
) -> Callable[[tuple[int, Shard]], None]:
    """A function that tokenises shard i of an input and stores it; with None it loads the tokenizer
    itself, once per process, and can be sent to another one."""
    return partial(_encode_shard, job, tokenizer)


def _encode_shard(job: EncodeJob, tokenizer: Tokenizer | None, numbered: tuple[int, Shard]) -> None:
    index, shard = numbered
    path = shard_path(job.folder, index)
    if read_shard(path) is not None:
        return
    result = _encode_documents(
        _documents(shard, job.fields),
        job,
        tokenizer or _saved_tokenizer(job.tokenizer, job.template),
    )
    with storing(job.output):
        write_shard(path, result)


@cache
def _saved_tokenizer(folder: Path, template: TemplateSource | None) -> Tokenizer:
    return replace(load_tokenizer(str(folder)), own_template=template)


def _encode_documents(
    documents: Iterable[LocatedDocument], job: EncodeJob, tokenizer: Tokenizer
) -> ShardResult:
    samples: dict[str, list[Sample | Rejected]] = {TRAIN: []}
    if job.heldout_below:
        samples[HELDOUT] = []
    heldout_rows: list[str] = []
    examples: list[str] = []
    chosen, comparison = tokenizer, None
    if job.encoder != PLAIN:
        chosen = fast_tokenizer(tokenizer)
        comparison = Comparison(chosen, tokenizer, job.compare_every)
    for batch in _batches(documents):
        encoded = _encode(chosen, job, [document for _, document in batch])
        if comparison is not None:
            _compare(comparison, batch, encoded, partial(_encode, tokenizer, job))
        for (place, document), sample in zip(batch, encoded, strict=True):
            held_out = job.heldout_below and document.group_hash() < job.heldout_below
            samples[HELDOUT if held_out else TRAIN].append(sample)
            if isinstance(sample, Rejected):
                if len(examples) < SHOWN_REJECTS:
                    examples.append(describe_reject(place, sample))
            elif held_out and job.fields.kind == "chat":
                heldout_rows.append(_heldout_row(document))
    blocks = {name: make_block(found, tokenizer) for name, found in samples.items()}
    compared = comparison.compared if comparison is not None else 0
    return ShardResult(blocks, tuple(heldout_rows), tuple(examples), compared)


def _compare(
    comparison: Comparison,
    batch: Sequence[LocatedDocument],
    encoded: Sequence[Sample | Rejected],
    encode: Callable[[Sequence[Document]], list[Sample | Rejected]],
) -> None:
    """Encode documents that the comparison wants once more, with `encode`.

    Raises:
        DataError: the first that differs.
    """
    wanted = [
        (place, document, sample)
        for (place, document), sample in zip(batch, encoded, strict=True)
        if comparison.wants(place, [text for text in _texts(document) if is_unicode(text)])
    ]
    plain = encode([document for _, document, _ in wanted])
    for (place, _, sample), other in zip(wanted, plain, strict=True):
        comparison.require_equal(place, sample, other)


def _texts(document: Document) -> list[str]:
    return [document.text, *(str(message["content"]) for message in document.messages)]


def _documents(shard: Shard, fields: Fields) -> Iterator[LocatedDocument]:
    for place, row in shard.rows():
        yield place, to_document(row, fields, place)


def _has_marker(document: Document) -> bool:
    content = str(document.messages[-1]["content"])
    return marked_answer(content, f"{GSM8K_MARKER} ") is not None


def _batches(documents: Iterable[LocatedDocument]) -> Iterator[list[LocatedDocument]]:
    """Groups small enough that their encodings stay in bounded memory."""
    batch: list[LocatedDocument] = []
    characters = 0
    for place, document in documents:
        batch.append((place, document))
        characters += sum(map(len, _texts(document)))
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(
    tokenizer: Tokenizer, job: EncodeJob, batch: Sequence[Document]
) -> list[Sample | Rejected]:
    if job.fields.kind == "text":
        return encode_texts(tokenizer, [document.text for document in batch])
    template = compile_template(tokenizer) if tokenizer.own_template else None
    return encode_conversations(tokenizer, [document.messages for document in batch], template)


def _heldout_row(document: Document) -> str:
    """An object: id, prompt, messages up to the reference reply, answer, family."""
    row = {
        "id": document.id,
        "prompt": document.messages[-2]["content"],
        "messages": list(document.messages),
        "answer": document.answer,
    }
    if document.family:
        row["family"] = document.family
    return json_line(row)


def stored_shards(folder: Path, count: int) -> Iterator[ShardResult]:
    """The shards of a finished job in order.

    Raises:
        DataError: one is gone or damaged since it was written.
    """
    for index in range(count):
        result = read_shard(shard_path(folder, index))
        if result is None:
            raise DataError(f"{shard_path(folder, index)}: gone or damaged since it was written")
        yield result
