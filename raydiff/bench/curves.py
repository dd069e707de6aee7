"""Learning curves from records, and what they cost to a threshold, with intervals over seeds and held-out prompts.

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

from raydiff import statistics
from raydiff.bench.measure import COSTS
from raydiff.bench.settings import Keep, Settings

RESAMPLES = 400  # of the prompts, for a standard deviation


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
        return statistics.price(cost, level, self.aligned, threshold)

    def mean(self, name: str = "total") -> np.ndarray:
        """(E,) over pictures."""
        return self.rewards[name].mean(1)


def read(folder: Path, task: str, method: str, settings: Settings) -> list[Curve]:
    """The curves that are there, by seed."""
    files = [record_file(folder, task, method, seed) for seed in settings.seeds]
    return [Curve.of(json.loads(file.read_text()), settings.keep) for file in files if file.is_file()]


def record_file(folder: Path, task: str, method: str, seed: int) -> Path:
    return folder / "runs" / f"{task}-{method}-{seed}.json"


@dataclass(frozen=True)
class Estimate(statistics.Interval):
    """inf: the threshold was not reached. `least` is what it then exceeds, if known."""

    least: float = float("inf")

    def __str__(self) -> str:
        if not np.isfinite(self.value):
            return f"> {number(self.least)}" if np.isfinite(self.least) else "–"
        return f"{number(self.value)} [{number(self.low)}, {number(self.high) if np.isfinite(self.high) else '∞'}]"


Draws = Sequence[
    np.ndarray
]  # N times: which pictures count, with repetition; the same for all methods, so that ratios are paired


def draws(prompts: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> Draws:
    """Resampled prompts. The pictures of one prompt stay together: they are not independent."""
    rng, names = np.random.default_rng(seed), list(dict.fromkeys(prompts))
    places = {name: np.flatnonzero([p == name for p in prompts]) for name in names}
    return [np.concatenate([places[names[i]] for i in rng.integers(len(names), size=len(names))]) for _ in range(resamples)]


@dataclass(frozen=True)
class Price:
    """What a method's runs paid for a threshold."""

    curves: Sequence[Curve]
    threshold: float
    draws: Draws

    def paid(self, cost: str, pictures: Any = slice(None)) -> np.ndarray:
        """(R,) of each seed."""
        return np.array([c.paid(c.costs[cost], self.threshold, pictures) for c in self.curves])

    def point(self, cost: str) -> float:
        """Median over seeds."""
        return median(self.paid(cost))

    @property
    def spent(self) -> np.ndarray:
        """(R,) reward queries of each run."""
        return np.array([c.costs["reward_queries"][-1] for c in self.curves])

    @cached_property
    def each(self) -> np.ndarray:
        """(R,) logs of reward queries; of all that were spent where the threshold was not reached."""
        return _log(np.minimum(self.paid("reward_queries"), self.spent))

    @cached_property
    def resampled(self) -> np.ndarray:
        """(N,) reward queries."""
        return np.array([median(self.paid("reward_queries", pictures)) for pictures in self.draws])

    @cached_property
    def open(self) -> bool:
        """Whether a seed did not reach the threshold, or so many draws of prompts that no interval has an upper end."""
        missed = np.isinf(self.resampled).mean() > (1 - statistics.CONFIDENCE) / 2
        return bool(missed or np.isinf(self.paid("reward_queries")).any())

    @property
    def _over_prompts(self) -> np.ndarray:
        """(N,) logs."""
        return _log(np.minimum(self.resampled, self.spent.max()))

    @property
    def _prompts(self) -> int:
        return len(set(self.curves[0].prompts))

    def queries(self) -> Estimate:
        value = self.point("reward_queries")
        low, high = statistics.factor(value, self.each, self._over_prompts, self._prompts)
        return Estimate(value, low, float("inf") if self.open else high, least=float(self.spent.min()))

    def ratio(self, other: Price) -> Estimate:
        """Queries of this method over those of another, seed by seed and on the same prompts; NaN where it never got there."""
        ours, theirs = self.point("reward_queries"), other.point("reward_queries")
        value, least = divided(ours, theirs), divided(float(self.spent.min()), theirs)
        low, high = statistics.factor(
            value, self.each - other.each, self._over_prompts - other._over_prompts, self._prompts
        )  # fmt: skip
        return Estimate(value, 0.0 if other.open else low, float("inf") if self.open else high, least)


def _log(values: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(values)


def divided(a: float, b: float) -> float:
    """a/b, inf where a never got there; NaN where b did not, or both cost nothing."""
    if np.isinf(b) or a == b == 0:
        return float("nan")
    return a / b if b else float("inf")


def median(values: Sequence[float] | np.ndarray) -> float:
    """The middle one; of an even number the upper, so that inf stays inf and a number one of the measured."""
    return float(np.sort(values)[len(values) // 2])


def number(value: float) -> str:
    """Three digits, and no more than are there."""
    if not np.isfinite(value):
        return "–" if np.isnan(value) else "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
