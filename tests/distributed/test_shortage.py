"""What a run does when memory or a disk beside its storage runs out."""

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from raydiff.config import Run
from raydiff.distributed import missed
from raydiff.distributed.launch import Result, train
from tests.distributed.conftest import fill, wait_for
from tests.distributed.pools import assert_equal_step_by_step, found, history
from tests.distributed.test_train import distance, index, steps

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
MakeRun = Callable[..., Run]


@pytest.fixture
def cgroup(tmp_path: Path) -> Iterator[Path]:
    """A group of processes that may take 4 MiB more of memory."""
    group = Path("/sys/fs/cgroup/memory") / f"raydiff-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(4 * 2**20))
    except OSError:
        pytest.skip("needs the right to make a control group of version 1")
    yield group
    wait_for(lambda: None if (group / "cgroup.procs").read_text() else group)
    group.rmdir()


@pytest.mark.slow
def test_a_trainer_that_runs_out_of_its_groups_memory_changes_nothing(
    uninterrupted: Result, ray_run: MakeRun, tmp_path: Path, cgroup: Path
) -> None:
    """The kernel kills it, as it does in a container with a limit."""
    victims: list[int] = []

    def squeeze() -> None:
        wait_for(index(str(tmp_path), 1))
        victims.append(found("ray::RayTrainWorker")[-1])
        (cgroup / "cgroup.procs").write_text(str(victims[0]))

    thread = threading.Thread(target=squeeze, daemon=True)
    thread.start()
    result = train(ray_run({"storage": str(tmp_path), "rewards.blue.pause": 0.3}))
    thread.join()
    assert "oom_kill 1" in (cgroup / "memory.oom_control").read_text()
    assert_equal_step_by_step(result, history(uninterrupted))
    assert distance(result, uninterrupted) < 1e-5


def test_a_full_disk_of_mlflow_costs_the_training_nothing(
    uninterrupted: Result, ray_run: MakeRun, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ballast: list[Path] = []

    def fill_it() -> None:
        wait_for(index(str(tmp_path), 1))
        ballast.append(fill(small_disk))

    thread = threading.Thread(target=fill_it, daemon=True)
    thread.start()
    result = train(
        ray_run({"storage": str(tmp_path), "tracking.uri": f"sqlite:///{small_disk}/mlflow.db", "rewards.blue.pause": 0.3})
    )
    thread.join()
    assert_equal_step_by_step(result, history(uninterrupted))
    assert f"raydiff log {result.folder} sends what is missing" in capsys.readouterr().out
    ballast[0].unlink()
    missed.send(result.folder)
    assert steps(result, "loss") == [1, 2, 3, 4]
