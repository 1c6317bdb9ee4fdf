"""Hot operations of ZAYA models: one folder per op with a readable reference and its back ends."""
