"""Average lengths of documents, as forecasts take them."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from zaya_train.data.lengths import mean_over_tokens


def test_an_average_token_stands_in_a_long_document() -> None:
    lengths = np.array([1, 3, 10], dtype=np.uint32)
    # Cut at 6: 1, 9 and 36 tokens' worth over 10 tokens, in one block and in several.
    assert mean_over_tokens(lengths, 6) == pytest.approx(4.6)
    assert mean_over_tokens(lengths, 6, block=2) == pytest.approx(4.6)
    assert mean_over_tokens(lengths[:0], 6) == 0.0
    # Squares of 32-bit lengths do not wrap.
    assert mean_over_tokens(np.array([100_000], dtype=np.uint32), 2**20) == 100_000


def test_no_copy_of_all_documents_is_made() -> None:
    lengths = np.ones(1 << 18, dtype=np.uint32)
    tracemalloc.start()
    mean_over_tokens(lengths, 6, block=1 << 10)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < lengths.nbytes / 10
