"""The head node is lost, and the cluster with it: the run ends, and goes on with a new cluster."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from raydiff.config import Run
from raydiff.distributed import checkpoint
from raydiff.distributed.storage import Folder
from raydiff.local import fit
from tests.distributed.conftest import wait_for
from tests.distributed.test_train import ROOT, driver, index

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]
pytest.importorskip("ray")


@contextmanager
def cluster(auth: str = "disabled") -> Any:
    """Address of a node that is a cluster, and what ends it as a power cut would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.mkdtemp(prefix="raydiff-", dir="/tmp")  # Ray's sockets lie there, and their paths must be short
    start = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--num-cpus=4", f"--port={port}"]
    local = ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={folder}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": auth}  # workers import this package's rewards
    head = subprocess.Popen([*start, *local], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill() -> None:
        family = [head, *psutil.Process(head.pid).children(recursive=True)] if head.poll() is None else []
        for process in family:
            process.kill()
        head.wait()

    try:
        wait_for(lambda: Path(folder) if _answers(port) else None, 60)
        yield f"127.0.0.1:{port}", kill
    finally:
        kill()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_a_lost_head_ends_the_run_and_a_new_cluster_goes_on(ray_run: Callable[..., Run], tmp_path: Path) -> None:
    run = ray_run({"storage": str(tmp_path / "runs"), "rewards.blue.pause": 0.5})
    with ExitStack() as stack:
        address, kill = stack.enter_context(cluster())
        process = driver(run, address, tmp_path / "run.json")
        stack.callback(process.kill)
        folder = wait_for(index(run.storage, 2), 200).parents[1]
        kill()
        said = process.communicate(timeout=200)[0].decode()
        print(said)
        assert process.returncode not in (0, None)
        assert not (folder / "finished.json").exists()
    with cluster() as (address, _):
        again = driver(run, address, tmp_path / "run.json", "--resume", folder.name)
        said = again.communicate(timeout=250)[0].decode()
        assert again.returncode == 0, said
    alone = list(fit(run))
    last = checkpoint.latest(Folder(folder))
    assert last is not None
    assert [row["step"] for row in last.history] == [row["step"] for row in alone]
    for ours, theirs in zip(last.history, alone, strict=True):
        for name in theirs.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (theirs["step"], name)


def test_a_missing_token_is_named(ray_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "1" * 64)
    with cluster("token") as (address, _):
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        process = driver(ray_run(), address, tmp_path / "run.json")
        said = process.communicate(timeout=200)[0].decode()
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith(f"RAY_ADDRESS = {address!r}: ")
    assert "set RAY_AUTH_MODE=token" in said
