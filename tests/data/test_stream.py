from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from zaya_train.config.errors import DataError
from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.data.chat import encode_conversations, encode_texts
from zaya_train.data.corpus import BIN, Corpus
from zaya_train.data.corpus_writer import fill_corpus, make_block
from zaya_train.data.sections import Kind, Sample
from zaya_train.data.stream import PhaseStream, Row, validation_rows
from zaya_train.data.tokenizer import Tokenizer, load_tokenizer

from .builders import CorpusFactory, data_config, phase_config, problem, problems

if TYPE_CHECKING:
    from pathlib import Path

CONTEXT = 128
WORDS = "the quick brown fox jumps over the lazy dog"


@pytest.fixture
def sources(corpora: CorpusFactory) -> dict[str, Path]:
    texts = [f"{number} {WORDS}"[: 20 + 5 * number] for number in range(40)]
    return {"chat": corpora.chat("chat", problems(60)), "text": corpora.text("text", texts)}


def make_stream(sources: dict[str, Path], seed: int = 0, context: int = CONTEXT) -> PhaseStream:
    phase = phase_config(context, {"chat": 0.75, "text": 0.25})
    return PhaseStream(data_config(sources), "phase", phase, seed)


def same(left: Row, right: Row) -> bool:
    return (
        np.array_equal(left.tokens, right.tokens)
        and np.array_equal(left.labels, right.labels)
        and np.array_equal(left.document_lengths, right.document_lengths)
        and np.array_equal(left.documents, right.documents)
        and left.source == right.source
    )


def test_rows_have_the_promised_shape(sources: dict[str, Path]) -> None:
    stream = make_stream(sources)
    assert (stream.vocab_size, stream.pad_id, stream.row_tokens) == (264, 0, CONTEXT)
    for index in range(80):
        row = stream.row(index)
        assert row.tokens.shape == row.labels.shape == (CONTEXT,)
        assert row.tokens.dtype == row.labels.dtype == np.int64
        assert row.document_lengths.dtype == np.int32
        assert len(row.documents) == len(row.document_lengths) >= 1
        real = int(row.document_lengths.sum())
        assert row.document_lengths.min() >= 1 and real <= CONTEXT
        assert (row.tokens[real:] == stream.pad_id).all()
        assert (row.tokens[:real] != stream.pad_id).all()
        assert (row.labels[real:] == IGNORE_LABEL).all()
        assert (row.labels != IGNORE_LABEL).any()


def test_labels_are_the_next_token_and_never_cross_a_document(sources: dict[str, Path]) -> None:
    stream = make_stream(sources)
    corpora = {name: Corpus.open(path) for name, path in sources.items()}
    for index in range(80):
        row = stream.row(index)
        ends = np.cumsum(row.document_lengths)
        inside = np.flatnonzero(row.labels[:-1] != IGNORE_LABEL)
        assert (row.labels[inside] == row.tokens[inside + 1]).all()
        crossing = [end - 1 for end in ends if end < CONTEXT]
        assert (row.labels[crossing] == IGNORE_LABEL).all()
        for number, end in zip(row.documents, ends, strict=True):
            start = end - row.document_lengths[list(ends).index(end)]
            corpus = corpora[row.source]
            stored = corpus.sample(int(number))
            piece, labels = row.tokens[start:end], row.labels[start:end]
            if row.source == "chat":
                assert_chat_labels(stored.tokens, stored.supervised(), piece, labels)
            else:
                whole = stored.tokens.tolist()
                begin = find(whole, piece.tolist())
                expected = (whole + [IGNORE_LABEL])[begin + 1 : begin + len(piece) + 1]
                at_row_end = end == CONTEXT
                assert labels[:-1].tolist() == expected[:-1]
                assert labels[-1] == (expected[-1] if at_row_end else IGNORE_LABEL)


def assert_chat_labels(
    stored: np.ndarray, supervised: np.ndarray, piece: np.ndarray, labels: np.ndarray
) -> None:
    first_target = int(np.flatnonzero(supervised)[0])
    assert piece[:first_target].tolist() == stored[:first_target].tolist()
    assert (labels[: first_target - 1] == IGNORE_LABEL).all()
    assert (labels[first_target - 1 : -1] != IGNORE_LABEL).all()
    assert labels[-1] == IGNORE_LABEL


def find(whole: list[int], piece: list[int]) -> int:
    return next(i for i in range(len(whole)) if whole[i : i + len(piece)] == piece)


def test_conversations_are_never_cut_outside_their_reasoning(sources: dict[str, Path]) -> None:
    stream, tokenizer = make_stream(sources), load_tokenizer("bytes")
    corpus = Corpus.open(sources["chat"])
    for index in range(60):
        row = stream.row(index)
        if row.source != "chat":
            continue
        start = 0
        for number, length in zip(row.documents, row.document_lengths, strict=True):
            text = tokenizer.decode(row.tokens[start : start + length])
            start += length
            assert text.startswith(f"<|user|>question {number}?<|end|><|assistant|><think>")
            assert text.endswith(f"</think>{number}<|end|>")
            assert length == min(CONTEXT, corpus.lengths[number])


def test_rows_are_a_pure_function_of_the_index(sources: dict[str, Path]) -> None:
    stream = make_stream(sources)
    forward = [stream.row(index) for index in range(50)]
    again = make_stream(sources)
    for index in (49, 3, 17, 3, 0):
        assert same(again.row(index), forward[index])


def test_seed_changes_the_order(sources: dict[str, Path]) -> None:
    def documents(seed: int) -> list[list[int]]:
        phase = phase_config(CONTEXT, {"chat": 1.0})
        stream = PhaseStream(data_config(sources), "p", phase, seed)
        return [stream.row(index).documents.tolist() for index in range(20)]

    assert documents(0) != documents(1)


def test_an_epoch_holds_every_document_once(sources: dict[str, Path]) -> None:
    stream = PhaseStream(data_config(sources), "p", phase_config(CONTEXT, {"chat": 1.0}), 0)
    rows = stream.reports["chat"].rows
    for epoch in range(3):
        indices = range(epoch * rows, (epoch + 1) * rows)
        seen = Counter(d for index in indices for d in stream.row(index).documents.tolist())
        assert seen == dict.fromkeys(range(60), 1)
    assert stream.epochs(2 * rows) == {"chat": 2.0}


def test_an_epoch_of_text_holds_every_token_once(sources: dict[str, Path]) -> None:
    stream = PhaseStream(data_config(sources), "p", phase_config(CONTEXT, {"text": 1.0}), 0)
    rows = [stream.row(index) for index in range(stream.reports["text"].rows)]
    seen = Counter(t for row in rows for t in row.tokens[: row.document_lengths.sum()].tolist())
    stored = Corpus.open(sources["text"])
    assert seen == Counter(stored.token_file.read(0, stored.manifest.tokens).tolist())
    targets = sum(int((row.labels != IGNORE_LABEL).sum()) for row in rows)
    assert targets == stored.manifest.tokens - stored.manifest.documents


def test_mixture_is_exact(sources: dict[str, Path]) -> None:
    stream = make_stream(sources)
    drawn = Counter(stream.row(index).source for index in range(100))
    assert drawn == {"chat": 75, "text": 25} == stream.drawn(100)


def test_one_corpus_serves_every_context(sources: dict[str, Path]) -> None:
    lengths = Corpus.open(sources["chat"]).lengths
    for context in (64, 257, 4096):
        stream = PhaseStream(data_config(sources), "p", phase_config(context, {"chat": 1.0}), 0)
        report = stream.reports["chat"]
        assert report.whole == (lengths <= context).sum()
        assert report.whole + report.tail_cut + report.rejected == len(lengths)
        real = [int(stream.row(i).document_lengths.sum()) for i in range(report.rows)]
        assert sum(real) == report.tokens
        assert report.tokens + report.removed_tokens + report.dropped_tokens == lengths.sum()


def test_documents_per_row_are_capped(sources: dict[str, Path]) -> None:
    data = data_config(sources, max_documents_per_row=3)
    stream = PhaseStream(data, "p", phase_config(4096, {"chat": 1.0}), 0)
    assert max(len(stream.row(i).documents) for i in range(20)) == 3


def test_documents_without_a_target_are_left_out(
    bytes_tokenizer: Tokenizer, corpora: CorpusFactory, tmp_path: Path
) -> None:
    good, silent = encode_conversations(bytes_tokenizer, [problem("a"), problem("b")])
    assert isinstance(good, Sample) and isinstance(silent, Sample)
    silent.sections["supervised"] = 0
    with fill_corpus(tmp_path / "c", bytes_tokenizer, "chat", {}) as writer:
        writer.append(make_block([silent, good], bytes_tokenizer))
    stream = PhaseStream(data_config({"c": tmp_path / "c"}), "p", phase_config(64, {"c": 1}), 0)
    assert stream.row(0).documents.tolist() == [1]
    assert stream.reports["c"].unsupervised == 1


def test_unknown_source_is_named(sources: dict[str, Path]) -> None:
    phase = phase_config(CONTEXT, {"chat": 0.5, "absent": 0.5})
    with pytest.raises(DataError, match=r"plan\.phases\.p\.mixture: no source named absent"):
        PhaseStream(data_config(sources), "p", phase, 0)


def test_context_too_short_for_any_document_is_refused(corpora: CorpusFactory) -> None:
    path = corpora.chat("c", [problem("r", answer="x" * 200)])
    with pytest.raises(DataError, match="no row at context_tokens=64: none of 1 documents"):
        PhaseStream(data_config({"c": path}), "p", phase_config(64, {"c": 1.0}), 0)


def test_different_tokenizers_are_refused(corpora: CorpusFactory, tmp_path: Path) -> None:
    other = load_tokenizer("bytes")
    other.backend.add_special_tokens(["<|extra|>"])
    with fill_corpus(tmp_path / "other", other, "text", {}) as writer:
        writer.append(make_block(encode_texts(other, ["text"]), other))
    paths = {"a": corpora.text("a", ["text"]), "b": tmp_path / "other"}
    with pytest.raises(DataError, match=r"different tokenizers: 264 ids .* and 265 ids"):
        PhaseStream(data_config(paths), "p", phase_config(64, {"a": 1, "b": 1}), 0)


def test_validation_corpora_of_different_tokenizers_are_refused(
    corpora: CorpusFactory, tmp_path: Path
) -> None:
    other = load_tokenizer("bytes")
    other.backend.add_special_tokens(["<|extra|>"])
    with fill_corpus(tmp_path / "other", other, "text", {}) as writer:
        writer.append(make_block(encode_texts(other, ["text"]), other))
    data = data_config({}, {"v": corpora.text("v", ["text"]), "w": tmp_path / "other"})
    with pytest.raises(DataError, match=r"different tokenizers: 264 ids .* and 265 ids"):
        validation_rows(data, "p", 64)


def test_validation_rows_open_no_training_source(corpora: CorpusFactory, tmp_path: Path) -> None:
    """A source that no phase draws from may be missing."""
    data = data_config({"a": tmp_path / "missing"}, {"v": corpora.text("v", ["text"])})
    assert len(validation_rows(data, "p", 64)["v"]) == 1


def test_bad_token_id_on_disk_stops_the_row(sources: dict[str, Path]) -> None:
    file = sources["text"] / BIN
    file.write_bytes(b"\xff\xff" * (file.stat().st_size // 2))
    stream = PhaseStream(data_config(sources), "p", phase_config(CONTEXT, {"text": 1.0}), 0)
    with pytest.raises(DataError, match=f"{BIN}: offset .*token id 65535"):
        stream.row(0)


def test_validation_rows_are_fixed_and_limited(sources: dict[str, Path]) -> None:
    data = data_config(sources, {"held": sources["chat"]}, validation_sequences=5)
    first, again = (validation_rows(data, "p", CONTEXT)["held"] for _ in range(2))
    assert len(first) == 5 and all(map(same, first, again))
    assert len({int(d) for row in first for d in row.documents}) >= 5
    few = replace(data, validation_sequences=10_000)
    rows = validation_rows(few, "p", CONTEXT)["held"]
    assert sorted(d for row in rows for d in row.documents.tolist()) == list(range(60))


def test_validation_errors_name_the_phase(corpora: CorpusFactory) -> None:
    path = corpora.chat("c", [problem("r", answer="x" * 200)])
    with pytest.raises(DataError, match="phase tiny: validation source 'v'"):
        validation_rows(data_config({}, {"v": path}), "tiny", 64)


def test_reasoning_sections_exist_in_the_corpus(sources: dict[str, Path]) -> None:
    kinds = set(Corpus.open(sources["chat"]).section_block(0, 60)[0]["kind"].tolist())
    assert kinds == {Kind.PROMPT, Kind.REASONING, Kind.ANSWER, Kind.MARKUP}
