"""The seed of what is random in a step: a function of (seed, step, rank), so that resuming draws the same numbers."""

from __future__ import annotations

import numpy as np


def step_seed(seed: int, step: int, rank: int) -> int:
    """A number of 64 bits, by NumPy's `SeedSequence`, whose values are promised to stay the same between versions."""
    return int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0])
