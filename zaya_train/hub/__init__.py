"""Hugging Face `zaya` import and export."""

from zaya_train.hub.convert import from_hf, to_hf, write_hf

__all__ = ["from_hf", "to_hf", "write_hf"]
