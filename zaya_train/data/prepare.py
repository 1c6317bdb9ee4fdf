"""`zaya data prepare`: text, pairs or conversations in, tokenised corpora out.

    <output>/train/          corpus
    <output>/heldout/        corpus, when a held-out share is asked
    <output>/heldout.jsonl   its conversations as text, with the expected answers
    <output>/prepare.json    what it was made from; written for `prepare` to recognise its own work

The input is read twice: once to check every row, find the answer marker and fix the split, once to
tokenise. The directory appears under its name when all of it is on disk.
"""

from __future__ import annotations

import json
from array import array
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zaya_train.config.errors import DataError
from zaya_train.data.chat import encode_conversations, encode_texts
from zaya_train.data.corpus import Corpus, CorpusWriter, fill_corpus
from zaya_train.data.fields import (
    GSM8K_MARKER,
    Document,
    FieldOverrides,
    Fields,
    detect_fields,
    marked_answer,
    to_document,
)
from zaya_train.data.outcome import (
    SHOWN_REJECTS,
    Outcome,
    describe_reject,
    first_rejects,
    read_outcome,
)
from zaya_train.data.reading import DEFAULT_DOCUMENT_CHARACTERS, Input, open_input
from zaya_train.data.sections import Rejected, Sample
from zaya_train.data.tokenizer import Tokenizer, load_tokenizer
from zaya_train.runtime.files import remove_leftovers, whole_directory, write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

__all__ = ["FieldOverrides", "PrepareRequest", "prepare"]

TRAIN, HELDOUT = "train", "heldout"
HELDOUT_TEXT, RECEIPT = "heldout.jsonl", "prepare.json"
RECEIPT_VERSION = 1
_BATCH_DOCUMENTS = 64
_BATCH_CHARACTERS = 1 << 21
LocatedDocument = tuple[str, Document]
"""(place such as `file:line`, document)."""


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """One preparation."""

    input: str
    """File or folder (.jsonl, .json, .txt, .parquet, .arrow), or the name of a hub dataset."""
    output: Path
    """Directory to make."""
    tokenizer: str = "bytes"
    """`bytes`, a tokenizer.json, a folder holding one, or a hub name."""
    fields: FieldOverrides = field(default_factory=FieldOverrides)
    answer_marker: str | None = None
    """Pairs only. Line start that separates worked steps, which become reasoning, from the answer.
    None: `####` where every response has such a line; empty: never."""
    heldout_fraction: float = 0.0
    """Share of distinct prompts (documents, for plain text) held out; at least one if above 0."""
    split: str = "train"
    """Hub datasets only."""
    document_characters: int | None = None
    """Text files only: cut into documents of about this length, 0 for one document per file. None:
    0, or 8,192 when a held-out share is asked."""
    overwrite: bool = False
    """Replace an output that was prepared from something else."""
    allow_rejects: bool = False
    """Accept that more than half of the documents are rejected."""


@dataclass(frozen=True)
class Survey:
    """What the first pass found; documents whose group hash is below `heldout_below` are held out,
    which the hash's 64 bits make a share of all distinct prompts."""

    rows: int
    fields: Fields
    heldout_below: int


def prepare(request: PrepareRequest, console: Console | None = None) -> Path:
    """Make the corpora and print what they hold; returns `request.output`.

    An output that this input and these settings already made is kept as it is.

    Raises:
        DataError: input that breaks a rule, with file and line; unknown tokenizer; an output that
            holds something else; no usable document, or more than half of them rejected without
            `allow_rejects`.
        StorageError: the file system refused.
    """
    _check_request(request)
    remove_leftovers(request.output)
    source = open_input(request.input, request.split, _document_characters(request))
    tokenizer = load_tokenizer(request.tokenizer)
    receipt = _receipt(request, source, tokenizer)
    console = console or Console(stderr=True)
    kept = _already_made(request, receipt)
    if kept:
        outcome = _outcome(request, request.output)
    else:
        with _progress(console) as progress:
            survey = _survey(source, request, progress)
            with whole_directory(request.output) as folder:
                examples = _build(folder, source, tokenizer, survey, progress)
                outcome = _outcome(request, folder, examples)
                write_json(folder / RECEIPT, receipt)
    outcome.show(console, request.output / TRAIN, kept)
    return request.output


def _outcome(request: PrepareRequest, folder: Path, examples: Sequence[str] = ()) -> Outcome:
    """What `folder` holds; DataError where too much of the input is not in it."""
    outcome = read_outcome(folder / TRAIN, folder / HELDOUT, examples)
    if not request.allow_rejects:
        outcome.require_majority(request.input)
    return outcome


def _check_request(request: PrepareRequest) -> None:
    if not 0 <= request.heldout_fraction < 1:
        raise DataError(f"heldout_fraction is {request.heldout_fraction}, expected 0 <= x < 1")
    if request.document_characters is not None and request.document_characters < 0:
        raise DataError(f"document_characters is {request.document_characters}, expected >= 0")


def _document_characters(request: PrepareRequest) -> int:
    if request.document_characters is not None:
        return request.document_characters
    return DEFAULT_DOCUMENT_CHARACTERS if request.heldout_fraction else 0


def _receipt(request: PrepareRequest, source: Input, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "version": RECEIPT_VERSION,
        "input": source.identity(),
        "tokenizer_sha256": tokenizer.sha256,
        "fields": asdict(request.fields),
        "answer_marker": request.answer_marker,
        "heldout_fraction": request.heldout_fraction,
    }


def _already_made(request: PrepareRequest, receipt: dict[str, Any]) -> bool:
    """Whether the output exists and is this very work.

    Raises:
        DataError: it is something else that may not be replaced.
    """
    output = request.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    try:
        found = json.loads((output / RECEIPT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        # Never replaced, asked or not: it may be any directory of the user's.
        raise DataError(f"{output}: exists and was not made by data prepare") from None
    if found == receipt:
        names = [name for name in (TRAIN, HELDOUT) if (output / name).is_dir()]
        for name in names:
            Corpus.open(output / name)
        return True
    if request.overwrite:
        return False
    differs = [key for key in receipt if found.get(key) != receipt[key]]
    raise DataError(
        f"{output}: was prepared differently ({', '.join(differs)}); not replaced without overwrite"
    )


def _survey(source: Input, request: PrepareRequest, progress: Progress) -> Survey:
    """Read and check every row once."""
    fields: Fields | None = None
    hashes = array("Q")
    marked = request.answer_marker is None
    for place, row in progress.track(source.rows(), description="checking"):
        if fields is None:
            fields = detect_fields(row, request.fields, place)
            if fields.layout == "pair":
                fields = replace(fields, answer_marker=request.answer_marker or "")
            marked = marked and fields.layout == "pair"
        document = to_document(row, fields, place)
        hashes.append(document.group_hash())
        marked = marked and _has_marker(document)
    if fields is None:
        raise DataError(f"{request.input}: no rows")
    if marked:
        fields = replace(fields, answer_marker=GSM8K_MARKER)
    return Survey(len(hashes), fields, _heldout_below(hashes, request))


def _has_marker(document: Document) -> bool:
    content = str(document.messages[-1]["content"])
    return marked_answer(content, f"{GSM8K_MARKER} ") is not None


def _heldout_below(hashes: array[int], request: PrepareRequest) -> int:
    """Smallest hash that is not held out; 0 holds out nothing."""
    if not request.heldout_fraction:
        return 0
    groups = np.unique(np.frombuffer(hashes, dtype=np.uint64))
    count = max(1, round(request.heldout_fraction * len(groups)))
    if count >= len(groups):
        raise DataError(
            f"{request.input}: {len(groups)} distinct prompts or documents cannot be split with "
            f"heldout_fraction={request.heldout_fraction}: nothing would be left to train on"
        )
    return int(groups[count])


def _build(
    folder: Path, source: Input, tokenizer: Tokenizer, survey: Survey, progress: Progress
) -> list[str]:
    """Write the corpora into `folder`; returns the first rejected documents, with their places."""
    kind = survey.fields.kind
    names = [TRAIN, HELDOUT] if survey.heldout_below else [TRAIN]
    examples: list[str] = []
    with ExitStack() as stack:
        writers: dict[str, CorpusWriter] = {}
        for name in names:
            about = source.identity() | {"fields": asdict(survey.fields), "part": name}
            corpus = fill_corpus(folder / name, tokenizer, kind, about)
            writers[name] = stack.enter_context(corpus)
        kept: list[Document] = []
        documents = progress.track(
            _documents(source, survey.fields), total=survey.rows, description="tokenising"
        )
        for batch in _batches(documents):
            samples = _encode(tokenizer, kind, [document for _, document in batch])
            for (place, document), sample in zip(batch, samples, strict=True):
                held_out = document.group_hash() < survey.heldout_below
                writers[HELDOUT if held_out else TRAIN].add(sample)
                if isinstance(sample, Rejected):
                    if len(examples) < SHOWN_REJECTS:
                        examples.append(describe_reject(place, sample))
                elif held_out and kind == "chat":
                    kept.append(document)
        for name, writer in writers.items():
            if not writer.documents:
                raise DataError(
                    f"{source.spec}: no usable document for {name} among {survey.rows} rows; "
                    f"rejected: {writer.rejects}{first_rejects(examples)}"
                )
    if kept:
        _write_heldout(folder / HELDOUT_TEXT, kept)
    return examples


def _documents(source: Input, fields: Fields) -> Iterator[LocatedDocument]:
    for place, row in source.rows():
        yield place, to_document(row, fields, place)


def _batches(documents: Iterable[LocatedDocument]) -> Iterator[list[LocatedDocument]]:
    """Groups small enough that their encodings stay in bounded memory."""
    batch: list[LocatedDocument] = []
    characters = 0
    for place, document in documents:
        batch.append((place, document))
        characters += len(document.text)
        characters += sum(len(str(message["content"])) for message in document.messages)
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: Tokenizer, kind: str, batch: Sequence[Document]) -> list[Sample | Rejected]:
    if kind == "text":
        return encode_texts(tokenizer, [document.text for document in batch])
    return encode_conversations(tokenizer, [document.messages for document in batch])


def _write_heldout(file: Path, documents: Sequence[Document]) -> None:
    """One object per line: id, prompt, messages up to the reference reply, answer, family."""
    with file.open("w", encoding="utf-8") as stream:
        for document in documents:
            row = {
                "id": document.id,
                "prompt": document.messages[-2]["content"],
                "messages": list(document.messages),
                "answer": document.answer,
            }
            if document.family:
                row["family"] = document.family
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
