"""Who hangs is started again: each role of a run has `train.timeout` seconds to give a sign of work.

Ray sees what dies. It does not see what lives and does nothing: a stopped process, a deadlock, a call that never returns. Board
and weight store are asked by the driver all the time (`Asked`). What stands in Ray Data's pipeline beats (`Beat`), and the
driver kills what is silent, or busy for too long (`Members`). A trainer watches itself (`Watchdog`). Reward replicas are
watched by those that ask them (score.py).
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Say = Callable[[str], Any]
_ANSWER = 2.0  # seconds in which who lives, or has ended, answers


def started_again(who: str, why: str) -> str:
    """The line that tells of a kill."""
    return f"{who} {why}: it is started again"


class Asked:
    """The driver's end of an actor that it asks again and again, without ever waiting long for it."""

    def __init__(self, actor: Any, name: str, limit: float, say: Say) -> None:
        self.actor, self.name, self.limit, self.say = actor, name, limit, say
        self.patience = limit  # doubled by each kill until an answer comes: a start may take longer than an answer
        self.ref: Any = None
        self.since = 0.0

    def ask(self, method: str, *args: Any, wait: float = 0.0) -> Any:
        """The answer; None while there is none, as that of an actor that is started again. One question is open at a time: its
        answer comes with a later call, which must ask the same."""
        import ray

        if self.ref is None:
            self.ref, self.since = getattr(self.actor, method).remote(*args), time.monotonic()
        if not ray.wait([self.ref], timeout=wait)[0]:
            if time.monotonic() - self.since > self.patience:
                self.say(started_again(self.name, f"has not answered for {self.patience:g} s"))
                ray.kill(self.actor, no_restart=False)
                self.ref, self.patience = None, 2 * self.patience
            return None
        ref, self.ref = self.ref, None
        found = answer(ref)
        self.patience = self.patience if found is None else self.limit
        return found


def answer(ref: Any) -> Any:
    """What an actor has answered; None when it died meanwhile."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError:
        raise  # its own fault
    except ray.exceptions.RayError:
        return None


class Beat:
    """A member of the pipeline tells the store every few seconds that it lives, and since when it has been busy."""

    def __init__(self, store: Any, attempt: str, role: str, limit: float) -> None:
        import ray

        context = ray.get_runtime_context()
        self.store, self.attempt = store, attempt
        self.id, self.handle = context.get_actor_id(), [context.current_actor]  # in a list Ray hands it on unread
        self.name = f"the {role} in process {os.getpid()} on {socket.gethostname()}"
        self.node = context.get_node_id()
        self.busy_since: float | None = None
        self.every = beats(limit)
        threading.Thread(target=self._run, daemon=True, name="raydiff-beat").start()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Around work that has an end: a member that is in here for too long hangs."""
        self.busy_since = time.monotonic()
        try:
            yield
        finally:
            self.busy_since = None

    def _run(self) -> None:
        while True:
            since = self.busy_since
            busy = 0.0 if since is None else time.monotonic() - since
            self.store.beat.remote(self.attempt, self.id, Member(self.name, self.node, self.handle, busy))
            time.sleep(self.every)


def beats(limit: float) -> float:
    """Seconds between two signs of life of what has `limit` seconds to give one."""
    return min(5.0, limit / 4)


@dataclass
class Member:
    """What a beat says."""

    name: str
    node: str
    handle: list[Any]
    busy: float  # seconds; 0 when it waits for work


class Members:
    """Who beats, as the store knows them."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[float, Member]] = {}

    def beat(self, actor: str, member: Member) -> None:
        self.seen[actor] = (time.monotonic(), member)

    def overdue(self, limit: float) -> list[tuple[Member, str]]:
        """Who hangs, each once until it beats again, and by what one sees it."""
        now, found = time.monotonic(), []
        for actor, (at, member) in list(self.seen.items()):
            silent = now - at
            if silent > limit or member.busy > limit:
                del self.seen[actor]
                seconds, what = (silent, "has given no sign of life") if silent > limit else (member.busy, "works at one thing")
                found.append((member, f"{what} for {seconds:.0f} s"))
        return found


def end(member: Member, why: str, say: Say) -> None:
    """Kill a member that hangs, unless it went with its node, or has ended: Ray Data lets actors go that have no more to do."""
    import ray

    if not any(node["Alive"] and node["NodeID"] == member.node for node in ray.nodes()):
        return
    (actor,) = member.handle
    if not ray.wait([actor.__ray_ready__.remote()], timeout=_ANSWER)[0]:  # one that has ended answers this with an error
        say(started_again(member.name, why))
        ray.kill(actor, no_restart=False)


class Watchdog:
    """A thread that ends its own process when that has made no progress for too long, after a traceback of all its threads.

    Progress is a `touch`, or another value of `sign`. `bark` hears why. Inside a `with` block.
    """

    def __init__(self, limit: float, bark: Say) -> None:
        self.limit, self.bark = limit, bark
        self.sign: Callable[[], object] = lambda: None
        self.touched = 0
        self.over = threading.Event()

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._run, daemon=True, name="raydiff-watchdog").start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()

    def touch(self) -> None:
        self.touched += 1

    def _run(self) -> None:
        # Its own beats are counted, not a clock: a process that was stopped and goes on has not been idle meanwhile.
        every, idle = beats(self.limit), 0.0
        last: object = None
        while not self.over.wait(every):
            now = (self.touched, self.sign())
            idle, last = (idle + every if now == last else 0.0), now
            if idle >= self.limit:
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                self.bark(f"has made no progress for {idle:.0f} s")
                time.sleep(1)  # what it said is on its way
                os._exit(1)
