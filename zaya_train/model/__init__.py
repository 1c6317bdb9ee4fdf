"""Single-device ZAYA model."""

from zaya_train.model.init import initialise
from zaya_train.model.layout import SequenceLayout
from zaya_train.model.zaya import ModelOutput, ZayaModel

__all__ = ["ModelOutput", "SequenceLayout", "ZayaModel", "initialise"]
