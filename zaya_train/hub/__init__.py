"""Hugging Face `zaya` import and export."""

from zaya_train.hub.convert import Form, from_hf, to_hf, write_hf

__all__ = ["Form", "from_hf", "to_hf", "write_hf"]
