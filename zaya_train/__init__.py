"""zaya-train: the open training stack for ZAYA1-class language models on AMD GPUs."""

__version__ = "0.1.0"
