"""Sweeps on a real cluster: a failing trial, its resumption, early stopping, and what does not fit."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raydiff import config
from raydiff.config import ConfigError, Run, load
from raydiff.contents import Contents
from raydiff.distributed import checkpoint, launch, tracking
from raydiff.distributed.progress import Progress
from raydiff.distributed.storage import Folder
from raydiff.distributed.sweep import Result, _fresh, _held, _resumed, recipe_of, sweep
from raydiff.search import Sweep
from tests.distributed.conftest import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(500)]
UPDATES = 4
MakeSweep = Callable[..., Sweep]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two CPUs, and the dashboard, which frees what stopped trials leave."""
    ray = pytest.importorskip("ray")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    ray.init(num_cpus=2, include_dashboard=True, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def make_sweep(ray_run: Callable[..., Run], tmp_path: Path) -> MakeSweep:
    """make_sweep(space, {recipe changes}, **fields): trials of one worker, with a checkpoint at every update."""

    def make(space: dict[str, Any], changes: dict[str, Any] | None = None, **fields: Any) -> Sweep:
        small = {"pools.train.replicas": 1, "storage": str(tmp_path / "runs"), "evaluate.every": 1, "train.max_failures": 0}
        recipe = tmp_path / "recipe.json"
        recipe.write_text(ray_run(small | (changes or {})).model_dump_json())
        return config.validated({"name": "tiny", "recipe": str(recipe), "space": space, **fields}, Sweep)

    return make


def edited(sweep: Sweep, changes: dict[str, Any]) -> Sweep:
    """The sweep after its recipe's file was edited: as a second `raydiff sweep` reads it."""
    recipe = Path(sweep.recipe)
    recipe.write_text(config.override(load(recipe), changes).model_dump_json())
    again = {k: v for k, v in sweep.model_dump(mode="json", exclude_unset=True).items() if k != "content"}
    return config.validated(again, Sweep)


def test_a_resumed_sweep_has_the_recipe_that_it_was_started_with(make_sweep: MakeSweep, tmp_path: Path) -> None:
    space = {"optimizer.lr": {"choice": [0.001, 0.003]}}
    tiny = make_sweep(space, search="grid")
    folder = _fresh(tiny, tiny.base())
    assert _resumed(tiny, tiny.base(), folder.name).uri == folder.uri
    moved = edited(tiny, {"pools.train.num_cpus": 0.5, "tracking.experiment": "more", "train.max_failures": 2})
    assert _resumed(moved, moved.base(), folder.name).uri == folder.uri
    other = edited(tiny, {"optimizer.weight_decay": 0.5, "train.updates": 9, "evaluate.every": 3})
    with pytest.raises(ConfigError, match=f"resume = '{folder.name}': .* set these back, or start a fresh one") as error:
        _resumed(other, other.base(), folder.name)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "evaluate.every: 1 then, 3 now",
        "optimizer.weight_decay: 0.0 then, 0.5 now",
        "train.updates: 4 then, 9 now",
    ]
    wider = make_sweep({"optimizer.lr": {"choice": [0.001]}}, search="grid", seed=3)
    with pytest.raises(ConfigError, match=r"space: (.|\n)*seed: 0 then, 3 now"):
        _resumed(wider, wider.base(), folder.name)
    kept = folder.read_json("sweep.json")
    folder.write_json("sweep.json", {k: v for k, v in kept.items() if k != "content"})
    with pytest.raises(ConfigError, match=r"sweep\.json does not hold the recipe; start a fresh sweep"):
        _resumed(tiny, tiny.base(), folder.name)


def test_trials_share_what_their_files_held(make_sweep: MakeSweep, tmp_path: Path) -> None:
    prompts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file in prompts:
        file.write_text(f"a cat of {file.stem}\na dog\n")
    tiny = make_sweep({"prompts.train": {"choice": [str(file) for file in prompts]}}, search="grid")
    folder, examples = _fresh(tiny, tiny.base()), tiny.examples()
    held = _held(examples, folder, resumed=False)
    assert _held(examples, folder, resumed=True) == held
    prompts[1].write_text("an owl\n")
    with pytest.raises(ConfigError, match=r"start afresh:\n  prompts\.train = .*/b\.txt: \w{12} then, \w{12} now$"):
        _held(examples, folder, resumed=True)
    first, second = examples
    held.at_place(first).compare(Contents.of(first).digests)
    with pytest.raises(ConfigError, match=r"prompts\.train: "):  # before the trial asks for anything
        launch.trial(second, "t2", {}, Progress(1), held.at_place(second))
    assert (Folder(second.storage) / "t2").size("run.json") is None


def test_the_best_recipe_is_what_the_trial_ran(make_sweep: MakeSweep, tmp_path: Path) -> None:
    tiny = make_sweep({"optimizer.lr": {"choice": [0.001]}}, search="grid")
    ran = tiny.run({"optimizer.lr": 0.25, "name": "t1", "storage": str(tmp_path / "s"), "tracking.uri": "http://server"})
    (Folder(tmp_path / "s") / "t1").write("run.json", ran.model_dump_json().encode())
    assert recipe_of(Folder(tmp_path / "s") / "t1", tiny.base()) == tiny.run({"optimizer.lr": 0.25})


def test_a_recipe_that_is_edited_meanwhile_changes_no_trial(cluster: None, make_sweep: MakeSweep) -> None:
    """One trial at a time: the second one starts when the recipe's file says something else."""
    tiny = make_sweep({"method.n": {"choice": [1, 2]}}, {"train.updates": 1}, search="grid", max_concurrent=1)
    lr, storage = tiny.base().optimizer.lr, Path(tiny.base().storage)

    def edit() -> None:
        wait_for(lambda: next(iter(storage.glob("tiny-*/*/run.json")), None))
        edited(tiny, {"optimizer.lr": 50 * lr})

    thread = threading.Thread(target=edit, daemon=True)
    thread.start()
    result = sweep(tiny)
    thread.join()
    assert load(tiny.recipe).optimizer.lr == 50 * lr
    ran = {o.trial: load(Path(result.folder) / o.trial / "run.json") for o in result.outcomes}
    assert [run.optimizer.lr for run in ran.values()] == [lr, lr]
    assert {run.method.n for run in ran.values()} == {1, 2}
    assert result.best is not None
    best = load(result.best)
    assert (best.optimizer.lr, best.method) == (lr, ran[result.outcomes[0].trial].method)


def logged(result: Result) -> tuple[Any, list[Any]]:
    """The parent's MLflow run, and its children's."""
    client = tracking.Tracker(result.mlflow_uri, result.mlflow_run_id).client()
    (experiment,) = [e for e in client.search_experiments() if e.name == "raydiff"]
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert [run.info.run_id for run in parents] == [result.mlflow_run_id]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == result.mlflow_run_id]
    assert len(children) == len(runs) - 1
    return parents[0], children


def test_one_of_four_fails_and_only_that_one_runs_again(cluster: None, make_sweep: MakeSweep, tmp_path: Path) -> None:
    space = {"optimizer.lr": {"choice": [0.001, 0.003, 0.01, 0.03]}}
    died = {"rewards.blue.die_once": str(tmp_path / "died"), "rewards.blue.die_at": 5}  # in the third update
    tiny = make_sweep(space, died, search="grid", penalty={"weight": 0.1})
    first = sweep(tiny)
    assert sorted(o.status for o in first.outcomes) == ["failed", "finished", "finished", "finished"]
    (failed,) = first.failed
    assert [p.update for p in failed.points] == [0, 1, 2]
    for outcome in first.outcomes:
        rows = checkpoint.latest(Folder(first.folder) / outcome.trial).history  # type: ignore[union-attr]
        for point in outcome.points:
            row = rows[point.update] if point.update < len(rows) else None
            assert row is None or point.objective == pytest.approx(row["held_out/total"] - 0.1 * row["drift"])
    parent, children = logged(first)
    assert (parent.info.status, len(children)) == ("FAILED", 4)
    assert sorted(c.info.status for c in children) == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]
    written = {o.trial: (Path(first.folder) / o.trial / "finished.json") for o in first.outcomes}
    times = {trial: file.stat().st_mtime_ns for trial, file in written.items() if file.exists()}

    again = sweep(tiny, resume=first.name)
    assert [o.status for o in again.outcomes] == ["finished"] * 4
    assert {o.trial: o.values for o in again.outcomes} == {o.trial: o.values for o in first.outcomes}
    assert {trial: file.stat().st_mtime_ns for trial, file in written.items() if trial in times} == times
    parent, children = logged(again)
    assert (parent.info.status, len(children)) == ("FINISHED", 4)
    client = tracking.Tracker(again.mlflow_uri, "").client()
    for child in children:
        steps = [m.step for m in client.get_metric_history(child.info.run_id, "held_out/total")]
        assert steps == list(range(UPDATES + 1)), child.data.tags
    place = json.loads((Path(again.folder) / failed.trial / "run.json").read_text())
    assert place["optimizer"]["lr"] == failed.values["optimizer.lr"]

    names = {item.path for item in client.list_artifacts(again.mlflow_run_id)}
    assert names == {"trials.md", "best.toml", "learning_curves.png", "parallel_coordinates.png"}
    best = again.outcomes[0]
    assert again.best is not None
    assert load(again.best).optimizer.lr == best.values["optimizer.lr"]
    assert load(again.best).storage == tiny.base().storage
    assert best.best is not None
    assert all(o.best is not None and o.best.objective <= best.best.objective for o in again.outcomes)
    assert f"| {best.trial} |" in (Path(again.folder) / "trials.md").read_text().splitlines()[2]


@pytest.mark.slow
def test_early_stopped_trials_make_room_for_others(cluster: None, make_sweep: MakeSweep) -> None:
    """Two at a time in two CPUs: unless the stopped ones are freed, the later ones never start."""
    import ray

    space = {"optimizer.lr": {"choice": [0.03, 0.01, 1e-6, 1e-7]}}
    changes = {"rewards.blue.pause": 0.2, "train.updates": 5}
    scheduler = {"kind": "asha", "grace": 24, "reduction": 2}  # two updates of 4 prompts and 3 rewards each
    result = sweep(make_sweep(space, changes, search="grid", scheduler=scheduler))
    status = {o.values["optimizer.lr"]: o.status for o in result.outcomes}
    assert status[0.03] == "finished" or status[0.01] == "finished"
    assert status[1e-6] == status[1e-7] == "stopped early"
    assert not result.failed
    stopped = next(o for o in result.outcomes if o.status == "stopped early")
    assert 24 <= stopped.points[-1].reward_queries < 5 * 12
    _, children = logged(result)
    client, starts = tracking.Tracker(result.mlflow_uri, "").client(), sorted(c.info.start_time for c in children)
    ends = sorted(client.get_metric_history(c.info.run_id, "held_out/total")[-1].timestamp for c in children)
    assert all(start > end for start, end in zip(starts[2:], ends, strict=False)), "more than two at a time"
    assert {c.info.status for c in children} == {"FINISHED"}
    assert sum("raydiff.stopped_by" in c.data.tags for c in children) == sum(s == "stopped early" for s in status.values())
    end = time.monotonic() + 60  # Ray tells with some delay
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.5)


def test_what_does_not_fit_is_refused_with_the_sum(cluster: None, make_sweep: MakeSweep) -> None:
    space = {"method.n": {"choice": [1, 2]}}
    with pytest.raises(ConfigError, match=r"pools\.train: 4 × \(1 CPUs\) = 4 CPUs; the cluster has 2 CPUs .* room for 2"):
        sweep(make_sweep(space, {"pools.train.replicas": 4, "batch.size": 8}, search="grid"))
    with pytest.raises(ConfigError, match=r"max_concurrent = 2: a trial claims train 2 × \(1 CPUs\).*has 2 CPUs.*room for 1"):
        sweep(make_sweep(space, {"pools.train.replicas": 2}, search="grid", max_concurrent=2))


@pytest.mark.slow
def test_optuna_draws_the_next_trials_from_the_first(cluster: None, make_sweep: MakeSweep) -> None:
    pytest.importorskip("optuna")
    space = {"optimizer.lr": {"loguniform": [1e-3, 1e-1]}, "method.n": {"choice": [1, 2]}}
    result = sweep(make_sweep(space, {"train.updates": 1}, search="optuna", trials=3, max_concurrent=1))
    assert [o.status for o in result.outcomes] == ["finished"] * 3
    assert len({o.values["optimizer.lr"] for o in result.outcomes}) == 3
    assert all(1e-3 <= o.values["optimizer.lr"] <= 1e-1 and o.values["method.n"] in (1, 2) for o in result.outcomes)
    parent, children = logged(result)
    assert (parent.info.status, len(children)) == ("FINISHED", 3)
