from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from zaya_train.data.tokenizer import Tokenizer, load_tokenizer

from .builders import CorpusFactory

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    return load_tokenizer("bytes")


@pytest.fixture
def corpora(tmp_path: Path, bytes_tokenizer: Tokenizer) -> CorpusFactory:
    return CorpusFactory(tmp_path, bytes_tokenizer)
