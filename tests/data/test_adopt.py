from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from rich.console import Console

from tests.helpers.tiny import tiny
from zaya_train.config.errors import DataError
from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.data.adopt import AdoptRequest, adopt
from zaya_train.data.check import check_corpora
from zaya_train.data.corpus import Corpus
from zaya_train.data.inspect import inspect_corpus
from zaya_train.data.stream import PhaseStream
from zaya_train.data.tokenizer import CHAT_TEMPLATE, load_tokenizer

from .builders import data_config, phase_config

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENTS = [list(range(10 + n, 40 + 3 * n)) for n in range(20)]


def megatron(folder: Path, documents: list[list[int]], sequences: int = 1) -> Path:
    """A corpus as Megatron's own builder writes it, documents of one or more sequences."""
    folder.mkdir(exist_ok=True)
    prefix = folder / "corpus"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        parts = np.array_split(np.array(document), sequences)
        builder.add_document(torch.tensor(document), [len(part) for part in parts])
    builder.finalize(f"{prefix}.idx")
    return prefix


def request(folder: Path, prefix: Path) -> AdoptRequest:
    return AdoptRequest(prefix=prefix, tokenizer="bytes", output=folder / "adopted")


def test_the_shipped_format_is_stored_whatever_the_tokenizer_came_with(tmp_path: Path) -> None:
    load_tokenizer("bytes").save(tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("{{ messages }}")
    asked = replace(request(tmp_path, megatron(tmp_path, DOCUMENTS)), tokenizer=str(tmp_path / "t"))
    template = adopt(asked).tokenizer.own_template
    assert template is not None and template.text == CHAT_TEMPLATE


@pytest.mark.parametrize("sequences", [1, 3])
def test_every_document_is_read_in_place_and_trains_on_every_token(
    tmp_path: Path, sequences: int
) -> None:
    prefix = megatron(tmp_path, DOCUMENTS, sequences)
    corpus = adopt(request(tmp_path, prefix))
    assert (corpus.path / "tokens.bin").resolve() == (tmp_path / "corpus.bin").resolve()
    assert [corpus.tokens(n).tolist() for n in range(len(corpus))] == DOCUMENTS
    assert corpus.lengths.tolist() == [len(document) for document in DOCUMENTS]
    assert corpus.sample(3).supervised().all()
    Corpus.open(corpus.path, verify="hashes")
    stream = PhaseStream(data_config({"t": corpus.path}), "p", phase_config(64, {"t": 1.0}), 0)
    rows = [stream.row(index) for index in range(stream.reports["t"].rows)]
    targets = sum(int((row.labels != IGNORE_LABEL).sum()) for row in rows)
    assert targets == sum(map(len, DOCUMENTS)) - len(DOCUMENTS)


def test_an_adopted_corpus_stands_in_a_plan_and_is_shown(tmp_path: Path) -> None:
    corpora = [
        adopt(request(tmp_path / name, megatron(tmp_path / name, documents)))
        for name, documents in (("a", DOCUMENTS), ("b", DOCUMENTS[1:]))
    ]
    sources = {corpus.path.parent.name: corpus.path for corpus in corpora}
    config = tiny()
    phases = {"p": phase_config(64, {"a": 0.5, "b": 0.5})}
    told = check_corpora(
        replace(
            config,
            plan=replace(config.plan, phases=phases),
            data=data_config(sources, {"v": sources["a"]}),
        )
    )
    assert told["a"] != told["b"]
    buffer = io.StringIO()
    inspect_corpus(sources["a"], 3, 20, Console(file=buffer, width=200))
    assert told["a"] in buffer.getvalue()


def test_ids_beyond_the_vocabulary_are_found_and_nothing_is_left(tmp_path: Path) -> None:
    prefix = megatron(tmp_path, [[5, 6], [7, 264]])
    with pytest.raises(DataError, match="offset 12: token id 264 outside the vocabulary of 264"):
        adopt(request(tmp_path, prefix))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"]


def test_missing_files_and_an_output_that_exists_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"corpus\.bin: missing"):
        adopt(request(tmp_path, tmp_path / "corpus"))
    prefix = megatron(tmp_path, DOCUMENTS)
    (tmp_path / "adopted").mkdir()
    with pytest.raises(DataError, match="exists; not replaced"):
        adopt(request(tmp_path, prefix))
