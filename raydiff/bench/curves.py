"""Learning curves from records, and what they cost to a threshold, with bootstrap intervals.

Legend: R seeds, E evaluations, P pictures, N resamples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from raydiff.bench.measure import COSTS
from raydiff.bench.settings import Keep, Settings

RESAMPLES = 2000


@dataclass(frozen=True)
class Curve:
    """One run. Where it is not `aligned`, the reward was bought with pictures of something else and does not count."""

    prompts: tuple[str, ...]  # (P,)
    steps: np.ndarray  # (E,)
    costs: Mapping[str, np.ndarray]  # each (E,), ascending
    rewards: Mapping[str, np.ndarray]  # each (E,P)
    aligned: np.ndarray  # (E,) bool

    @classmethod
    def of(cls, record: Mapping[str, Any], keep: Keep) -> Curve:
        rows = record["evaluations"]
        rewards = {name: np.array([row["rewards"][name] for row in rows]) for name in rows[0]["rewards"]}
        return cls(
            tuple(record["prompts"]),
            np.array([row["step"] for row in rows]),
            {cost: np.array([row[cost] for row in rows], float) for cost in COSTS},
            rewards,
            rewards[keep.reward].mean(1) >= keep.least,
        )

    def paid(self, cost: np.ndarray, threshold: float, pictures: Any = slice(None)) -> float:
        """Cost (E,) at which the mean reward reaches a threshold; inf if it never does while aligned.

        Of a resample, the gain on its pictures counts, over all pictures' mean before training: at the start, which is the same
        in all runs, prompts differ by more than a threshold asks for.
        """
        reward = self.rewards["total"]
        level = reward[0].mean() + (reward - reward[0])[:, pictures].mean(1)
        return crossing(cost, np.where(self.aligned, level, -np.inf), threshold)

    def mean(self, name: str = "total") -> np.ndarray:
        """(E,) over pictures."""
        return self.rewards[name].mean(1)


def read(folder: Path, task: str, method: str, settings: Settings) -> list[Curve]:
    """The curves that are there, by seed."""
    files = [record_file(folder, task, method, seed) for seed in settings.seeds]
    return [Curve.of(json.loads(file.read_text()), settings.keep) for file in files if file.is_file()]


def record_file(folder: Path, task: str, method: str, seed: int) -> Path:
    return folder / "runs" / f"{task}-{method}-{seed}.json"


def crossing(cost: np.ndarray, reward: np.ndarray, threshold: float) -> float:
    """Cost (E,) at which the reward (E,) first reaches a threshold, linear between evaluations; inf if it never does.

    A reward of -inf does not count, nor does what lies between it and the next.
    """
    above = np.flatnonzero(reward >= threshold)
    if not len(above):
        return float("inf")
    i = above[0]
    if i == 0 or np.isinf(reward[i - 1]):
        return float(cost[i])
    share = (threshold - reward[i - 1]) / (reward[i] - reward[i - 1])
    return float(cost[i - 1] + share * (cost[i] - cost[i - 1]))


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; inf: the threshold was not reached. `least` is what it then exceeds, if known."""

    value: float
    low: float
    high: float
    least: float = float("inf")

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return f"> {number(self.least)}" if np.isfinite(self.least) else "–"
        return f"{number(self.value)} [{number(self.low)}, {number(self.high) if np.isfinite(self.high) else '∞'}]"


@dataclass(frozen=True)
class Draws:
    """N resamples of seeds and, within each, of prompts: the same for all methods, so that ratios are paired."""

    seeds: np.ndarray  # (N,R)
    pictures: tuple[np.ndarray, ...]  # N times: which pictures count, with repetition

    @classmethod
    def of(cls, runs: int, prompts: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> Draws:
        """The pictures of one prompt stay together: they are not independent."""
        rng, names = np.random.default_rng(seed), list(dict.fromkeys(prompts))
        places = {name: np.flatnonzero([p == name for p in prompts]) for name in names}
        pictures = tuple(
            np.concatenate([places[names[i]] for i in rng.integers(len(names), size=len(names))]) for _ in range(resamples)
        )
        return cls(rng.integers(runs, size=(resamples, runs)), pictures)


@dataclass(frozen=True)
class Price:
    """What a method's runs paid for a threshold."""

    curves: Sequence[Curve]
    threshold: float
    draws: Draws

    def point(self, cost: str) -> float:
        """Median over seeds."""
        return median([c.paid(c.costs[cost], self.threshold) for c in self.curves])

    @cached_property
    def resampled(self) -> np.ndarray:
        """(N,) reward queries."""
        draws, t = self.draws.pictures, self.threshold
        prices = np.array(
            [[c.paid(c.costs["reward_queries"], t, pictures) for pictures in draws] for c in self.curves]
        )  # (R,N)
        return np.array([median(prices[chosen, n]) for n, chosen in enumerate(self.draws.seeds)])

    @property
    def spent(self) -> float:
        """Reward queries of the shortest run."""
        return min(float(c.costs["reward_queries"][-1]) for c in self.curves)

    def queries(self) -> Estimate:
        return Estimate(self.point("reward_queries"), *interval(self.resampled), least=self.spent)

    def ratio(self, other: Price) -> Estimate:
        """Queries of this method over those of another, which must have reached the threshold for it to be a number."""
        low, high = interval(divided(self.resampled, other.resampled))
        value = float(divided(np.array(self.point("reward_queries")), np.array(other.point("reward_queries"))))
        least = float(divided(np.array(self.spent), np.array(other.point("reward_queries"))))
        return Estimate(value, low, high, least)


def divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a/b, inf where a never got there; NaN where b did not, or both cost nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(np.isinf(b), np.nan, a / b)


def median(values: Sequence[float] | np.ndarray) -> float:
    """The middle one; of an even number the upper, so that inf stays inf and a number one of the measured."""
    return float(np.sort(values)[len(values) // 2])


def interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentiles of the values that are numbers; inf counts."""
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


def number(value: float) -> str:
    """Three digits, and no more than are there."""
    if not np.isfinite(value):
        return "–" if np.isnan(value) else "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
