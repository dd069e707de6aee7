"""What tests of whole runs with pools share."""

import os
import signal

import psutil
import pytest

from raydiff.distributed import checkpoint
from raydiff.distributed.launch import Result
from raydiff.distributed.storage import Folder


def history(result: Result) -> list[dict[str, float]]:
    last = checkpoint.latest(Folder(result.folder))
    assert last is not None
    return last.history


def assert_equal_step_by_step(result: Result, reference: list[dict[str, float]], near_zero: float = 0.0) -> None:
    """The metrics of `reference`, at each step; counts of calls included. Those that cancel out are equal to `near_zero`."""
    ours = history(result)
    assert [row["step"] for row in ours] == [row["step"] for row in reference]
    for mine, theirs in zip(ours, reference, strict=True):
        for name in theirs.keys() - {"seconds"}:
            if not name.startswith("pools/"):
                assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=near_zero), (theirs["step"], name)


def found(title: str) -> list[int]:
    """Processes of this machine's Ray cluster by a part of their title, the oldest first."""
    seen = [p.info for p in psutil.process_iter(["pid", "cmdline", "create_time"])]
    titled = [info for info in seen if (line := " ".join(info["cmdline"] or [])).startswith("ray::") and title in line]
    return [info["pid"] for info in sorted(titled, key=lambda info: info["create_time"])]


def signal_one(title: str, number: signal.Signals) -> int:
    """Send a signal to the newest of them, and return its number."""
    pid = found(title)[-1]
    os.kill(pid, number)
    return pid
