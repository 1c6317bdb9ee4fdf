from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from zaya_train.config.errors import DataError
from zaya_train.data.chat import encode_conversations
from zaya_train.data.sections import Sample
from zaya_train.data.tokenizer import MARKERS, Tokenizer, load_tokenizer

from .builders import problem

if TYPE_CHECKING:
    from pathlib import Path

BYTES = load_tokenizer("bytes")


@given(st.text())
def test_bytes_are_utf8_bytes_after_the_markers(text: str) -> None:
    ids = BYTES.encode(text)
    assert ids == [byte + len(MARKERS) for byte in text.encode()]
    assert BYTES.decode(ids) == text


def test_marker_ids_are_fixed(bytes_tokenizer: Tokenizer) -> None:
    assert [bytes_tokenizer.marker_ids[marker] for marker in MARKERS] == list(range(8))
    assert (bytes_tokenizer.pad_id, bytes_tokenizer.end_id) == (0, 1)
    assert bytes_tokenizer.vocab_size == 264


def test_markers_in_plain_text_stay_text(bytes_tokenizer: Tokenizer) -> None:
    ids = bytes_tokenizer.encode("<think>a</think><|end|><|pad|>")
    assert min(ids) >= len(MARKERS)
    (batched,) = bytes_tokenizer.encode_batch(["<|user|>"])
    assert batched.tolist() == bytes_tokenizer.encode("<|user|>")


def test_markup_that_cannot_be_encoded_leaves_plain_text_plain() -> None:
    tokenizer = load_tokenizer("bytes")
    with pytest.raises((TypeError, UnicodeEncodeError)):
        tokenizer.markup_ids("\ud800")
    assert min(tokenizer.encode("<|end|>")) >= len(MARKERS)


def test_auto_tokenizer_gives_the_same_ids(bytes_tokenizer: Tokenizer, tmp_path: Path) -> None:
    bytes_tokenizer.save(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(str(tmp_path))
    for text in ("", "plain", "caf\u00e9 \u6f22\u5b57 \U0001f600\n\t  end ", "a , b . c !"):
        assert reloaded(text)["input_ids"] == bytes_tokenizer.encode(text)
        assert reloaded.decode(bytes_tokenizer.encode(text)) == text
    assert (reloaded.pad_token_id, reloaded.eos_token_id) == (0, 1)
    assert len(reloaded) == bytes_tokenizer.vocab_size


def test_chat_template_renders_what_training_sees(
    bytes_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    bytes_tokenizer.save(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(str(tmp_path))
    messages = [{"role": "system", "content": "Be brief."}, *problem("two and two\n")]
    (sample,) = encode_conversations(bytes_tokenizer, [messages])
    assert isinstance(sample, Sample)
    rendered = reloaded.apply_chat_template(messages, return_dict=False)
    assert rendered == sample.tokens.tolist()
    prompt = reloaded.apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    assert rendered[: len(prompt)] == prompt
    opening = reloaded.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=False
    )
    assert str(opening).endswith("2+2?<|end|><|assistant|>")


def test_saved_folder_and_file_reload_as_the_same_tokenizer(tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(spec)).sha256 == BYTES.sha256


def test_foreign_tokenizer_receives_the_missing_markers(tmp_path: Path) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<think>"], show_progress=False)
    backend.train_from_iterator(["the cat sat on the mat"] * 9, trainer)
    own_ids = backend.get_vocab_size()
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.marker_ids["<think>"] == 0
    assert tokenizer.vocab_size == own_ids + len(MARKERS) - 1
    assert len(set(tokenizer.marker_ids.values())) == len(MARKERS)
    assert tokenizer.encode("the cat") == backend.encode("the cat").ids


@pytest.mark.parametrize("spec", ["./absent.json", "absent/tokenizer.json", "/absent/folder", ""])
def test_missing_path_names_spec_and_what_is_accepted(spec: str) -> None:
    with pytest.raises(DataError, match=r"no such file or folder; accepted: 'bytes'") as caught:
        load_tokenizer(spec)
    assert repr(spec) in str(caught.value)


def test_unknown_hub_name_is_one_line() -> None:
    # A process of its own, because the hub client reads this variable when it is imported.
    program = (
        "import os, sys; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "from zaya_train.data.tokenizer import load_tokenizer, DataError\n"
        "try: load_tokenizer('nobody/nothing')\n"
        "except DataError as error: sys.exit(str(error))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "'nobody/nothing'" in last and "a hub name" in last


@pytest.mark.parametrize("content", ["", "not json", "[]", json.dumps({"model": 3})])
def test_malformed_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(content)
    with pytest.raises(DataError, match="not a tokenizer") as caught:
        load_tokenizer(str(file))
    assert str(file) in str(caught.value)
