"""What the driver sees of a run: rows of metrics, what the pools do and who hangs, nodes that come and go, and Ctrl-C."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

from raydiff import placement
from raydiff.config import Run
from raydiff.distributed import hangs
from raydiff.distributed.hangs import Asked, Member
from raydiff.distributed.progress import Progress
from raydiff.plan.clusters import cluster_nodes

_POLL = 0.5  # seconds between looks at the board
_BOARD = 60.0  # seconds after which a board that does not answer hangs: all that it does at once is to take note
_LAST = 20.0  # seconds that its last rows are waited for
_LOOK = 5.0  # seconds between looks at the cluster's nodes


def follow(run: Run, future: Future[dict[str, Any]], board: Any, progress: Progress, store: Any) -> dict[str, Any]:
    """Show the run until it ends. Ctrl-C asks for a last checkpoint; a second one does not wait for it."""
    shown, room, stopping = Shown(run, board, progress), Room(run), False
    pools = None if store is None else Asked(store, "the weight store", run.train.timeout, progress.say)
    while True:
        try:
            ended = future.done()
            shown.look(stopping)
            if pools is not None and not ended and (found := pools.ask("look", run.train.timeout)):
                _tell(progress, *found)
            if news := room.news():
                progress.say(news)
            if ended:
                shown.last()
                return future.result()
            time.sleep(_POLL)
        except KeyboardInterrupt:
            if stopping:
                raise
            stopping = True
            progress.say("stopping: this update, then a checkpoint; Ctrl-C again stops without one")


def _tell(progress: Progress, status: dict[str, Any], said: list[str], overdue: list[tuple[Member, str]]) -> None:
    """Show what the store knows of the pools, and start their members again that hang."""
    progress.pools(status)
    for text in said:
        progress.say(text)
    for member, why in overdue:
        hangs.end(member, why, progress.say)


class Shown:
    """The rows that the board has, each shown once, whatever becomes of the board."""

    def __init__(self, run: Run, board: Any, progress: Progress) -> None:
        self.board, self.progress = Asked(board, "the board", min(_BOARD, run.train.timeout), progress.say), progress
        self.token, self.place = "", 0
        self.steps: set[int] = set()

    def last(self) -> None:
        """Show what is left of a run that has ended, if the board answers soon."""
        for _ in range(2):  # what was asked before the end may lack the last rows
            self.look(stopping=False, wait=_LAST)

    def look(self, stopping: bool, wait: float = 0.0) -> None:
        """Show what is new, and tell the board whether the run is to stop."""
        answer = self.board.ask("since", self.token, self.place, stopping, wait=wait)
        if answer is None:
            return
        token, news = answer
        self.place = len(news) + (self.place if token == self.token else 0)
        self.token = token
        for item in news:
            if isinstance(item, str):
                self.progress.restart(item)
            elif int(item["step"]) not in self.steps:
                self.steps.add(int(item["step"]))
                self.progress.row(item)


class Room:
    """Tells when the cluster has lost room for a pool, or has it again: a run that waits says for what."""

    def __init__(self, run: Run) -> None:
        self.run, self.next, self.lacking = run, 0.0, list[str]()

    def news(self) -> str | None:
        """What has changed, looked up every few seconds."""
        if time.monotonic() < self.next:
            return None
        self.next = time.monotonic() + _LOOK
        before, self.lacking = self.lacking, placement.faults(self.run, cluster_nodes(), "the cluster")
        if self.lacking == before:
            return None
        return "\n".join(["nodes were lost", *self.lacking]) if self.lacking else "all pools have room again"
