"""What a launch checks and shows, without a cluster."""

import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from raydiff.config import ConfigError, Run
from raydiff.distributed import launch, run_folder, tracking
from raydiff.distributed.board import Board
from raydiff.distributed.launch import preflight
from raydiff.distributed.lease import Lease
from raydiff.distributed.progress import Progress, duration
from raydiff.distributed.storage import Folder
from raydiff.distributed.tracking import Tracker
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
    names = {run_folder.fresh(run).name for _ in range(50)}
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
    first.add(first.token, [{"step": 1, "seconds": 1.0, "loss": 0.5}], [])
    first.add(first.token, [{"step": 1, "seconds": 1.0, "loss": 0.5}, {"step": 2, "seconds": 2.0, "loss": 0.25}], [])
    assert [row["step"] for row in first.since("", 0)[1]] == [1, 2]
    first.settle(60)
    assert [m.value for m in tracker.client().get_metric_history(tracker.run_id, "loss")] == [0.5, 0.25]
    assert first.flush() is None

    # After a crash: the same MLflow run by its name, and only what is missing.
    again = tracking.start(run, tracking.prepare(run), folder.name, folder)
    assert again == tracker
    folder.write("pictures/grid.png", b"png")
    second = Board(again, folder.uri)
    second.add(
        second.token, [{"step": step, "seconds": float(step), "loss": 1 / step} for step in (1, 2, 3)], ["pictures/grid.png"]
    )
    assert second.flush() is None
    client = tracker.client()
    assert [(m.step, m.value) for m in client.get_metric_history(tracker.run_id, "loss")] == [(1, 0.5), (2, 0.25), (3, 1 / 3)]
    assert [item.path for item in client.list_artifacts(tracker.run_id, "pictures")] == ["pictures/grid.png"]


def test_a_board_that_was_started_again_forgets_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its token says that it is another one; who asks starts from the beginning, and who tells is asked to tell all."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker("http://127.0.0.1:9", "0")  # nobody listens there
    rows = [{"step": step, "seconds": 10.0 * step} for step in range(5)]
    first, second = Board(tracker, str(tmp_path)), Board(tracker, str(tmp_path))
    first.add(first.token, rows[:3], [])
    token, news = first.since("", 0)
    assert (token, news) == (first.token, rows[:3])
    assert second.add(token, rows[3:4], []) == second.token  # not added: the ones before would be missing
    assert second.since(token, 3, stopping=True) == (second.token, [])
    assert second.must_stop()
    second.add(second.token, rows[:4], [])
    assert second.since(second.token, 2) == (second.token, rows[2:4])
    assert second.clock(0.0) == pytest.approx(30, abs=1)  # of the last row that it was told, and not from 0
    assert first.clock(100.0) == pytest.approx(20, abs=1)
    fresh = Board(tracker, str(tmp_path))
    assert fresh.clock(100.0) == pytest.approx(100, abs=1)


@pytest.mark.parametrize("finished", [False, True])
def test_runs_of_killed_drivers_are_ended(tiny_run: MakeRun, tmp_path: Path, finished: bool) -> None:
    """By the next run in the experiment; those at work stay, and those of another host until their lease stands still."""
    run = tiny_run(changes={"storage": str(tmp_path)})
    client, experiment = tracking._client(tracking.uri(run)), tracking.prepare(run)
    folders = {name: Folder(tmp_path) / name for name in ("killed", "released", "at-work", "elsewhere")}
    runs = {
        name: client.create_run(experiment, tags={tracking.FOLDER_TAG: folder.uri}).info.run_id
        for name, folder in folders.items()
    }
    program = (
        "import os, signal, sys\nfrom raydiff.distributed.lease import Lease\nfrom raydiff.distributed.storage import Folder\n"
        "Lease(Folder(sys.argv[1])).take(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, folders["killed"].uri]).returncode == -9
    beat = {"token": "x", "host": "h", "machine": "another", "pid": 1, "started": 1, "beat": 3}
    folders["elsewhere"].write_json("lease.json", beat)
    if finished:
        folders["killed"].write_json("finished.json", {})
    with Lease(folders["at-work"]) as lease:
        lease.take()
        tracking.end_abandoned(tracking.uri(run), experiment, patience=0.5)
        states = {name: client.get_run(run_id).info.status for name, run_id in runs.items()}
    ended = "FINISHED" if finished else "KILLED"
    assert states == {"killed": ended, "released": "KILLED", "at-work": "RUNNING", "elsewhere": "KILLED"}


def test_board_survives_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    board = Board(Tracker("http://127.0.0.1:9", "0"), str(tmp_path))  # nobody listens there
    board.add(board.token, [{"step": 1, "seconds": 1.0}], ["missing.png"])
    assert board.since("", 0)[1] == [{"step": 1, "seconds": 1.0}]
    board.settle(60)  # does not wait for what failed
    said = board.flush()
    assert said is not None
    assert said.startswith("2 entries could not be logged to MLflow")


def opened(run: Run, tmp_path: Path, name: str = "tiny-1") -> tuple[Tracker, Folder]:
    folder = Folder(tmp_path) / name
    folder.write("run.json", b"{}")
    return tracking.start(run, tracking.prepare(run), folder.name, folder), folder


@pytest.mark.parametrize("name", ["reward/clip@0.5", "a/../b", "x" * 300])
def test_what_mlflow_refuses_for_good_is_left_out_and_told_once(
    tiny_run: MakeRun, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, folder = opened(tiny_run(changes={"storage": str(tmp_path)}), tmp_path)
    board = Board(tracker, folder.uri)
    board.add(
        board.token,
        [{"step": step, "seconds": float(step), name: 0.5, "loss": 1 / step} for step in (1, 2, 3)],
        ["nowhere.png"],
    )
    board.settle(60)
    folder.write("grid.png", b"png")
    board.add(board.token, [], ["grid.png"])
    assert board.flush() is None
    assert len(board.left_out().splitlines()) == 2
    assert f"MLflow refuses {name!r} for good, and it is left out: " in board.left_out()
    assert "MLflow refuses 'nowhere.png' for good" in board.left_out()
    assert len([r for r in caplog.records if repr(name) in r.message]) == 1
    client = tracker.client()
    assert [m.value for m in client.get_metric_history(tracker.run_id, "loss")] == [1, 1 / 2, 1 / 3]
    assert "grid.png" in [item.path for item in client.list_artifacts(tracker.run_id)]


def test_a_run_that_mlflow_has_deleted_is_no_fault_of_the_names(tiny_run: MakeRun, tmp_path: Path) -> None:
    """Nothing can be logged, and nothing is given up: it may be restored."""
    tracker, folder = opened(tiny_run(changes={"storage": str(tmp_path)}), tmp_path)
    tracker.client().delete_run(tracker.run_id)
    board = Board(tracker, folder.uri)
    board.add(board.token, [{"step": 1, "seconds": 1.0, "loss": 0.5}], [])
    board.settle(60)
    assert board.left_out() == ""
    tracker.client().restore_run(tracker.run_id)
    assert board.flush() is None
    assert tracker.steps() == {1}


def test_a_parameter_that_mlflow_refuses_stops_no_run(
    tiny_run: MakeRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tiny_run(changes={"storage": str(tmp_path), "pools.train.labels": {"zone@home": "a"}})
    tracker, _ = opened(run, tmp_path)
    params = tracker.client().get_run(tracker.run_id).data.params
    assert params["name"] == "tiny"
    assert "MLflow refuses 'pools.train.labels.zone@home' for good" in caplog.text


def test_a_run_is_found_again_by_any_name(tmp_path: Path) -> None:
    uri = tracking._sqlite(tmp_path, "storage")
    experiment = tracking.experiment(uri, "x", Folder(tmp_path))
    names = ["it's", 'say "x"', "a%b", "grün", "other"]
    first = [tracking.open_run(uri, experiment, name, {}) for name in names]
    assert len({tracker.run_id for tracker in first}) == len(names)
    assert [tracking.open_run(uri, experiment, name, {}) for name in names] == first


START = """
import sys
from raydiff.distributed import tracking
from raydiff.distributed.storage import Folder
folder, name = Folder(sys.argv[1]), sys.argv[2]
uri = tracking._sqlite(folder.local, "storage")
tracker = tracking.open_run(uri, tracking.experiment(uri, "fresh", folder), name, {"a": 1})
tracker.log({"step": 1, "seconds": 1.0})
"""


@pytest.mark.timeout(300)
def test_runs_that_start_at_once_in_a_fresh_folder_all_start(tmp_path: Path) -> None:
    """Three real processes; and what one that died over the tables has left is no hindrance."""
    (tmp_path / ".mlflow.db.draft").write_bytes(b"half of a file")
    runs = [subprocess.Popen([sys.executable, "-c", START, str(tmp_path), f"run-{i}"]) for i in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    client = tracking._client(tracking._sqlite(tmp_path, "storage"))
    (fresh,) = [e for e in client.search_experiments() if e.name == "fresh"]
    assert sorted(run.info.run_name for run in client.search_runs([fresh.experiment_id])) == ["run-0", "run-1", "run-2"]


def test_a_file_that_is_no_database_and_a_deleted_experiment_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "mlflow.db").write_text("not a database, and longer than SQLite's own header of a hundred bytes" * 9)
    with pytest.raises(ConfigError, match=r"mlflow\.db cannot be used as MLflow's SQLite file .*move it away"):
        tracking.experiment(tracking._sqlite(tmp_path / "broken", "storage"), "x", Folder(tmp_path))
    uri = tracking._sqlite(tmp_path, "storage")
    tracking._client(uri).delete_experiment(tracking.experiment(uri, "x", Folder(tmp_path)))
    with pytest.raises(ConfigError, match=r"tracking\.experiment = 'x' was deleted in MLflow"):
        tracking.experiment(uri, "x", Folder(tmp_path))


@pytest.mark.parametrize("name", ["a?b", "a%41b", "?", "%2F"])
def test_a_path_that_mlflow_would_read_otherwise_is_refused_and_planned(tiny_run: MakeRun, tmp_path: Path, name: str) -> None:
    from raydiff.plan import plan
    from raydiff.plan.clusters import here

    run = tiny_run(changes={"storage": str(tmp_path / name)})
    with pytest.raises(ConfigError, match=r"^storage = .*: MLflow would take .* give another folder$"):
        tracking.uri(run)
    with pytest.raises(ConfigError, match="^storage = "):
        preflight(run)
    assert any(fault.startswith("storage = ") for fault in plan(run, here()).problems)
    assert tracking.uri(tiny_run(changes={"storage": str(tmp_path / name), "tracking.uri": "http://host"})) == "http://host"


@pytest.mark.parametrize("name", ["a b#c", "a%b;c=1&d", "a'b: grün"])
def test_other_paths_hold_the_file_and_the_artifacts(tiny_run: MakeRun, tmp_path: Path, name: str) -> None:
    run = tiny_run(changes={"storage": str(tmp_path / name), "tracking.experiment": name})
    folder = Folder(tmp_path / name) / "tiny-1"
    folder.write("run.json", b"{}")
    tracker = tracking.start(run, tracking.prepare(run), folder.name, folder)
    assert (tmp_path / name / "mlflow.db").is_file()
    assert (tmp_path / name / "mlartifacts" / name / tracker.run_id / "artifacts" / "run.json").is_file()
    assert [file.name for file in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("room", "least", "workers"), [(4, 1, 4), (3, 1, 2), (3, 2, 2), (1, 2, None), (3, 3, None), (2, None, None)]
)
def test_lost_trainers(tiny_run: Callable[..., Run], room: int, least: int | None, workers: int | None) -> None:
    """8 prompts in micro-batches of 2 go to 4, 2 or 1 workers."""
    batch = {"batch": {"size": 8, "micro": 2}, "pools.train.replicas": 4, "pools.train.min_replicas": least}
    fewer = launch.with_fewer_trainers(tiny_run(changes=batch), [Node(1)] * room)
    assert (fewer.pools.train.replicas if fewer else None) == workers
