"""A whole run in one process, without Ray: what a notebook uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from raydiff import drafts, watch
from raydiff.config import Run
from raydiff.contents import Contents
from raydiff.core.learner import TorchEngine
from raydiff.session import Picture, Session, summary


def fit(
    run: Run,
    *,
    device: torch.device | str = "cpu",
    folder: str | Path | None = None,
    show: Callable[[int, list[Picture]], Any] | None = None,
) -> Iterator[dict[str, float]]:
    """Train, yielding the metrics of each update, held-out rewards among them where the run evaluates.

    The first dict has step 0 and no update: the held-out rewards of the untrained model. A condition of `train.stop_when` that
    holds makes that dict the last. With `folder`, the trained weights are exported there at the end, and the best so far, with
    best.json, to `best_folder(folder)` beside it. `show` gets each evaluation's pictures, with the updates done before it.
    Workers and ZeRO stage play no role here; the batch is the same.

    Raises ConfigError for a metric of `train.stop_when` that the run does not measure, and for files that are replaced while
    they are loaded; FloatingPointError when a loss or a gradient is not finite, or no update has a gradient.
    """
    held = Contents.of(run)
    session = Session(run, device)
    session.prepare()
    held.check_session(session, "pairs", *(["evaluate.clip"] if session.embed else []))
    optimizer, scheduler = session.optimizer()
    engine = TorchEngine(
        optimizer, scheduler, session.geometry.step_accumulation, run.optimizer.max_grad_norm, session.loss_scale
    )
    start = time.perf_counter()

    def evaluated(done: int) -> dict[str, float]:
        pictures = evaluate(session)
        if show:
            show(done, pictures)
        return summary(pictures)

    rows = [{"step": 0, **evaluated(0), "seconds": time.perf_counter() - start}]
    watch.stopped(run, rows)
    yield rows[0]
    for step in range(run.train.updates):
        metrics = session.update(engine, step)
        if session.ema:
            session.ema.update(session.model.trained())
        done = step + 1
        metrics |= {"seconds": time.perf_counter() - start, **vars(session.policy.calls)}
        if watch.due(run, done):
            metrics |= evaluated(done)
        rows.append({"step": done, **metrics})
        watch.require_learning(run, rows)
        if folder is not None and (best := watch.improved(run, rows)):
            export(session, best_folder(folder), best)
        reason = watch.stopped(run, rows)
        yield rows[-1]
        if reason:
            break
    if folder is not None:
        export(session, folder)


def export(session: Session, folder: str | Path, best: watch.Best | None = None) -> None:
    """Write the weights that are evaluated, best.json beside them: whole, in place of those that were there."""
    with drafts.replacing_folder(Path(folder), watch.BEST) as draft:
        with session.averaged():
            session.model.export(draft, session.model.trained())
        if best:
            best.write(draft)


def best_folder(folder: str | Path) -> Path:
    """Where the best weights go when the last ones go to `folder`."""
    return Path(folder).with_name(f"{Path(folder).name}_best")


def evaluate(session: Session) -> list[Picture]:
    """Held-out pictures of the weights that would be exported now."""
    with session.averaged():
        return session.evaluate()
