"""A Megatron corpus from adoption to a finished run whose ledger holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.integration.runs import Launched, last_step, make_corpora, overrides_for, values_for
from tests.integration.runs import zaya as command
from zaya_train.data.adopt import AdoptRequest, adopt

if TYPE_CHECKING:
    from pathlib import Path


def test_an_adopted_corpus_is_trained_on_evaluated_and_verified(tmp_path: Path) -> None:
    corpora = make_corpora(tmp_path / "prepared")
    paths = {}
    for split in ("train", "heldout"):
        prefix = corpora / split / "train" / "tokens"
        corpus = adopt(AdoptRequest(prefix=prefix, tokenizer="bytes", output=tmp_path / split))
        paths[split] = str(corpus.path)
    changes = {
        "data.sources.problems.path": paths["train"],
        "data.validation.problems.path": paths["heldout"],
        "parallel.context_parallel_limit": 1,
    }
    words = overrides_for(values_for(tmp_path / "run", corpora, changes))
    run = Launched(words, tmp_path / "logs")
    assert run.wait() == [0], run.output()
    assert last_step(tmp_path / "run") == 13
    log = tmp_path / "verify.out"
    assert command(["data", "ledger", "verify", str(tmp_path / "run")], log) == 0, log.read_text()
