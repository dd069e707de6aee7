"""What a run's rows of metrics say of it: whether it ends here, and which of its weights were the best.

Pure functions of the rows so far, oldest first, one an update: `fit` and Ray ask them alike, before and after a restart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from raydiff import drafts
from raydiff.config import ConfigError, Run, Threshold
from raydiff.core.guard import METRICS

Row = Mapping[str, float]
BEST = "best.json"


@dataclass(frozen=True)
class Best:
    """The evaluation whose weights are kept as adapter_best."""

    step: int
    metric: str
    value: float
    before: float | None  # the untrained model's; None when it was not measured then

    def __str__(self) -> str:
        before = "" if self.before is None else f", {self.before:.4g} before training"
        return f"{self.metric} = {self.value:.4g} after update {self.step}{before}"

    def write(self, folder: str | Path) -> None:
        """best.json, beside the weights."""
        with drafts.replacing(Path(folder) / BEST) as draft:
            draft.write_text(json.dumps(asdict(self), indent=1))


def best(run: Run, rows: Sequence[Row]) -> Best | None:
    """The first highest value of `evaluate.best` after an update; None when there was no evaluation after one.

    The untrained model is no candidate: its adapter does nothing. Its value stands beside, so that a run which never got better
    shows it.
    """
    metric = run.evaluate.best_metric
    measured = [row for row in rows if metric in row]
    trained = [row for row in measured if row["step"] > 0]
    if not trained:
        return None
    top = max(trained, key=lambda row: row[metric])  # the first of equals
    before = measured[0][metric] if measured[0]["step"] == 0 else None
    return Best(int(top["step"]), metric, top[metric], before)


def improved(run: Run, rows: Sequence[Row]) -> Best | None:
    """The best, if it is the newest row: then its weights are to be kept."""
    if run.evaluate.best_metric not in rows[-1]:
        return None
    found = best(run, rows)
    return found if found is not None and found.step == rows[-1]["step"] else None


def due(run: Run, done: int) -> bool:
    """Whether there is an evaluation after `done` updates."""
    return done % run.evaluate.every == 0 or done == run.train.updates


def require_learning(run: Run, rows: Sequence[Row]) -> None:
    """Raise FloatingPointError while every update's gradient has been 0, as the method saw no difference between its samples;
    unless `train.zero_gradient` accepts it."""
    updates = [row for row in rows if row["step"] > 0]
    if run.train.zero_gradient == "refuse" and updates and all(row.get("grad_norm") == 0 for row in updates):
        raise FloatingPointError(
            f"every gradient up to update {updates[-1]['step']:g} was exactly 0: the rewards, or labels, do not distinguish the"
            " samples, so that all pairs are ties and all advantages 0; look at the rewards, raise method.attempts, or"
            ' set train.zero_gradient to "accept"'
        )


def stopped(run: Run, rows: Sequence[Row]) -> str | None:
    """Why the run ends with the newest row, by `train.stop_when`; None when it goes on.

    Raises ConfigError for a metric that is not there: one of an evaluation's after the first, before training, and any other
    after the first update. And for a condition that holds before training, which would end the run before it began.
    """
    row = rows[-1]
    evaluated = "held_out/total" in row
    for text in run.train.stop_when:
        condition = Threshold.parse(text)
        of_evaluation = condition.metric in METRICS or condition.metric.startswith("held_out/")
        if not (evaluated if of_evaluation else row["step"] > 0):
            continue
        if condition.metric not in row:
            if any(condition.metric in before for before in reversed(rows)):
                continue
            raise ConfigError(
                f"train.stop_when: {text!r} names {condition.metric!r}, which this run does not measure; there are"
                f" {', '.join(sorted(set().union(*rows) - {'step'}))}"
            )
        value = row[condition.metric]
        if evaluated and condition.holds(value):
            if row["step"] == 0:
                raise ConfigError(
                    f"train.stop_when: {text!r} holds before training: {condition.metric} is {value:.4g}; set another number"
                )
            return f"{text}: {condition.metric} = {value:.4g} after update {int(row['step'])}"
    return None
