"""What a launch checks and shows, without a cluster."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from raydiff.config import ConfigError, Run
from raydiff.distributed import launch, tracking
from raydiff.distributed.launch import _fresh, preflight
from raydiff.distributed.progress import Progress, duration
from raydiff.distributed.storage import Folder
from raydiff.distributed.tracking import Board, Tracker
from raydiff.placement import Node

MakeRun = Callable[..., Run]


def test_preflight_names_every_fault(tiny_run: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    changes = {
        "storage": str(tmp_path / "file"), "model.path": "nowhere", "prompts.held_out": ["a cat"],
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        preflight(tiny_run(changes=changes))
    lines = str(error.value).splitlines()
    assert [re.split(r"[ :]", line)[0] for line in lines] == ["model.path", "prompts.held_out", "storage"]


def test_sqlite_needs_a_disk(tiny_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri.*name a tracking server"):
        tracking.uri(tiny_run(changes={"storage": "mock://bucket/runs"}))


def test_fresh_runs_have_folders_of_their_own(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(changes={"storage": str(tmp_path)})
    names = {_fresh(run).name for _ in range(50)}
    assert len(names) == 50
    assert all(re.fullmatch(r"tiny-\d{8}-\d{6}-[0-9a-f]{4}", name) for name in names)


def test_plain_progress_lines() -> None:
    out = io.StringIO()
    with Progress(100, Console(file=out, soft_wrap=True)) as progress:
        progress.row({"step": 0, "seconds": 3.0, "held_out/total": -0.2})
        progress.row({"step": 1, "seconds": 5.0, "reward/total": -0.15})  # too soon after the last line
        progress.row({"step": 2, "seconds": 7.0, "reward/total": -0.1, "held_out/total": -0.12})
    assert out.getvalue().splitlines() == [
        "update 0/100  held-out -0.2000",
        "update 2/100  reward -0.1000  held-out -0.1200  2.00 s an update  3 min 16 s left",
    ]
    assert [duration(s) for s in (4, 64, 3700)] == ["4 s", "1 min 04 s", "1 h 01 min"]


def test_board_logs_each_step_once_and_catches_up(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(changes={"storage": str(tmp_path)})
    folder = Folder(tmp_path) / "tiny-1"
    folder.write("run.json", b"{}")
    tracker = tracking.start(run, tracking.prepare(run), folder.name, folder)
    first = Board(tracker, folder.uri)
    first.add([{"step": 1, "seconds": 1.0, "loss": 0.5}], [])
    first.add([{"step": 1, "seconds": 1.0, "loss": 0.5}, {"step": 2, "seconds": 2.0, "loss": 0.25}], [])
    assert [row["step"] for row in first.since(0)] == [1, 2]
    first.settle(60)
    assert [m.value for m in tracker.client().get_metric_history(tracker.run_id, "loss")] == [0.5, 0.25]
    assert first.flush() is None

    # After a crash: the same MLflow run by its name, and only what is missing.
    again = tracking.start(run, tracking.prepare(run), folder.name, folder)
    assert again == tracker
    folder.write("pictures/grid.png", b"png")
    second = Board(again, folder.uri)
    second.add([{"step": step, "seconds": float(step), "loss": 1 / step} for step in (1, 2, 3)], ["pictures/grid.png"])
    assert second.flush() is None
    client = tracker.client()
    assert [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "loss")] == [(1, 0.5), (2, 0.25), (3, 1 / 3)]
    assert [item.path for item in client.list_artifacts(tracker.run_id, "pictures")] == ["pictures/grid.png"]


def test_board_survives_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    board = Board(Tracker("http://127.0.0.1:9", "0"), str(tmp_path))  # nobody listens there
    board.add([{"step": 1, "seconds": 1.0}], ["missing.png"])
    assert board.since(0) == [{"step": 1, "seconds": 1.0}]
    board.settle(60)  # does not wait for what failed
    said = board.flush()
    assert said is not None
    assert said.startswith("2 entries could not be logged to MLflow")


@pytest.mark.parametrize(
    ("room", "least", "workers"), [(4, 1, 4), (3, 1, 2), (3, 2, 2), (1, 2, None), (3, 3, None), (2, None, None)]
)
def test_lost_trainers(tiny_run: Callable[..., Run], room: int, least: int | None, workers: int | None) -> None:
    """8 prompts in micro-batches of 2 go to 4, 2 or 1 workers."""
    batch = {"batch": {"size": 8, "micro": 2}, "pools.train.replicas": 4, "pools.train.min_replicas": least}
    fewer = launch.with_fewer_trainers(tiny_run(changes=batch), [Node(1)] * room)
    assert (fewer.pools.train.replicas if fewer else None) == workers
