"""Student's paired t-test for a few seeds, and what so few could find: no more of statistics than the tables need."""

from __future__ import annotations

import math
import statistics
from functools import cache

import numpy as np

LEVEL = 0.05  # a difference counts where chance alone would give one as large less often, in either direction
POWER = 0.8


def p_value(differences: list[float]) -> float:
    """Two-sided p of the hypothesis that paired differences have the mean 0; 1 where fewer than two say nothing."""
    if len(differences) < 2:
        return 1.0
    mean, deviation = statistics.mean(differences), statistics.stdev(differences)
    if deviation == 0:
        return float(mean == 0)
    return tail(mean / (deviation / math.sqrt(len(differences))), len(differences) - 1)


def tail(t: float, degrees: int) -> float:
    """P(|T| > |t|) of Student's distribution (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(abs(t) / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    within = math.sin(angle) * total
    return 1 - (2 / math.pi * (angle + within) if odd else within)


@cache
def detectable(pairs: int) -> float:
    """The true difference, in standard deviations of the differences, that the test finds with probability POWER.

    By simulation, with an error of about 1 %.
    """
    random = np.random.default_rng(0)
    noise, degrees = random.standard_normal(100_000), pairs - 1
    scale = np.sqrt(random.chisquare(degrees, len(noise)) / degrees)
    bound = _bisect(lambda t: tail(t, degrees) < LEVEL, 100.0)

    def found(difference: float) -> bool:
        return bool((np.abs(noise + difference * math.sqrt(pairs)) > bound * scale).mean() > POWER)

    return _bisect(found, 100.0)


def pairs_needed(difference: float, deviation: float) -> float:
    """About how many pairs find a true difference with probability POWER: normal quantiles, with Guenther's correction.

    It is exact to one pair from about 5 pairs on, and a little low below.
    """
    if difference == 0:
        return math.inf
    level, power = (statistics.NormalDist().inv_cdf(p) for p in (1 - LEVEL / 2, POWER))
    return max(3, math.ceil(((level + power) * deviation / difference) ** 2 + level**2 / 2))


def _bisect(holds, high: float, low: float = 0.0) -> float:
    """Where a condition begins to hold."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
