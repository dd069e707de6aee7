"""A whole run in one process, without Ray: what a notebook uses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from raydiff import drafts, watch
from raydiff.config import Run
from raydiff.contents import Contents
from raydiff.core.learner import TorchEngine
from raydiff.loop import Loop
from raydiff.session import Picture, Session

Show = Callable[[int, list[Picture]], Any]
"""Gets the updates done, and an evaluation's pictures."""


def fit(
    run: Run,
    *,
    device: torch.device | str = "cpu",
    folder: str | Path | None = None,
    show: Show | None = None,
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
    yield from Local(session, folder, show).rows()
    if folder is not None:
        export(session, folder)


class Local(Loop):
    """The loop of one process, which exports the best weights as they come."""

    def __init__(self, session: Session, folder: str | Path | None, show: Show | None) -> None:
        super().__init__()
        self.session, self.folder, self.show = session, folder, show
        geometry, most = session.geometry, session.run.optimizer.max_grad_norm
        self.engine = TorchEngine(*session.optimizer(), geometry.step_accumulation, most, session.loss_scale)

    def evaluate(self) -> list[Picture]:
        pictures = super().evaluate()
        if self.show:
            self.show(self.done, pictures)
        return pictures

    def keep_best(self) -> None:
        if self.folder is not None:
            export(self.session, best_folder(self.folder), watch.best(self.session.run, self.history))


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
