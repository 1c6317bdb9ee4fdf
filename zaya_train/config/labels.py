"""What data, model and loss agree on about labels."""

from __future__ import annotations

IGNORE_LABEL = -100
"""Label of a token that nothing is to be predicted for (torch's `ignore_index` by default)."""
