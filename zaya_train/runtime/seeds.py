"""Random number generators of one rank.

Data order and learning rate are pure functions of seed and step, so nothing here has to be saved in
a checkpoint; seeding only makes what is left (initialisation, sampling) repeatable.
"""

from __future__ import annotations

import random

import numpy as np
import torch


def derive_seed(seed: int, stream: int) -> int:
    """A 63-bit seed for the `stream`-th independent stream of `seed` (numpy's SeedSequence)."""
    word = np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]
    return int(word) >> 1


def seed_rank(seed: int, rank: int) -> None:
    """Seed Python, numpy and torch (CPU and every accelerator) with this rank's own stream."""
    mine = derive_seed(seed, rank)
    random.seed(mine)
    np.random.seed(mine % 2**32)
    torch.manual_seed(mine)
