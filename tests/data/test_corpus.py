from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from transformers import AutoTokenizer

from zaya_train.config.errors import DataError
from zaya_train.data.chat import encode_conversations, encode_texts
from zaya_train.data.corpus import BIN, IDX, MANIFEST, OFFSETS, SECTIONS, Corpus
from zaya_train.data.corpus_writer import fill_corpus, make_block
from zaya_train.data.sections import Kind, Rejected, Role, Sample, make_sections
from zaya_train.data.token_index import token_dtype, write_index

from .builders import CorpusFactory, problem, problems

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from zaya_train.data.tokenizer import Tokenizer


def test_documents_and_sections_come_back(
    corpora: CorpusFactory, bytes_tokenizer: Tokenizer
) -> None:
    conversations = problems(20)
    corpus = Corpus.open(corpora.chat("c", conversations), verify="hashes")
    assert len(corpus) == 20 and corpus.manifest.kind == "chat"
    for number, written in enumerate(encode_conversations(bytes_tokenizer, conversations)):
        assert isinstance(written, Sample)
        read = corpus.sample(number)
        assert read.tokens.tolist() == written.tokens.tolist()
        assert (read.sections == written.sections).all()
        assert corpus.lengths[number] == len(written.tokens)
        assert corpus.supervised_tokens[number] == written.supervised().sum()
    assert corpus.manifest.tokens == corpus.lengths.sum()
    assert corpus.manifest.supervised_tokens == corpus.supervised_tokens.sum()
    assert corpus.tokenizer.sha256 == corpus.manifest.tokenizer_sha256


def test_megatron_core_reads_it(corpora: CorpusFactory) -> None:
    path = corpora.chat("c", problems(7))
    corpus = Corpus.open(path)
    dataset = IndexedDataset(str(path / "tokens"))
    assert len(dataset) == 7 and dataset.document_indices.tolist() == list(range(8))
    for number in range(7):
        assert dataset[number].tolist() == corpus.tokens(number).tolist()


def test_tokenizer_inside_loads_with_transformers(corpora: CorpusFactory) -> None:
    path = corpora.text("t", ["abc"])
    reloaded = AutoTokenizer.from_pretrained(str(path / "tokenizer"))
    assert reloaded("abc")["input_ids"] == Corpus.open(path).tokens(0).tolist()[:-1]


def test_rejects_are_counted_by_reason(corpora: CorpusFactory) -> None:
    bad = problem("x")[:1] + [{"role": "assistant", "content": "<think>open"}]
    corpus = corpora.open_chat("c", [problem("a"), bad, bad, []])
    assert corpus.manifest.documents == 1
    assert corpus.manifest.rejects == {"no_messages": 1, "think_not_closed": 2}


@pytest.mark.parametrize("bad", [264, -1])
def test_token_beyond_the_vocabulary_is_not_written(
    bytes_tokenizer: Tokenizer, tmp_path: Path, bad: int
) -> None:
    sections = make_sections([(2, Role.TEXT, Kind.TEXT, 0, True)])
    with (
        pytest.raises(DataError, match=f"^token id {bad} outside the vocabulary of 264"),
        fill_corpus(tmp_path / "c", bytes_tokenizer, "text", {}) as writer,
    ):
        samples = [Sample(np.array([first, 0]), sections) for first in (263, bad)]
        writer.append(make_block(samples, bytes_tokenizer))
    assert not (tmp_path / "c" / MANIFEST).exists()


def poke(file: Path, offset: int, content: bytes) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def test_token_beyond_the_vocabulary_is_found_with_its_offset(corpora: CorpusFactory) -> None:
    path = corpora.text("t", ["abcdef", "ghi"])
    poke(path / BIN, 2 * 8, (9999).to_bytes(2, "little"))
    rule = f"{BIN}: offset 16: token id 9999 outside the vocabulary of 264"
    with pytest.raises(DataError, match=rule):
        Corpus.open(path, verify="tokens")
    corpus = Corpus.open(path)
    assert len(corpus.tokens(0)) == 7
    with pytest.raises(DataError, match=rule):
        corpus.tokens(1)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bad magic": (lambda p: poke(p / IDX, 0, b"X"), f"{IDX}: offset 0: .*bad magic"),
    "short index": (lambda p: cut(p / IDX, 3), f"{IDX}: .* truncated"),
    "no header": (lambda p: (p / IDX).write_bytes(b"MM"), f"{IDX}: offset 0"),
    "no index": (lambda p: (p / IDX).unlink(), f"{IDX}: missing"),
    "index version": (lambda p: poke(p / IDX, 9, b"\x07"), f"{IDX}: offset 9: version 7"),
    "short tokens": (lambda p: cut(p / BIN, 2), f"{BIN}: .* bytes, .* expected by"),
    "no tokens": (lambda p: (p / BIN).unlink(), f"{BIN}: missing"),
    "short sections": (lambda p: cut(p / SECTIONS, 1), f"{SECTIONS}: .* expected by"),
    "short offsets": (lambda p: cut(p / OFFSETS, 8), f"{OFFSETS}: .* expected by"),
    "no manifest": (lambda p: (p / MANIFEST).unlink(), "not a corpus directory"),
    "broken manifest": (lambda p: (p / MANIFEST).write_text("{"), "not valid JSON"),
    "no corpus": (lambda p: shutil.rmtree(p), "not a corpus directory"),
}


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:-size])


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(corpora: CorpusFactory, damage: str) -> None:
    path = corpora.chat("c", problems(5))
    do, message = DAMAGES[damage]
    do(path)
    with pytest.raises(DataError, match=message):
        Corpus.open(path)


def test_other_corpus_under_the_index_is_noticed(corpora: CorpusFactory) -> None:
    path, other = corpora.text("a", ["abc", "de"]), corpora.text("b", ["a", "b", "c"])
    for name in (BIN, IDX):
        shutil.copy(other / name, path / name)
    with pytest.raises(DataError, match="the manifest says 2 and 7"):
        Corpus.open(path)


def test_changed_content_fails_its_hash(corpora: CorpusFactory) -> None:
    path = corpora.text("t", ["abcdef"])
    poke(path / BIN, 0, (70).to_bytes(2, "little"))
    Corpus.open(path, verify="tokens")
    with pytest.raises(DataError, match=f"{BIN}: content differs"):
        Corpus.open(path, verify="hashes")


def test_unknown_format_version_is_refused(corpora: CorpusFactory) -> None:
    path = corpora.text("t", ["abc"])
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(DataError, match="format version 99, this program reads 1"):
        Corpus.open(path)


def test_rejected_samples_never_reach_the_files(bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with fill_corpus(tmp_path / "c", bytes_tokenizer, "text", {}) as writer:
        writer.append(make_block(encode_texts(bytes_tokenizer, ["", "kept", " "]), bytes_tokenizer))
        assert writer.documents == 1
        assert writer.rejects == {"empty_text": 2}
    assert not isinstance(Corpus.open(tmp_path / "c").sample(0), Rejected)


@pytest.mark.parametrize("texts", [["abc"], ["abc", "", "de", "x" * 9]])
@pytest.mark.parametrize("vocab_size", [264, 65_499, 65_500, 131_072])
def test_tokens_and_index_are_what_megatron_core_writes(
    tmp_path: Path, texts: list[str], vocab_size: int
) -> None:
    dtype = token_dtype(vocab_size)
    assert dtype == DType.optimal_dtype(vocab_size)
    documents = [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
    builder = IndexedDatasetBuilder(str(tmp_path / "their.bin"), dtype=dtype.type)
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "their.idx"))
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    write_index(tmp_path / "our.idx", dtype, lengths)
    assert (tmp_path / "our.idx").read_bytes() == (tmp_path / "their.idx").read_bytes()
    tokens = np.concatenate(documents).astype(dtype).tobytes()
    assert tokens == (tmp_path / "their.bin").read_bytes()
