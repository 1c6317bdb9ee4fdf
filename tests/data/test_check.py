"""The corpora of a whole plan, compared before anything starts."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from transformers import AutoTokenizer

from tests.helpers.tiny import tiny
from zaya_train.config.errors import ConfigError, DataError
from zaya_train.data.chat import encode_texts
from zaya_train.data.check import check_corpora, keep_tokenizer
from zaya_train.data.corpus import Corpus
from zaya_train.data.corpus_writer import fill_corpus, make_block
from zaya_train.data.sections import Sample
from zaya_train.data.stream import PhaseStream
from zaya_train.data.tokenizer import (
    CHAT_TEMPLATE,
    TemplateSource,
    Tokenizer,
    load_tokenizer,
)

from .builders import CorpusFactory, data_config, phase_config, problem

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from zaya_train.config.schema import TrainConfig


def plan(
    phases: Mapping[str, Mapping[str, float]],
    sources: Mapping[str, Path],
    validation: Mapping[str, Path] | None = None,
) -> TrainConfig:
    """A run of the given mixtures."""
    config = tiny()
    rows = {name: phase_config(64, mixture) for name, mixture in phases.items()}
    return replace(
        config,
        plan=replace(config.plan, phases=rows),
        data=data_config(sources, validation),
    )


def write(path: Path, tokenizer: Tokenizer) -> Path:
    with fill_corpus(path, tokenizer, "text", {}) as writer:
        writer.append(make_block(encode_texts(tokenizer, ["text"]), tokenizer))
    return path


@pytest.fixture
def other(tmp_path: Path, bytes_tokenizer: Tokenizer) -> Path:
    """A corpus of another tokenizer with as many ids: two bytes have changed places."""
    spec = bytes_tokenizer.backend.to_str()
    swapped = re.sub(r'"([ab])":', lambda m: '"b":' if m[1] == "a" else '"a":', spec)
    assert swapped != spec
    (tmp_path / "tokenizer.json").write_text(swapped, encoding="utf-8")
    path = write(tmp_path / "other", load_tokenizer(str(tmp_path / "tokenizer.json")))
    assert Corpus.open(path).manifest.vocab_size == bytes_tokenizer.vocab_size
    return path


def test_phases_of_different_tokenizers_are_refused(corpora: CorpusFactory, other: Path) -> None:
    sources = {"a": corpora.text("a", ["text"]), "b": other}
    phases = {"one": {"a": 1.0}, "two": {"b": 1.0}}
    message = r"data\.sources\.a \(.*/a\) and data\.sources\.b \(.*/other\) have different tok"
    with pytest.raises(DataError, match=message):
        check_corpora(plan(phases, sources))
    check_corpora(plan({"one": {"a": 1.0}, "two": {"a": 1.0}}, sources))
    check_corpora(plan({"two": {"b": 1.0}}, sources))


def test_validation_of_another_tokenizer_is_refused(corpora: CorpusFactory, other: Path) -> None:
    sources = {"a": corpora.text("a", ["text"])}
    with pytest.raises(DataError, match=r"data\.sources\.a .* and data\.validation\.v .*different"):
        check_corpora(plan({"one": {"a": 1.0}}, sources, {"v": other}))
    check_corpora(plan({"one": {"a": 1.0}}, sources, {"v": sources["a"]}))


OWN = TemplateSource("own", "{{ messages }}", (("eos_token", "</s>"),))


def own_chat(corpora: CorpusFactory, source: TemplateSource = OWN) -> Path:
    """A corpus of conversations in a template of the tokenizer's own."""
    own = replace(corpora, tokenizer=replace(corpora.tokenizer, own_template=source))
    return own.chat("own", [problem("r")])


@pytest.mark.parametrize("text", [OWN.text, CHAT_TEMPLATE])
def test_conversations_in_different_templates_are_refused(
    corpora: CorpusFactory, text: str
) -> None:
    """Also where they differ in the tokens alone that a template may name."""
    sources = {
        "a": corpora.chat("a", [problem("r")]),
        "o": own_chat(corpora, replace(OWN, text=text)),
    }
    sources["t"] = corpora.text("t", ["text"])
    message = r"a \(.*/a\) and .*o \(.*/own\) hold conversations in different chat templates"
    with pytest.raises(DataError, match=message):
        check_corpora(plan({"one": {"a": 1.0}, "two": {"o": 1.0}}, sources))
    with pytest.raises(DataError, match=message):
        check_corpora(plan({"one": {"a": 1.0}}, sources, {"o": sources["o"]}))
    mixed = phase_config(64, {"a": 1.0, "o": 1.0})
    with pytest.raises(DataError, match=message):
        PhaseStream(data_config(sources), "one", mixed, 0)
    check_corpora(plan({"one": {"t": 1.0}, "two": {"t": 1.0, "o": 1.0}}, sources))


def test_the_tokenizer_that_is_kept_is_that_of_conversations(
    corpora: CorpusFactory, tmp_path: Path
) -> None:
    sources = {"a": corpora.text("a", ["text"]), "o": own_chat(corpora)}
    text, both = {"one": {"a": 1.0}}, {"one": {"a": 1.0}, "two": {"a": 0.5, "o": 0.5}}
    for name in ("at once", "later"):
        kept = tmp_path / name
        if name == "later":
            keep_tokenizer(plan(text, sources), kept)
            assert load_tokenizer(str(kept)).own_template != Corpus.open(sources["o"]).template
        keep_tokenizer(plan(both, sources), kept)
        stored = AutoTokenizer.from_pretrained(str(kept))
        assert (stored.chat_template, stored.eos_token) == (OWN.text, "</s>")
        (kept / "mark").write_text("")
        keep_tokenizer(plan(both, sources), kept)
        assert (kept / "mark").exists()


def test_a_source_without_weight_is_not_opened(corpora: CorpusFactory, tmp_path: Path) -> None:
    sources = {"a": tmp_path / "missing", "b": corpora.text("b", ["text"])}
    check_corpora(plan({"one": {"a": 0.0, "b": 1.0}}, sources, {"v": sources["b"]}))
    with pytest.raises(DataError, match="missing"):
        check_corpora(plan({"one": {"a": 0.1, "b": 1.0}}, sources))


def test_a_tokenizer_larger_than_the_model_is_refused(corpora: CorpusFactory) -> None:
    config = plan({"one": {"a": 1.0}}, {"a": corpora.text("a", ["text"])})
    small = replace(config, model=replace(config.model, vocab_size=263))
    with pytest.raises(ConfigError, match=r"263 is smaller than the 264 .* data\.sources\.a"):
        check_corpora(small)


def test_the_content_of_every_source_drawn_from_is_told(
    corpora: CorpusFactory, bytes_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    whole, silent = encode_texts(bytes_tokenizer, ["same text", "same text"])
    assert isinstance(silent, Sample)
    silent.sections["supervised"] = 0
    for name, sample in (("masked", silent), ("copy", whole)):
        with fill_corpus(tmp_path / name, bytes_tokenizer, "text", {"name": name}) as writer:
            writer.append(make_block([sample], bytes_tokenizer))
    sources = {"a": corpora.text("a", ["same text"]), "b": tmp_path / "masked"}
    sources |= {"c": tmp_path / "copy", "d": corpora.text("d", ["other text"])}
    told = check_corpora(plan({"one": {"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.0}}, sources))
    assert told.keys() == {"a", "b", "c"}
    # Equal tokens of which other ones are trained on are other content; names are not content.
    assert told["a"] == told["c"] != told["b"]
