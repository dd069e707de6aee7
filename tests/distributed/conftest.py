"""One local Ray cluster for all tests here, and one uninterrupted run that others are compared with."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from raydiff.config import Run, override
from raydiff.distributed.launch import Result, train

UPDATES = 4


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster of 4 declared CPUs, one for each module: others start clusters of several nodes."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_run(tiny_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """ray_run({"reward.pause": 1}): two workers at ZeRO-2, DRaFT-LV, a moving average, a checkpoint at every update."""
    storage = tmp_path_factory.mktemp("storage")

    def make(changes: dict[str, Any] | None = None) -> Run:
        base = tiny_run(
            "draft_lv",
            {
                "storage": str(storage),
                "rewards": {"blue": {"kind": "tests.distributed.steered"}},
                "evaluate.rewards": {"green": {"kind": "colour", "rgb": [0.2, 0.9, 0.2]}},
                "sampler.steps": 2,
                "optimizer.ema": 0.6,
                "pools.train.replicas": 2,
                "train": {"updates": UPDATES, "zero_stage": 2, "checkpoint_every": 1, "keep_checkpoints": 3},
            },
        )
        return override(base, changes or {})

    return make


@pytest.fixture(scope="module")
def pooled(tiny_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """pooled({"method.n": 1}): two trainers, two generators and two reward replicas, on-policy, on 4 CPUs."""
    storage = str(tmp_path_factory.mktemp("storage"))

    def make(changes: dict[str, Any] | None = None, method: str = "draft_lv") -> Run:
        return tiny_run(
            method,
            {
                "storage": storage,
                "model.kind": "tests.distributed.faulty",
                "rewards": {"blue": {"kind": "tests.distributed.steered"}, "mirror": {"kind": "symmetry", "weight": 0.3}},
                "evaluate": {"images": 4, "every": 2, "grid": 0, "rewards": {"size": {"kind": "jpeg_size"}}},
                "batch": {"size": 4, "micro": 1},
                "generation.max_staleness": 0,
                "train": {"updates": 3, "checkpoint_every": 1},
                "pools.train": {"replicas": 2, "num_cpus": 0.5},
                "pools.generate": {"replicas": 2, "num_cpus": 0.5},
                "pools.reward": {"replicas": 2, "num_cpus": 0.25},
                "generation.where": "pool",
                "rewards.where": "pool",
                **(changes or {}),
            },
        )

    return make


@pytest.fixture(scope="module")
def uninterrupted(cluster: str, ray_run: Callable[..., Run]) -> Result:
    return train(ray_run())


def wait_for(found: Callable[[], Path | None], seconds: float = 120) -> Path:
    """The path that `found` returns in the end."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path := found():
            return path
        time.sleep(0.05)
    raise TimeoutError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 4 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # MLflow keeps its file open


def fill(disk: Path) -> Path:
    """Leave no room on a filesystem. Returns what takes it up."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    return ballast
