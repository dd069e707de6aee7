"""Intervals and prices for few prompts and few seeds, with the coverage and the bias that simulation gave them.

Coverages are of 95 % intervals; tests/test_statistics.py measures them again. Legend: P prompts, R seeds, E evaluations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import special
from scipy.optimize import isotonic_regression

CONFIDENCE = 0.95
FEW = 16  # prompts; with fewer, a skewed measure's interval covers 93 % and less
PROVEN = 3.0  # standard errors by which a reward must exceed a threshold that it falls below again


@dataclass(frozen=True)
class Interval:
    """An estimate, and where it lies with the given confidence."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean(values: np.ndarray, confidence: float = CONFIDENCE) -> Interval:
    """The mean of values (P,), one a prompt; of differences, the paired interval. Raises ValueError for fewer than two.

    Each end is the outer one of Student's t and of Hall's transformation, which takes the skewness into account (Hall 1992, "On
    the removal of skewness by transformation"). Coverage for 2, 4, 8, 16, 32 prompts: 95, 97, 96, 96, 96 % of normal values;
    91, 91, 93, 94, 96 % of exponential ones. Values that are all equal say nothing of others: their interval is a point.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"{count} values make no interval: two are the least")
    value, spread = float(values.mean()), float(values.std(ddof=1))
    if spread == 0:
        return Interval(value, value, value)
    skewness = float(((values - value) ** 3).mean()) / spread**3
    quantile = _student(confidence, count - 1)
    ends = [*(_unskewed(q, skewness, count) for q in (quantile, -quantile)), quantile, -quantile]
    error = spread / count**0.5
    return Interval(value, value - max(ends) * error, value - min(ends) * error)


def _student(confidence: float, freedom: int) -> float:
    """The quantile of Student's t that the two ends of an interval have."""
    return float(special.stdtrit(freedom, (1 + confidence) / 2))


def _unskewed(quantile: float, skewness: float, count: int) -> float:
    """The t statistic whose transform by Hall's cubic, T + aT² + a²T³/3 + a/2 with a = skewness/3√count, is the quantile."""
    a = skewness / (3 * count**0.5)
    if abs(a) < 1e-6:
        return quantile
    return float(np.cbrt(1 + 3 * a * (quantile - a / 2)) - 1) / a


def rate(values: np.ndarray, trials: int, confidence: float = CONFIDENCE) -> Interval:
    """The mean of shares (P,) in 0..1, each of a prompt's `trials` pictures. Raises ValueError for fewer than two.

    Clopper and Pearson's interval for the effective number of pictures (Korn & Graubard 1998): as many independent ones as vary
    like the prompts' mean, at least P, as no shares vary more than coins do. So it is no point where all pictures win. Coverage
    from 2 prompts on is at least 93 %, mostly 96 to 99 %, with true rates of 0.5 to 0.97 that differ by prompt or do not.
    """
    count = len(values)
    if count < 2:
        raise ValueError(f"{count} values make no interval: two are the least")
    value, variance = float(values.mean()), float(values.var(ddof=1)) / count
    effective = float(count)
    if 0 < value < 1:
        most, fewer = count * trials, special.ndtri((1 + confidence) / 2) / _student(confidence, count - 1)
        effective = most if variance == 0 else value * (1 - value) / variance * fewer**2
        effective = float(np.clip(effective, count, most))
    tail, won, lost = (1 - confidence) / 2, value * effective, (1 - value) * effective
    low = 0.0 if won == 0 else float(special.betaincinv(won, lost + 1, tail))
    high = 1.0 if lost == 0 else float(special.betaincinv(won + 1, lost, 1 - tail))
    return Interval(value, low, high)


def few(prompts: int) -> str | None:
    """A warning where prompts are few."""
    if prompts >= FEW:
        return None
    return (
        f"{prompts} prompts are few: below {FEW}, the 95 % intervals of a skewed measure cover 93 % and less, down to 91 %;"
        " give more prompts"
    )


def price(cost: np.ndarray, reward: np.ndarray, counts: np.ndarray, threshold: float) -> float:
    """Cost (E,) at which a reward (E,) that is measured with noise reaches a threshold; inf if it never does.

    The crossing of the isotonic fit. The first crossing of the reward itself is early, by noise alone, and earlier the more
    evaluations there are. As the fit can only rise, it ends where the reward exceeded the threshold most, if its fall from
    there is more than noise; of a rise and fall within the noise nothing is counted. Evaluations that do not count, bool
    (E,), are left out, and nothing is known next to them.
    Bias at 16 to 150 evaluations with noise of up to a tenth of the curve's height: within 3 % of the price, and 5 % where the
    crossing is among the first three evaluations. Without noise it is the reward's own crossing.
    """
    kept = np.flatnonzero(counts)
    kept = kept[: _rise(reward[kept] - threshold)]
    if not len(kept):
        return float("inf")
    fit = isotonic_regression(reward[kept]).x
    above = np.flatnonzero(fit >= threshold - 1e-12 * abs(threshold))  # a mean of equal numbers may be a bit less
    if not len(above):
        return float("inf")
    i = above[0]
    after, before = kept[i], kept[i - 1]
    if i == 0 or before != after - 1:
        return float(cost[after])
    share = min((threshold - fit[i - 1]) / (fit[i] - fit[i - 1]), 1.0)
    return float(cost[before] + share * (cost[after] - cost[before]))


def _rise(excess: np.ndarray) -> int:
    """How many of the evaluations (E,) the rise to the threshold takes: to the end of the span that exceeds it most in sum.

    All of them where that sum is within the noise: then the reward did not fall, it never rose.
    """
    if not len(excess):
        return 0
    sums = np.concatenate([[0.0], np.cumsum(excess)])
    last = int(np.argmax(sums[1:] - np.minimum.accumulate(sums[:-1])))
    first = int(np.argmin(sums[: last + 1]))
    proven = sums[last + 1] - sums[first] >= PROVEN * noise(excess) * (last + 1 - first) ** 0.5
    return last + 1 if proven else len(excess)


def noise(reward: np.ndarray) -> float:
    """Standard deviation of a reward (E,) about its fit that rises to the highest one and falls from there; 0 without noise.

    A fit's degrees of freedom are its levels (Meyer & Woodroofe 2000).
    """
    top = int(np.argmax(reward)) + 1
    parts = [isotonic_regression(reward[:top])]
    if top < len(reward):
        parts.append(isotonic_regression(reward[top:], increasing=False))
    free = len(reward) - sum(len(part.blocks) - 1 for part in parts)
    left = float(((reward - np.concatenate([part.x for part in parts])) ** 2).sum())
    return (left / free) ** 0.5 if free > 0 else 0.0


def factor(
    value: float, seeds: np.ndarray, resampled: np.ndarray, prompts: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Where a positive value lies, a median over seeds, from the logs of the seeds' values (R,) and of resampled prompts' (N,).

    Seeds and prompts vary independently, so the squares of their intervals add up; each is Student's, on the log scale, as its
    standard deviation is estimated. A median's is √(π/2) times a mean's at most. One seed tells nothing of others: (0, inf).
    Coverage with 3 seeds and 16 prompts: 95 to 99 %, of prices and of ratios.
    """
    if value == 0:  # no run paid anything
        return 0.0, 0.0
    if len(seeds) < 2:
        return 0.0, float("inf")
    of_seeds = _student(confidence, len(seeds) - 1) * (np.pi / 2 * seeds.var(ddof=1) / len(seeds)) ** 0.5
    of_prompts = _student(confidence, prompts - 1) * resampled.std(ddof=1) if prompts > 1 else 0.0
    half = float(np.hypot(of_seeds, of_prompts))
    return value * float(np.exp(-half)), value * float(np.exp(half))
