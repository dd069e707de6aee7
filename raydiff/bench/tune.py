"""How the settings are found: each method's candidates, for the same number of denoiser passes each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from raydiff.bench import measure
from raydiff.bench.curves import Curve
from raydiff.bench.settings import Settings
from raydiff.config import ConfigError, Run


@dataclass(frozen=True)
class Trial:
    """A candidate, trained."""

    method: str
    settings: dict[str, Any]
    updates: int
    queries: float | None  # to the highest threshold; None: not reached
    last: float  # the held-out reward of the last evaluation that was aligned
    chosen: bool  # whether the settings file has it

    @property
    def rank(self) -> tuple[float, float]:
        """The smallest is the best."""
        return (float("inf") if self.queries is None else self.queries, -self.last)


def tune(
    settings: Settings, folder: Path, methods: list[str], processes: int, say: Callable[[str], Any] = lambda text: None
) -> list[Trial]:
    """Train what is missing of the candidates, and return all, by method, the best first; tuning.json has them too."""
    jobs = {
        (method, i): measure.Job(affordable(settings, method, candidate), folder / "tuning" / f"{method}-{i}.json")
        for method in methods
        for i, candidate in enumerate(settings.methods[method].candidates)
    }
    measure.work_all(jobs.values(), processes, say)
    trials = [_trial(settings, method, i, job) for (method, i), job in jobs.items()]
    trials.sort(key=lambda t: (methods.index(t.method), t.rank))
    (folder / "tuning.json").write_text(json.dumps([vars(t) for t in trials], indent=1))
    return trials


def affordable(settings: Settings, method: str, candidate: dict[str, Any]) -> Run:
    """The candidate's run, with as many updates as the tuning budget buys, and no more than in the comparison.

    Raises ConfigError where it buys none.
    """
    from raydiff.plan.cost import count

    budget = settings.tuning
    calls = count(settings.run(budget.task, method, budget.seed, candidate))[0]
    passes = calls.denoiser_forward + 2 * calls.denoiser_backward
    updates = min(budget.passes // passes, settings.methods[method].updates)
    if updates == 0:
        raise ConfigError(f"tuning.passes = {budget.passes} buys no update of {method}, which takes {passes}; set it to more")
    every = max(1, updates // budget.evaluations)
    return settings.run(
        budget.task, method, budget.seed, {**candidate, "train.updates": updates, "evaluate.every": every}
    )  # fmt: skip


def _trial(settings: Settings, method: str, i: int, job: measure.Job) -> Trial:
    curve, contender = Curve.of(json.loads(job.file.read_text()), settings.keep), settings.methods[method]
    thresholds = settings.tasks[settings.tuning.task].thresholds
    queries = curve.paid(curve.costs["reward_queries"], thresholds[-1])
    candidate = contender.candidates[i]
    return Trial(
        method=method,
        settings=candidate,
        updates=int(curve.steps[-1]),
        queries=queries if isfinite(queries) else None,
        last=float(curve.mean()[curve.aligned][-1]),
        chosen=candidate == contender.tuned,
    )
