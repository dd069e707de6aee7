"""What the pools did and waited for: counters from the weight store, as metrics of an update and as lines of a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

PREFIX = "pools/"
_LEVELS = ("version", "blocks_in_flight")  # all else counts up
_WINDOW = 10.0  # seconds that a shown rate is the mean of


def flat(status: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a store's status by name, e.g. pools/generate_busy."""
    numbers = {name: status[name] for name in (*_LEVELS, "bytes_published", "gate_waited") if status[name] is not None}
    pools = {f"{pool}_{name}": value for pool, counters in status["pools"].items() for name, value in counters.items()}
    return {PREFIX + name: float(value) for name, value in {**numbers, **pools}.items()}


class Meter:
    """Turns counters into what an update added to them."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def since(self, status: Mapping[str, Any]) -> dict[str, float]:
        """Seconds, pictures and bytes since the last call; levels as they are."""
        now, last = flat(status), self.last
        self.last = now
        return {name: v if name.removeprefix(PREFIX) in _LEVELS else v - last.get(name, 0) for name, v in now.items()}


class Lines:
    """One line per pool, from statuses as they come."""

    def __init__(self, pools: Mapping[str, int]) -> None:
        self.replicas = pools
        self.seen: deque[tuple[float, dict[str, float]]] = deque()

    def lines(self, status: Mapping[str, Any], now: float | None = None) -> list[str]:
        """e.g. `generate  3.2 pictures/s  12 % idle  version 7, which waits for version 8`."""
        now = time.monotonic() if now is None else now
        self.seen.append((now, flat(status)))
        while now - self.seen[0][0] > _WINDOW and len(self.seen) > 2:
            self.seen.popleft()
        (then, old), (_, new) = self.seen[0], self.seen[-1]
        return [self._line(pool, status, {k: v - old.get(k, 0) for k, v in new.items()}, now - then) for pool in self.replicas]

    def _line(self, pool: str, status: Mapping[str, Any], added: Mapping[str, float], seconds: float) -> str:
        def count(name: str) -> float:
            return added.get(f"{PREFIX}{pool}_{name}", 0.0)

        parts = [f"{pool:8} {count('images') / seconds if seconds else 0:.1f} pictures/s"]
        if seconds:
            parts.append(f"{min(1.0, count('busy') / (seconds * self.replicas[pool])):.0%} busy")
        if pool == "generate":
            waits = f", waits for version {status['waiting_for']}" if status["waiting_for"] is not None else ""
            parts.append("waits for the first weights" if status["version"] is None else f"version {status['version']}{waits}")
        return "  ".join(parts)
