"""What hangs is started again: each role of a run, stopped for good at some instant, and the run goes on to the same numbers."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from raydiff.config import Run
from raydiff.distributed import hangs, launch, missed, tracking
from raydiff.distributed.board import Board
from raydiff.distributed.follow import Shown
from raydiff.distributed.hangs import Asked, Member, Members
from raydiff.distributed.launch import Result, train
from raydiff.distributed.progress import Progress
from raydiff.distributed.tracking import Tracker
from raydiff.distributed.weights import WeightStore
from tests.distributed.conftest import wait_for
from tests.distributed.pools import assert_equal_step_by_step, found, history, signal_one
from tests.distributed.test_train import distance

pytestmark = [pytest.mark.ray, pytest.mark.timeout(500)]
MakeRun = Callable[..., Run]
LIMIT = 40.0


@pytest.fixture(scope="module")
def undisturbed(cluster: str, pooled: MakeRun) -> Result:
    return train(pooled())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that a run prints."""
    lines: list[str] = []
    original = launch.Progress.say

    def say(self: Any, text: str) -> None:
        lines.append(text)
        original(self, text)

    monkeypatch.setattr(launch.Progress, "say", say)
    return lines


@pytest.mark.parametrize(
    ("title", "named"),
    [
        pytest.param("ray::Board", "the board", marks=pytest.mark.slow),
        pytest.param("ray::WeightStore", "the weight store", marks=pytest.mark.slow),
        pytest.param("MapBatches(Gate)", "the gate in process", marks=pytest.mark.slow),
        pytest.param("MapBatches(Generator)", "the generator in process", marks=pytest.mark.slow),
        pytest.param("RewardReplica", "reward replica", marks=pytest.mark.slow),
        pytest.param("RayTrainWorker", None, marks=pytest.mark.slow),
        pytest.param("SplitCoordinator", None, marks=pytest.mark.slow),  # Ray's own: no samples come
    ],
)
def test_what_is_stopped_for_good_is_started_again(
    undisturbed: Result, pooled: MakeRun, said: list[str], tmp_path: Path, title: str, named: str | None
) -> None:
    stopped: list[int] = []

    def stop() -> None:
        wait_for(lambda: next(iter(tmp_path.glob("*/checkpoint_000001/checkpoint.json")), None), 300)
        time.sleep(random.Random(title).uniform(0, 1))
        stopped.append(signal_one(title, signal.SIGSTOP))

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    start = time.monotonic()
    one = {"pools.reward.replicas": 1} if title == "RewardReplica" else {}  # of several, another one would be asked
    result = train(pooled({"storage": str(tmp_path), "train.timeout": LIMIT, "rewards.blue.pause": 1.5, **one}))
    thread.join()
    print(f"{title}: {time.monotonic() - start:.0f} s, {said}")
    assert stopped[0] not in found(title)  # it was ended
    if named:
        again = [line for line in said if "it is started again" in line]
        assert len(again) == 1 or (again and title == "RewardReplica")  # which both trainers ask
        assert again[0].startswith(named)
    assert_equal_step_by_step(result, history(undisturbed))
    assert distance(result, undisturbed) < 1e-5
    if title == "RayTrainWorker":
        assert history(result)[-1]["seconds"] > LIMIT  # the lost attempt counts
    assert_logged_once(result, undisturbed)


def assert_logged_once(result: Result, undisturbed: Result) -> None:
    client = tracking.Tracker(result.mlflow_uri, result.mlflow_run_id).client()
    steps = [m.step for m in client.get_metric_history(result.mlflow_run_id, "seconds")]
    assert steps == [row["step"] for row in history(undisturbed)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_board_that_is_killed_again_and_again_loses_no_row(
    undisturbed: Result, pooled: MakeRun, tmp_path: Path, seed: int
) -> None:
    """Every few seconds from the start to the end of the run, at random instants."""
    draw, over, killed = random.Random(seed), threading.Event(), list[int]()

    def kill() -> None:
        while not over.wait(draw.uniform(1, 8)):
            if found("ray::Board"):
                killed.append(signal_one("ray::Board", signal.SIGKILL))

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = train(pooled({"storage": str(tmp_path), "generation.where": "learner", "rewards.where": "learner"}))
    over.set()
    thread.join()
    assert len(killed) > 2
    assert_equal_step_by_step(result, history(undisturbed))
    missed.send(result.folder)  # what the last death may have left out
    assert_logged_once(result, undisturbed)


class Sleeper:
    """An actor that can be made to hang."""

    def pid(self) -> int:
        return os.getpid()


def test_an_actor_that_does_not_answer_is_started_again(cluster: str) -> None:
    import ray

    said: list[str] = []
    actor = ray.remote(num_cpus=0, max_restarts=-1)(Sleeper).remote()
    asked = Asked(actor, "the sleeper", 5.0, said.append)
    first = asked.ask("pid", wait=60)
    os.kill(first, signal.SIGSTOP)
    end = time.monotonic() + 60
    while (second := asked.ask("pid", wait=0.2)) in (None, first) and time.monotonic() < end:
        pass
    assert second not in (None, first)
    assert said[0] == "the sleeper has not answered for 5 s: it is started again"
    told = len(said)
    os.kill(second, signal.SIGKILL)  # it dies, and nothing is said
    while asked.ask("pid", wait=0.2) in (None, second) and time.monotonic() < end:
        pass
    assert len(said) == told
    ray.kill(actor)


class Idler:
    """A member of the pipeline."""

    def __init__(self, store: Any, role: str) -> None:
        self.beat = hangs.Beat(store, "attempt", role, 2.0)

    def work(self, seconds: float) -> int:
        with self.beat.busy():
            time.sleep(seconds)
        return os.getpid()


@pytest.mark.parametrize("how", ["stopped", "busy"])
def test_a_member_that_hangs_is_started_again_and_one_that_has_ended_is_not_named(cluster: str, how: str) -> None:
    import ray

    store = ray.remote(num_cpus=0)(WeightStore).remote("run", 9, 1, 0)
    ray.get(store.open.remote("attempt", 1))
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(Idler)
    ended, member = actor.remote(store, "gate"), actor.remote(store, "generator")
    ray.get(ended.work.remote(0))
    first = ray.get(member.work.remote(0))
    ray.kill(ended)
    if how == "stopped":
        os.kill(first, signal.SIGSTOP)
    else:
        member.work.remote(10_000)
    said, end = list[str](), time.monotonic() + 60
    while not said and time.monotonic() < end:
        for overdue, why in ray.get(store.look.remote(3.0))[2]:
            hangs.end(overdue, why, said.append)
        time.sleep(0.5)
    what = "has given no sign of life" if how == "stopped" else "works at one thing"
    assert said[0].startswith(f"the generator in process {first} on ")
    assert f"{what} for " in said[0]
    second = None
    while second is None and time.monotonic() < end + 60:
        with suppress(ray.exceptions.RayError):
            second = ray.get(member.work.remote(0))
    assert second not in (None, first)
    ray.kill(member)
    ray.kill(store)


class Rows(Progress):
    """Keeps the rows that it is to show."""

    def row(self, row: dict[str, float]) -> None:
        self.rows = [*getattr(self, "rows", []), row]


def test_the_last_rows_are_shown_though_the_board_was_asked_before_they_came(
    cluster: str, tiny_run: MakeRun, tmp_path: Path
) -> None:
    import ray

    rows = [{"step": float(step), "seconds": float(step)} for step in range(3)]
    board = ray.remote(num_cpus=0, max_restarts=-1)(Board).remote(Tracker(f"sqlite:///{tmp_path}/x.db", "0"), str(tmp_path))
    token = ray.get(board.add.remote("", [], []))
    progress = Rows(3)
    shown = Shown(tiny_run(), board, progress)
    pid = found("ray::Board")[-1]
    os.kill(pid, signal.SIGSTOP)
    shown.look(stopping=False)  # asked, and not answered
    added = board.add.remote(token, rows, [])
    os.kill(pid, signal.SIGCONT)
    ray.get(added)
    shown.last()
    assert progress.rows == rows
    ray.kill(board)


def test_who_is_silent_or_busy_for_too_long_is_overdue_once() -> None:
    members = Members()
    member = {name: Member(name, "node", [], busy) for name, busy in (("idle", 0.0), ("busy", 3.0), ("too busy", 9.0))}
    for name in member:
        members.beat(name, member[name])
    (found_busy,) = members.overdue(5.0)
    assert found_busy == (member["too busy"], "works at one thing for 9 s")
    assert members.overdue(5.0) == []
    time.sleep(0.3)
    members.beat("busy", member["idle"])
    assert [m.name for m, _ in members.overdue(0.2)] == ["idle"]  # which has not beaten since


@pytest.mark.parametrize("progress", ["none", "touches", "counts", "is stopped and goes on"])
def test_a_process_without_progress_ends_itself(progress: str, tmp_path: Path) -> None:
    program = f"""
import sys, time
from raydiff.distributed.hangs import Watchdog

calls = 0
with Watchdog(1.0, lambda why: print("barks:", why, flush=True)) as watchdog:
    watchdog.sign = lambda: calls
    print("starts", flush=True)
    for _ in range(30):
        time.sleep(0.1)
        if {progress == "touches"}:
            watchdog.touch()
        calls += {progress in ("counts", "is stopped and goes on")}
print("ends")
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "starts\n"
        if progress == "is stopped and goes on":
            process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            process.send_signal(signal.SIGCONT)
        out, errors = process.communicate(timeout=60)
    if progress == "none":
        assert process.returncode == 1
        assert out == "barks: has made no progress for 1 s\n"
        assert "most recent call first" in errors  # where each thread is
    else:
        assert (process.returncode, out) == (0, "ends\n")
