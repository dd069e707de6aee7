"""The one actor between a run's workers, the process that started it, and MLflow; and the workers' end of it.

The actor lives on the driver's node, where a SQLite tracking file is, and outlives the workers: a step that was logged before
they were lost is not logged again. Nothing that MLflow or the actor does or fails to do reaches the training.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

from raydiff.distributed import tracking
from raydiff.distributed.storage import Folder
from raydiff.distributed.tracking import Row, Tracker

_BRIEF, _SETTLE = 20.0, 60.0  # seconds at most that a worker waits for the board: once, and at the end of the run


class Board:
    """The actor: takes rows and files from rank 0, hands rows to the driver's progress line and a stop to the workers.

    Its methods return at once, but those that wait for MLflow, which is a thread's business.
    """

    def __init__(self, tracker: Tracker, folder: str) -> None:
        self.token = secrets.token_hex(8)  # of this one: who is started again has another, and remembers nothing
        self.stopping = False
        self.news: list[Row | str] = []
        self.steps: set[int] = set()
        self.origin: float | None = None  # when the run's clock stood at 0
        self.log = _Log(tracker, Folder(folder))

    def add(self, token: str, rows: list[Row], files: list[str]) -> str:
        """Rows of metrics, and paths in the run's folder to log as artifacts. A step that came before is left out.

        Returns this board's token; for another's, nothing is added.
        """
        if token != self.token:
            return self.token
        if self.origin is None and rows:
            self.clock(rows[-1]["seconds"])
        for row in rows:
            if int(row["step"]) not in self.steps:
                self.steps.add(int(row["step"]))
                self.news.append(row)
                self.log.queue.put(row)
        for path in files:
            self.log.queue.put(path)
        return self.token

    def clock(self, seconds: float) -> float:
        """Seconds of the run by now, lost attempts included, when it stood at `seconds` as this was asked first."""
        if self.origin is None:
            self.origin = time.monotonic() - seconds
        return time.monotonic() - self.origin

    def tell(self, text: str) -> None:
        """A line for the driver to print."""
        self.news.append(text)

    def since(self, token: str, place: int, stopping: bool = False) -> tuple[str, list[Row | str]]:
        """This board's token, and what came after `place`; all, when `token` is another's. `stopping`: the run is to stop."""
        self.stopping |= stopping
        return self.token, self.news[place if token == self.token else 0 :]

    def must_stop(self) -> bool:
        return self.stopping

    def settle(self, seconds: float) -> None:
        """Wait, so long at most, until all that came has been logged, or MLflow has failed."""
        settled = threading.Event()
        self.log.queue.put(settled)
        settled.wait(seconds)

    def left_out(self) -> str:
        """What MLflow refused for good, empty when nothing."""
        return tracking.left_out(self.log.refused)

    def flush(self) -> str | None:
        """Log the rest and end. Returns what could not be logged and why, None when all was."""
        self.log.queue.put(None)
        self.log.thread.join()
        return self.log.fault


class Record:
    """Rank 0's end of the board. Nothing that happens to the board holds the training, or ends it.

    A board that hangs is not waited for, and one that was started again is told everything anew. `limit`: seconds after which
    a worker that waits counts as hung itself.
    """

    def __init__(self, board: Any, limit: float) -> None:
        self.board, self.brief, self.longest = board, min(_BRIEF, limit / 4), min(_SETTLE, limit / 2)
        self.rows: list[Row] = []
        self.files: list[str] = []
        self.known, self.told = "", (0, 0)  # the board's token, and how many rows and files it has
        self.pending: Any = None  # what a board that hangs has not answered
        self.over = False

    def add(self, rows: list[Row], files: list[str]) -> bool:
        """Returns whether the board has all there is. Waiting for it keeps what comes from a dying worker in order."""
        self.rows += rows
        self.files += files
        for _ in range(2):  # a board that is new says so first
            token = self._ask("add", self.known, self.rows[self.told[0] :], self.files[self.told[1] :])
            if token is None:
                return False
            if token == self.known:
                self.told = (len(self.rows), len(self.files))
                return True
            self.known, self.told = token, (0, 0)
        return False

    def settle(self) -> None:
        """Try for a while until the board has all."""
        end = time.monotonic() + self.longest
        while not self.add([], []) and time.monotonic() < end:
            time.sleep(1)

    def tell(self, text: str) -> None:
        self.board.tell.remote(text)

    def clock(self, seconds: float) -> float:
        """`Board.clock`, or `seconds` when the board is away."""
        found = self._ask("clock", seconds)
        return seconds if found is None else max(seconds, found)

    def must_stop(self) -> bool:
        return bool(self._ask("must_stop")) or self.over

    def _ask(self, method: str, *args: Any) -> Any:
        """The board's answer; None while it has none, and until it has answered what it was asked before."""
        import ray

        if self.pending is not None and not ray.wait([self.pending], timeout=0)[0]:
            return None
        self.pending = getattr(self.board, method).remote(*args)
        if not ray.wait([self.pending], timeout=self.brief)[0]:
            return None
        ref, self.pending = self.pending, None
        try:
            return ray.get(ref)
        except ray.exceptions.ActorDiedError:
            self.over = True  # it is started again for ever, but by a driver that has given up on this run
        except ray.exceptions.RayTaskError:
            raise  # its own fault
        except ray.exceptions.RayError:
            pass  # it is being started again
        return None


class _Log:
    """A thread that logs what is queued, in order. What fails stays, for the next time; what MLflow never takes is left out."""

    def __init__(self, tracker: Tracker, folder: Folder) -> None:
        self.tracker, self.folder = tracker, folder
        self.queue: queue.SimpleQueue[Row | str | threading.Event | None] = queue.SimpleQueue()
        self.pending: list[Row | str] = []
        self.logged: set[int] | None = None  # steps; unknown until MLflow has answered
        self.fault: str | None = None
        self.refused: dict[str, str] = {}  # why, by metric or file
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while (item := self.queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                self.pending.append(item)
                self.attempt()
        self.attempt()

    def attempt(self) -> None:
        try:
            if self.logged is None:
                self.logged = self.tracker.steps()
            while self.pending:
                self.refuse(self.logged_or_refused(self.pending[0]))
                self.pending.pop(0)
            self.fault = None
        except Exception as error:
            self.fault = f"{len(self.pending)} entries could not be logged to MLflow at {self.tracker.uri}: {error}"
            logging.getLogger(__name__).warning(self.fault)

    def logged_or_refused(self, item: Row | str) -> dict[str, str]:
        """Log a row or a file. Returns {metric or file: why} of what can never be logged."""
        assert self.logged is not None
        if isinstance(item, str):
            try:
                self.tracker.file(self.folder, item)
            except FileNotFoundError as error:
                return {item: str(error)}
            return {}
        if int(item["step"]) in self.logged:
            return {}
        refused = self.tracker.log(item)
        self.logged.add(int(item["step"]))
        return refused

    def refuse(self, refused: Mapping[str, str]) -> None:
        """Tell of each once."""
        tracking.warn({name: why for name, why in refused.items() if name not in self.refused})
        self.refused |= refused
