"""A fast encoder gives the ids of `tokenizers`, or the preparation says where it does not."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tokenizers
from rich.console import Console
from tokenizers import decoders, models, pre_tokenizers, trainers

from zaya_train.config.errors import DataError
from zaya_train.data import encoding
from zaya_train.data.corpus import BIN, IDX, SECTIONS, read_manifest
from zaya_train.data.fast_encoder import GIGATOKEN, FastEncoder, encoder_version, fast_tokenizer
from zaya_train.data.prepare import PrepareRequest, prepare
from zaya_train.data.tokenizer import Tokenizer, load_tokenizer

from .builders import problems

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

NEEDS = "gigatoken is an optional dependency: pip install 'zaya-train[fast]'"
SENTENCES = [
    f"The {n}th of {n * n} numbers, {n / 7:.3f}; isn't it?\n\tx = [{n}, 'a'] # ok"
    for n in range(60)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with GPT-2's splitting, trained here."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, show_progress=False, special_tokens=["<s>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(SENTENCES, trainer)
    path = tmp_path_factory.mktemp("bpe")
    backend.save(str(path / "tokenizer.json"))
    return path


def wrong_at(tokenizer: Tokenizer, needle: str) -> Tokenizer:
    """An encoder whose ids of a text with `needle` in it are a little wrong."""

    def encode(text: str) -> NDArray[np.uint32]:
        ids = np.array(tokenizer.encode(text), dtype=np.uint32)
        if needle in text:
            ids[-1] += 1
        return ids

    return replace(tokenizer, fast=FastEncoder(encode))


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def request(tmp_path: Path, folder: Path, name: str, **settings: object) -> PrepareRequest:
    made = PrepareRequest(
        input=str(tmp_path / "x.jsonl"), output=tmp_path / name, tokenizer=str(folder)
    )
    return replace(made, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [1, 2])
def test_same_corpus_as_with_tokenizers(tmp_path: Path, folder: Path, workers: int) -> None:
    pytest.importorskip("gigatoken", reason=NEEDS)
    rows = problems(150)
    rows[7][0]["content"] = "na\u00efve \u4f60\u597d <s> <think> <|end|> \U0001f600\r\n  "
    text = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (tmp_path / "x.jsonl").write_text(text)
    console = Console(width=1000, record=True)
    prepare(request(tmp_path, folder, "plain"))
    prepare(request(tmp_path, folder, "fast", encoder="gigatoken", workers=workers), console)
    for name in (BIN, IDX, SECTIONS):
        fast = (tmp_path / "fast" / "train" / name).read_bytes()
        assert fast == (tmp_path / "plain" / "train" / name).read_bytes(), name
    about = read_manifest(tmp_path / "fast" / "train").source["encoder"]
    name = encoder_version(GIGATOKEN)
    assert about == {"name": name, "compared_documents": 10} and name.startswith("gigatoken ")
    assert f"ids by {name}, 10 documents compared" in console.export_text()


def test_a_wrong_encoder_is_found_at_a_character_that_is_new(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [*SENTENCES]
    texts[37] += " caf\u00e9"
    write_texts(tmp_path / "x.jsonl", texts)
    wrong = wrong_at(load_tokenizer(str(folder)), "\u00e9")
    monkeypatch.setattr(encoding, "fast_tokenizer", lambda _: wrong)
    monkeypatch.setattr("zaya_train.data.prepare.fast_tokenizer", lambda _: wrong)
    with pytest.raises(DataError, match=r"x\.jsonl:38: gigatoken differs from tokenizers at token"):
        prepare(request(tmp_path, folder, "out", encoder="gigatoken"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("every", "found"), [(1, True), (16, False), (4, True)])
def test_every_so_manieth_document_is_compared_whole(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    every: int,
    found: bool,
) -> None:
    write_texts(tmp_path / "x.jsonl", SENTENCES)
    wrong = wrong_at(load_tokenizer(str(folder)), "The 20th")
    monkeypatch.setattr(encoding, "fast_tokenizer", lambda _: wrong)
    monkeypatch.setattr("zaya_train.data.prepare.fast_tokenizer", lambda _: wrong)
    monkeypatch.setattr("zaya_train.data.prepare.encoder_version", str)
    asked = request(tmp_path, folder, "out", encoder="gigatoken", compare_every=every)
    if found:
        with pytest.raises(DataError, match=r"x\.jsonl:21: gigatoken differs"):
            prepare(asked)
        return
    prepare(asked)
    about = read_manifest(tmp_path / "out" / "train").source["encoder"]
    assert about["compared_documents"] == 4


def test_a_tokenizer_that_gigatoken_cannot_read_is_refused_with_the_reason(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken", reason=NEEDS)
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        DataError, match=r"gigatoken: cannot stand in for tokenizer .*tokenizers can"
    ):
        fast_tokenizer(load_tokenizer(str(tmp_path)))


def test_missing_gigatoken_is_named_before_anything_is_written(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_texts(tmp_path / "x.jsonl", SENTENCES)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(DataError, match=r"gigatoken: not installed \(pip install"):
        prepare(request(tmp_path, folder, "out", encoder="gigatoken"))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.shards").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoder": "tiktoken"}, "encoder is 'tiktoken', expected one of tokenizers, gigatoken"),
        ({"compare_every": 0}, "compare_every is 0, expected >= 1"),
    ],
)
def test_settings_without_meaning(
    tmp_path: Path, folder: Path, settings: dict[str, object], message: str
) -> None:
    write_texts(tmp_path / "x.jsonl", SENTENCES)
    with pytest.raises(DataError, match=message):
        prepare(request(tmp_path, folder, "out", **settings))
