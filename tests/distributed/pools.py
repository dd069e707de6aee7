"""What tests of whole runs with pools share."""

import os
import signal
import subprocess

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
    """Processes of this machine's Ray cluster by a part of their title."""
    lines = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [int(line.split()[0]) for line in lines if title in line and "ray::" in line]


def signal_one(title: str, number: signal.Signals) -> int:
    """Send a signal to the newest of them, and return its number."""
    pid = found(title)[-1]
    os.kill(pid, number)
    return pid
