"""What a run prints: its geometry, one live line, and where everything is. Plain lines when the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from raydiff.distributed.meter import Lines

_PLAIN_EVERY = 5.0  # seconds between plain lines that bring no held-out reward


class Progress:
    """Shows rows of metrics as they come."""

    def __init__(self, updates: int, console: Console | None = None, pools: Mapping[str, int] | None = None) -> None:
        """`pools`: replicas by pool, for a line each."""
        self.meter, self.text = Lines(pools or {}), ""
        self.updates, self.console = updates, console or Console(highlight=False, soft_wrap=True)
        self.live = Live(console=self.console, refresh_per_second=4, transient=True) if self.console.is_terminal else None
        self.held_out: float | None = None
        self.first: tuple[int, float] | None = None  # step and seconds where this attempt's clock starts
        self.printed = 0.0
        self.lines: list[str] = []

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live:
            self.live.stop()

    def attach(self, board: Any) -> None:
        """The board that the rows come from, before the first of them."""

    def say(self, text: str) -> None:
        self.console.print(Text(text))

    def restart(self, text: str) -> None:
        """The workers were started again: measure anew."""
        self.say(text)
        self.first = None

    def waiting(self, text: str) -> None:
        """What is going on while no row comes; on a terminal only."""
        if self.live:
            self.live.update(Text(text))

    def row(self, row: dict[str, float]) -> None:
        fresh = "held_out/total" in row
        if fresh:
            self.held_out = row["held_out/total"]
        if self.first is None or row["step"] <= self.first[0]:
            self.first = (int(row["step"]), row["seconds"])
        self.text = self.line(row)
        if self.live:
            self.live.update(Text("\n".join([self.text, *self.lines])))
        elif fresh or time.monotonic() - self.printed > _PLAIN_EVERY:
            self.printed = time.monotonic()
            self.say("\n".join([self.text, *self.lines]))

    def pools(self, status: Mapping[str, Any]) -> None:
        """What the pools do now."""
        self.lines = self.meter.lines(status)
        if self.live:
            self.live.update(Text("\n".join([self.text or "starting", *self.lines])))

    def line(self, row: dict[str, float]) -> str:
        assert self.first is not None
        parts = [f"update {int(row['step'])}/{self.updates}"]
        if "reward/total" in row:
            parts.append(f"reward {row['reward/total']:.4f}")
        if self.held_out is not None:
            parts.append(f"held-out {self.held_out:.4f}")
        done = row["step"] - self.first[0]
        if done:
            each = (row["seconds"] - self.first[1]) / done
            parts += [f"{each:.2f} s an update", f"{duration((self.updates - row['step']) * each)} left"]
        return "  ".join(parts)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
