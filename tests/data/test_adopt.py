from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from zaya_train.config.errors import DataError
from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.data.adopt import AdoptRequest, adopt
from zaya_train.data.corpus import Corpus
from zaya_train.data.stream import PhaseStream

from .builders import data_config, phase_config

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENTS = [list(range(10 + n, 40 + 3 * n)) for n in range(20)]


def megatron(folder: Path, documents: list[list[int]], sequences: int = 1) -> Path:
    """A corpus as Megatron's own builder writes it, documents of one or more sequences."""
    prefix = folder / "corpus"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        parts = np.array_split(np.array(document), sequences)
        builder.add_document(torch.tensor(document), [len(part) for part in parts])
    builder.finalize(f"{prefix}.idx")
    return prefix


def request(folder: Path, prefix: Path) -> AdoptRequest:
    return AdoptRequest(prefix=prefix, tokenizer="bytes", output=folder / "adopted")


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
