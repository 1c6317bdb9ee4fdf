"""`zaya data prepare`: text, pairs or conversations in, tokenised corpora out.

    <output>/train/          corpus
    <output>/heldout/        corpus, when a held-out share is asked
    <output>/heldout.jsonl   its conversations as text, with the expected answers
    <output>/prepare.json    what it was made from; written for `prepare` to recognise its own work

The input is read twice: once to check every row, find the answer marker and fix the split, once to
tokenise. Both are done shard by shard, by several processes where there is enough to do; what comes
out does not depend on their number. Finished shards wait in `<output>.shards` (see `shards`), so a
killed preparation goes on from them. The directory appears under its name when all of it is on
disk.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from zaya_train.config.errors import DataError
from zaya_train.data.chat_template import compile_template
from zaya_train.data.corpus import Corpus
from zaya_train.data.corpus_writer import CorpusWriter, fill_corpus
from zaya_train.data.encoding import (
    HELDOUT,
    TRAIN,
    EncodeJob,
    shard_encoder,
    stored_shards,
    survey_shard,
)
from zaya_train.data.fast_encoder import (
    COMPARE_EVERY,
    ENCODERS,
    PLAIN,
    encoder_version,
    fast_tokenizer,
)
from zaya_train.data.fields import GSM8K_MARKER, FieldOverrides, Fields, detect_fields
from zaya_train.data.outcome import SHOWN_REJECTS, Outcome, first_rejects, read_outcome
from zaya_train.data.reading import DEFAULT_DOCUMENT_CHARACTERS, Input, open_input
from zaya_train.data.shards import discard_shards, shard_folder
from zaya_train.data.tokenizer import Tokenizer, load_tokenizer
from zaya_train.data.workers import Workers, workers
from zaya_train.runtime.files import remove_leftovers, whole_directory, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from zaya_train.data.reading import LocatedRow, Shard

__all__ = ["HELDOUT", "TRAIN", "FieldOverrides", "PrepareRequest", "prepare"]

HELDOUT_TEXT, RECEIPT = "heldout.jsonl", "prepare.json"
RECEIPT_VERSION = 1
_PARALLEL_BYTES = 1 << 23
"""Input below which starting processes costs more than it saves."""


@dataclass(frozen=True, kw_only=True)
class PrepareRequest:
    """One preparation."""

    input: str
    """File or folder (.jsonl, .json, .txt, .parquet, .arrow), or the name of a hub dataset."""
    output: Path
    """Directory to make."""
    tokenizer: str = "bytes"
    """`bytes`, a tokenizer.json, a folder holding one, or a hub name."""
    own_template: bool = False
    """Conversations, which it asks for, in the chat template that came with the tokenizer, not the
    shipped format."""
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
    workers: int | None = None
    """Processes; None: as many as there are processors, one for an input below 8 MiB."""
    encoder: str = PLAIN
    """`tokenizers`, or `gigatoken` for the same ids sooner; see fast_encoder."""
    compare_every: int = COMPARE_EVERY
    """Of a fast encoder's documents every so manieth is encoded by `tokenizers` too; 1: all."""


@dataclass(frozen=True)
class Survey:
    """What the first pass found; documents whose group hash is below `heldout_below` are held out,
    which the hash's 64 bits make a share of all distinct prompts."""

    rows: int
    shards: int
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
    if request.own_template:
        compile_template(tokenizer)
    else:
        tokenizer = replace(tokenizer, own_template=None)
    if request.encoder != PLAIN:
        fast_tokenizer(tokenizer)
    receipt = _receipt(request, source, tokenizer)
    console = console or Console(stderr=True)
    kept = _already_made(request, receipt)
    if kept:
        outcome = _outcome(request, request.output)
        discard_shards(request.output)
    else:
        with _progress(console) as progress, workers(_worker_count(request, source)) as pool:
            survey = _survey(source, request, progress, pool)
            with whole_directory(request.output) as folder:
                encoder = [request.encoder, request.compare_every]
                job = receipt | {"survey": asdict(survey), "encoder": encoder}
                with shard_folder(request.output, job, folder / "shards") as shards:
                    _encode_shards(request, source, tokenizer, survey, shards, progress, pool)
                    examples = _build(folder, shards, source, tokenizer, survey, request)
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
    if request.workers is not None and request.workers < 1:
        raise DataError(f"workers is {request.workers}, expected >= 1")
    if request.encoder not in ENCODERS:
        raise DataError(f"encoder is {request.encoder!r}, expected one of {', '.join(ENCODERS)}")
    if request.compare_every < 1:
        raise DataError(f"compare_every is {request.compare_every}, expected >= 1")


def _worker_count(request: PrepareRequest, source: Input) -> int:
    if request.workers is not None:
        return request.workers
    size = sum(file.stat().st_size for file in source.files)
    if source.files and size < _PARALLEL_BYTES:
        return 1
    return len(os.sched_getaffinity(0))


def _document_characters(request: PrepareRequest) -> int:
    if request.document_characters is not None:
        return request.document_characters
    return DEFAULT_DOCUMENT_CHARACTERS if request.heldout_fraction else 0


def _receipt(request: PrepareRequest, source: Input, tokenizer: Tokenizer) -> dict[str, Any]:
    template: dict[str, Any] = {}
    if tokenizer.own_template is not None:
        # Absent otherwise, so that receipts of earlier versions still hold.
        template = {"own_template": asdict(tokenizer.own_template) | {"file": ""}}
    return template | {
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
    if found == json.loads(json.dumps(receipt)):
        names = [name for name in (TRAIN, HELDOUT) if (output / name).is_dir()]
        for name in names:
            Corpus.open(output / name)
        return True
    if request.overwrite:
        return False
    differs = [key for key in receipt if found.get(key) != receipt[key]]
    raise DataError(
        f"{output}: was prepared differently ({', '.join(differs)}); --overwrite replaces it"
    )


def _survey(source: Input, request: PrepareRequest, progress: Progress, pool: Workers) -> Survey:
    """Read and check every row once."""
    shards = source.shards()
    (place, first), passed = _first_row(request, shards)
    fields = detect_fields(first, request.fields, place)
    if fields.kind == "text" and request.own_template:
        raise DataError(f"{place}: plain text has no chat template; leave own_template out")
    if fields.layout == "pair":
        fields = replace(fields, answer_marker=request.answer_marker or "")
    look = partial(survey_shard, fields=fields, hashed=bool(request.heldout_fraction))
    found = list(progress.track(pool.map(look, chain(passed, shards)), description="checking"))
    if request.answer_marker is None and all(part.marked for part in found):
        fields = replace(fields, answer_marker=GSM8K_MARKER)
    below = _heldout_below([part.hashes for part in found], request)
    return Survey(sum(part.rows for part in found), len(found), fields, below)


def _first_row(request: PrepareRequest, shards: Iterator[Shard]) -> tuple[LocatedRow, list[Shard]]:
    """The first row and the shards up to the one that it is in; others hold blank lines alone."""
    passed = []
    for shard in shards:
        passed.append(shard)
        if located := next(shard.rows(), None):
            return located, passed
    raise DataError(f"{request.input}: no rows")


def _heldout_below(hashes: Sequence[NDArray[np.uint64]], request: PrepareRequest) -> int:
    """Smallest hash that is not held out; 0 holds out nothing."""
    if not request.heldout_fraction:
        return 0
    groups = np.unique(np.concatenate(hashes))
    count = max(1, round(request.heldout_fraction * len(groups)))
    if count >= len(groups):
        raise DataError(
            f"{request.input}: {len(groups)} distinct prompts or documents cannot be split with "
            f"heldout_fraction={request.heldout_fraction}: nothing would be left to train on"
        )
    return int(groups[count])


def _encode_shards(
    request: PrepareRequest,
    source: Input,
    tokenizer: Tokenizer,
    survey: Survey,
    folder: Path,
    progress: Progress,
    pool: Workers,
) -> None:
    """Tokenise every shard that is not finished yet."""
    saved = folder / "tokenizer"
    job = EncodeJob(
        output=request.output,
        folder=folder,
        tokenizer=saved,
        template=tokenizer.own_template,
        fields=survey.fields,
        heldout_below=survey.heldout_below,
        encoder=request.encoder,
        compare_every=request.compare_every,
    )
    if pool.count > 1:
        tokenizer.save(saved)
    work = shard_encoder(job, tokenizer if pool.count == 1 else None)
    done = pool.map(work, enumerate(source.shards()))
    for _ in progress.track(done, total=survey.shards, description="tokenising"):
        pass


def _build(
    folder: Path,
    shards: Path,
    source: Input,
    tokenizer: Tokenizer,
    survey: Survey,
    request: PrepareRequest,
) -> list[str]:
    """Join finished shards to corpora; returns the first rejected documents, with their places."""
    names = [TRAIN, HELDOUT] if survey.heldout_below else [TRAIN]
    examples: list[str] = []
    heldout_rows: list[str] = []
    # Its count is known when the shards have been read, which is when the manifests are written.
    encoder: dict[str, Any] = {}
    if request.encoder != PLAIN:
        encoder |= {"name": encoder_version(request.encoder), "compared_documents": 0}
    with ExitStack() as stack:
        writers: dict[str, CorpusWriter] = {}
        for name in names:
            about = source.identity() | {"fields": asdict(survey.fields), "part": name}
            if encoder:
                about["encoder"] = encoder
            corpus = fill_corpus(folder / name, tokenizer, survey.fields.kind, about)
            writers[name] = stack.enter_context(corpus)
        for result in stored_shards(shards, survey.shards):
            if encoder:
                encoder["compared_documents"] += result.compared
            for name, block in result.blocks.items():
                writers[name].append(block)
            examples += result.examples[: SHOWN_REJECTS - len(examples)]
            heldout_rows += result.heldout_rows
        for name, writer in writers.items():
            if not writer.documents:
                raise DataError(
                    f"{source.spec}: no usable document for {name} among {survey.rows} rows; "
                    f"rejected: {writer.rejects}{first_rejects(examples)}"
                )
    if heldout_rows:
        text = "".join(f"{row}\n" for row in heldout_rows)
        (folder / HELDOUT_TEXT).write_text(text, encoding="utf-8")
    return examples


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        # It would leave an empty line.
        disable=not console.is_terminal,
    )
