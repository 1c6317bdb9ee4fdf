"""The real sets of ../shared/data through the whole data path."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.helpers.paths import shared_data
from zaya_train.config.labels import IGNORE_LABEL
from zaya_train.data.chat import encode_conversations
from zaya_train.data.corpus import Corpus
from zaya_train.data.prepare import PrepareRequest, prepare
from zaya_train.data.sections import Kind, Rejected, RejectReason, Sample
from zaya_train.data.stream import PhaseStream
from zaya_train.data.trim import Trimmed, TrimRule, trim

from .builders import data_config, phase_config

if TYPE_CHECKING:
    from pathlib import Path

    from zaya_train.data.tokenizer import Tokenizer

BUDGETS = (256, 1024, 4096, 4097, 32_768, 131_072)


def samples(name: str, tokenizer: Tokenizer) -> list[Sample | Rejected]:
    rows = [json.loads(line) for line in shared_data(name).read_text().splitlines()]
    return encode_conversations(tokenizer, [row["messages"] for row in rows])


@pytest.mark.parametrize("name", ["reasoning_traces.jsonl", "multiturn_think.jsonl"])
def test_answers_survive_every_budget(name: str, bytes_tokenizer: Tokenizer) -> None:
    rules: set[str] = set()
    for sample in samples(name, bytes_tokenizer)[::5]:
        assert isinstance(sample, Sample), sample
        answer_start = int(sample.sections[sample.sections["kind"] == Kind.ANSWER]["start"][-1])
        answer = sample.tokens[answer_start:].tolist()
        reasoning = sample.sections[sample.sections["kind"] == Kind.REASONING][-1]
        last_tokens, total = int(reasoning["end"] - reasoning["start"]), len(sample.tokens)
        for budget in (*BUDGETS, total - 1, total - last_tokens, total - last_tokens - 1):
            outcome = trim(sample, budget)
            rules.add("rejected" if isinstance(outcome, Rejected) else outcome.rule)
            if not isinstance(outcome, Trimmed):
                continue
            kept = outcome.tokens(sample).tolist()
            assert kept[-len(answer) :] == answer
            assert len(kept) <= budget
            assert outcome.rule != TrimRule.TAIL_CUT or len(kept) == budget
    wanted = {"rejected", TrimRule.WHOLE, TrimRule.TAIL_CUT}
    assert wanted | ({TrimRule.EARLIER_DROPPED} if "multi" in name else set()) == rules


def test_malformed_traces_are_all_rejected(bytes_tokenizer: Tokenizer) -> None:
    outcomes = samples("reasoning_traces_malformed.jsonl", bytes_tokenizer)
    assert len(outcomes) == 23
    reasons = [outcome.reason for outcome in outcomes if isinstance(outcome, Rejected)]
    assert reasons.count(RejectReason.THINK_NOT_CLOSED) == 22
    assert reasons.count(RejectReason.THINK_NOT_OPENED) == 1


def test_gsm8k_steps_become_reasoning(tmp_path: Path, bytes_tokenizer: Tokenizer) -> None:
    lines = shared_data("gsm8k_train.jsonl").read_text().splitlines()[:600]
    (tmp_path / "gsm8k.jsonl").write_text("\n".join(lines))
    request = PrepareRequest(
        input=str(tmp_path / "gsm8k.jsonl"), output=tmp_path / "out", heldout_fraction=0.05
    )
    out = prepare(request)
    corpus = Corpus.open(out / "train", verify="hashes")
    assert len(corpus) == 570 and corpus.manifest.rejects == {}
    for row in map(json.loads, (out / "heldout.jsonl").read_text().splitlines()):
        assert row["answer"].replace(",", "").replace("-", "").replace(".", "").isdigit()
        assert "#### " not in row["messages"][-1]["content"]
    text = bytes_tokenizer.decode(corpus.tokens(0))
    assert text.count("<think>") == text.count("</think>") == 1


@pytest.mark.parametrize("name", ["moby_dick.txt", "tinyshakespeare.txt", "code_torchtitan.jsonl"])
def test_text_trains_on_every_token_once(tmp_path: Path, name: str) -> None:
    out = prepare(PrepareRequest(input=str(shared_data(name)), output=tmp_path / "out"))
    corpus = Corpus.open(out / "train")
    phase = phase_config(4096, {"text": 1.0})
    stream = PhaseStream(data_config({"text": out / "train"}), "p", phase, 0)
    report = stream.reports["text"]
    rows = [stream.row(index) for index in range(report.rows)]
    targets = sum(int((row.labels != IGNORE_LABEL).sum()) for row in rows)
    assert targets == corpus.manifest.tokens - len(corpus)
    assert report.utilisation > 0.99


def test_traces_pack_tightly(tmp_path: Path) -> None:
    source = shared_data("reasoning_traces.jsonl")
    out = prepare(PrepareRequest(input=str(source), output=tmp_path / "out"))
    for context in (4096, 32_768):
        phase = phase_config(context, {"traces": 1.0})
        stream = PhaseStream(data_config({"traces": out / "train"}), "p", phase, 0)
        report = stream.reports["traces"]
        lower_bound = -(-report.tokens // context)
        assert report.rows <= lower_bound * 1.03
        lengths = np.concatenate([stream.row(i).document_lengths for i in range(20)])
        assert lengths.max() <= context
