"""What MLflow missed of a run while it did not answer: all of it lies in the run's folder, and can be sent later."""

from __future__ import annotations

import logging
from pathlib import PurePosixPath

from raydiff.config import ConfigError, Run
from raydiff.distributed import checkpoint, learn, tracking
from raydiff.distributed.board import Board
from raydiff.distributed.launch import tags
from raydiff.distributed.run_folder import RUN, recorded_run
from raydiff.distributed.storage import Folder
from raydiff.distributed.tracking import Tracker


def send(folder: str) -> Tracker:
    """Log the steps that MLflow lacks of a run that has ended, up to its newest checkpoint, with its pictures and weights, and
    print what it refuses for good.

    Raises ConfigError when no run is there, or MLflow still does not answer.
    """
    where = Folder(folder)
    if (ran := recorded_run(where)) is None:
        raise ConfigError(f"FOLDER = {folder!r}: holds no {RUN}; give the folder of a run, e.g. runs/NAME")
    run, newest = Run.model_validate(ran), checkpoint.latest(where)
    tracker = tracking.start(run, tracking.prepare(run), where.name, where)
    logging.getLogger(tracking.__name__).addHandler(logging.NullHandler())  # what the board would warn of is told below
    board = Board(tracker, where.uri)
    shown = PurePosixPath(learn.GRID).parent.as_posix()
    files = [f"{shown}/{name}" for name in where.files(shown) if name.endswith(".png")]
    files += [f"{part}/{name}" for part in (learn.ADAPTER, learn.BEST) for name in where.files(part)]
    board.add(board.token, newest.history if newest else [], files)
    fault = board.flush()
    if refused := board.left_out():
        print(refused, flush=True)
    if fault:
        raise ConfigError(f"tracking.uri: {fault}")
    ended = where.json_or_none(checkpoint.FINISHED)
    tracker.finish("KILLED" if ended is None else "FINISHED", tags(ended or {}))
    return tracker
