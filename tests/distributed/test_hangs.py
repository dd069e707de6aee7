"""What hangs is started again: each role of a run, stopped for good at some instant, and the run goes on to the same numbers."""

import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydiff.config import Run
from raydiff.distributed import launch, tracking
from raydiff.distributed.launch import Result, train
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
        ("MapBatches(Generator)", "the generator in process"),
        pytest.param("RewardReplica", "reward replica", marks=pytest.mark.slow),
        pytest.param("RayTrainWorker", None, marks=pytest.mark.slow),
    ],
)
def test_what_is_stopped_for_good_is_started_again(
    undisturbed: Result, pooled: MakeRun, said: list[str], tmp_path: Path, title: str, named: str | None
) -> None:
    stopped: list[int] = []

    def stop() -> None:
        wait_for(lambda: next(iter(tmp_path.glob("*/checkpoint_000001/checkpoint.json")), None))
        time.sleep(random.Random(title).uniform(0, 2))
        stopped.append(signal_one(title, signal.SIGSTOP))

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    start = time.monotonic()
    result = train(pooled({"storage": str(tmp_path), "train.timeout": LIMIT, "rewards.blue.pause": 0.3}))
    thread.join()
    print(f"{title}: {time.monotonic() - start:.0f} s, {said}")
    assert stopped[0] not in found(title)  # it was ended
    if named:
        again = [line for line in said if "it is started again" in line]
        assert len(again) == 1
        assert again[0].startswith(named)
    assert_equal_step_by_step(result, history(undisturbed))
    assert distance(result, undisturbed) < 1e-5
    client = tracking.Tracker(result.mlflow_uri, result.mlflow_run_id).client()
    steps = [m.step for m in client.get_metric_history(result.mlflow_run_id, "seconds")]
    assert steps == [row["step"] for row in history(undisturbed)]
