"""The training loop, of one process and of each worker of several: updates, evaluations, the best weights, and the end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from raydiff import watch
from raydiff.core.learner import Engine
from raydiff.core.rollouts import Rollouts
from raydiff.session import Picture, Session, summary

Row = dict[str, float]


class Loop:
    """One process runs it as it is. A worker of several overrides what all must agree on, and what others are told."""

    session: Session
    engine: Engine

    def __init__(self) -> None:
        self.history: list[Row] = []  # of all updates so far, over restarts; the first row is the untrained model's
        self.done = 0  # updates
        self.reason: str | None = None  # the condition of train.stop_when that has ended the run
        self.stopping = False  # a user asks for an end before the last update
        self.start = time.perf_counter()

    def rows(self) -> Iterator[Row]:
        """Train, and give each update's row of metrics, held-out rewards among them where the run evaluates."""
        run = self.session.run
        self.share({})
        fresh = not self.history
        if fresh:
            self.report({"step": 0, **summary(self.evaluate()), **self.cost()})
        self.reason = self.stopped()
        if fresh:
            yield self.history[0]
        while self.done < run.train.updates and not self.reason and not self.stopping:
            row = self.update()
            if watch.due(run, self.done):
                row |= summary(self.evaluate())
            self.report(row)
            self.require_learning()
            if watch.improved(run, self.history):
                self.keep_best()
            self.reason = self.stopped()
            self.checkpoint()
            yield row

    def update(self) -> Row:
        """One update: its metrics, the learning rate of its first step, and what the run has cost so far."""
        lr, metrics = self.engine.lr, self.learn(self.done)
        if self.session.ema:
            self.session.ema.update(self.weights())
        self.done += 1
        return {"step": self.done, **self.share(metrics), "lr": lr, **self.cost()}

    def learn(self, step: int, batches: Iterable[Rollouts] | None = None) -> Row:
        """Move the weights, on these micro-batches or on the session's own samples."""
        return self.session.update(self.engine, step, batches)

    def share(self, metrics: Row) -> Row:
        """Hand out the weights, after an update or before the first one. Returns the metrics of all workers."""
        return metrics

    def weights(self) -> Mapping[str, Tensor]:
        """The trained weights, whole."""
        return self.session.model.trained()

    def evaluate(self) -> list[Picture]:
        """Held-out pictures of the weights that would be exported now."""
        with self.session.averaged():
            return self.session.evaluate()

    def cost(self) -> Row:
        """Wall time, evaluations included, and what the updates have spent."""
        return {"seconds": time.perf_counter() - self.start, **vars(self.session.policy.calls)}

    def report(self, row: Row) -> Row:
        self.history.append(row)
        return row

    def require_learning(self) -> None:
        watch.require_learning(self.session.run, self.history)

    def stopped(self) -> str | None:
        """The condition of train.stop_when that holds after the newest row."""
        return watch.stopped(self.session.run, self.history)

    def keep_best(self) -> Any:
        """The weights that were just evaluated are the best so far."""

    def checkpoint(self) -> None:
        """After each update."""
