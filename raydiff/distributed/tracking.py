"""MLflow, and the one actor between a run's workers and the process that started it.

The actor lives on the driver's node, where a SQLite tracking file is, and outlives the workers: a step that was logged before
they were lost is not logged again. Nothing that MLflow does or fails to do reaches the training.
"""

from __future__ import annotations

import json
import logging
import queue
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff.config import ConfigError, Run, flat
from raydiff.distributed.storage import Folder

NAME_TAG, BEST_TAG, STOPPED_TAG = "raydiff.name", "raydiff.best", "raydiff.stopped_by"
_LONGEST = 6000  # characters of a parameter's value
_AT_ONCE = 100  # parameters in one request

Row = dict[str, float]


@dataclass(frozen=True)
class Tracker:
    """One MLflow run."""

    uri: str
    run_id: str

    def client(self) -> Any:
        return _client(self.uri)

    def steps(self) -> set[int]:
        """The steps that are logged."""
        return {metric.step for metric in self.client().get_metric_history(self.run_id, "seconds")}

    def log(self, row: Row) -> None:
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), int(row["step"])
        self.client().log_batch(
            self.run_id, metrics=[Metric(name, value, now, step) for name, value in row.items() if name != "step"]
        )

    def file(self, folder: Folder, path: str) -> None:
        """Log a file of the run's folder as an artifact of the same relative path."""
        parent = str(Path(path).parent)
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / Path(path).name
            copy.write_bytes(folder.read(path))
            self.client().log_artifact(self.run_id, str(copy), None if parent == "." else parent)

    def finish(self, status: str, tags: Mapping[str, str]) -> None:
        client = self.client()
        for name, value in tags.items():
            client.set_tag(self.run_id, name, value)
        client.set_terminated(self.run_id, status)

    def sum_up(self, metrics: Mapping[str, float], files: Sequence[Path]) -> None:
        """Log numbers that have no step, and local files as artifacts; the run is finished."""
        self.log({"step": 0, **metrics})
        for file in files:
            self.client().log_artifact(self.run_id, str(file))
        self.finish("FINISHED", {})


def uri(run: Run) -> str:
    """The tracking server, or a SQLite file in the storage folder. Raises ConfigError when that is not on a disk."""
    if run.tracking.uri is not None:
        return run.tracking.uri
    local = Folder(run.storage).local
    if local is None:
        raise ConfigError(f"tracking.uri: storage = {run.storage!r} cannot hold a SQLite file; name a tracking server")
    return f"sqlite:///{local}/mlflow.db"


def prepare(run: Run) -> str:
    """Open the tracking store, the first time for seconds as SQLite's tables are made. Returns the experiment's id."""
    return experiment(uri(run), run.tracking.experiment, Folder(run.storage))


def experiment(uri: str, name: str, folder: Folder) -> str:
    """The id of the experiment of this name, made if need be; its artifacts go to the server, or below `folder`."""
    client = _client(uri)
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    # A server has a place for artifacts; MLflow's own without one is the folder where the driver happens to run.
    server = uri.startswith(("http:", "https:", "databricks"))
    return str(client.create_experiment(name, artifact_location=None if server else (folder / "mlartifacts" / name).uri))


def open_run(
    uri: str, experiment_id: str, name: str, fields: Mapping[str, Any], tags: Mapping[str, str] | None = None
) -> Tracker:
    """A running MLflow run: found by its name's tag, or made with `fields` as parameters."""
    from mlflow.entities import Param

    client = _client(uri)
    if found := client.search_runs([experiment_id], f"tags.`{NAME_TAG}` = '{name}'", max_results=1):
        client.update_run(found[0].info.run_id, status="RUNNING")
        return Tracker(uri, found[0].info.run_id)
    run_id = client.create_run(experiment_id, tags={NAME_TAG: name, **(tags or {})}, run_name=name).info.run_id
    params = [Param(path, parameter(value)) for path, value in fields.items()]
    for i in range(0, len(params), _AT_ONCE):
        client.log_batch(run_id, params=params[i : i + _AT_ONCE])
    return Tracker(uri, run_id)


def start(run: Run, experiment_id: str, name: str, folder: Folder, tags: Mapping[str, str] | None = None) -> Tracker:
    """The MLflow run of a started run, with the run's fields as parameters."""
    tracker = open_run(uri(run), experiment_id, name, flat(run), tags)
    tracker.file(folder, "run.json")
    return tracker


def of_comparison(folder: Path, files: Sequence[Path]) -> Tracker:
    """The MLflow run of a `raydiff bench` folder, in a SQLite file there: the report's files and records, and what each method
    paid."""
    place = f"sqlite:///{folder.resolve()}/mlflow.db"
    found = json.loads((folder / "results.json").read_text())
    metrics = {
        f"{task}/{method}/queries_to_{price['threshold']:g}": price["queries"]["value"]
        for task, methods in found["tasks"].items()
        for method, result in methods.items()
        for price in result["prices"]
        if price["queries"]["value"] is not None
    }
    fields = {name: found[name] for name in ("machine", "date", "seeds")}
    tracker = open_run(place, experiment(place, "raydiff-bench", Folder(folder)), folder.resolve().name, fields)
    tracker.sum_up(metrics, [*files, *sorted((folder / "runs").glob("*.json"))])
    return tracker


def record(run: Run, name: str, metrics: Mapping[str, float], files: Sequence[Path], of: str) -> Tracker:
    """A finished MLflow run of its own, with local files as artifacts.

    `of` names a started run; where its MLflow run is in this experiment, the new one stands below it.
    """
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

    experiment_id, client = prepare(run), _client(uri(run))
    found = client.search_runs([experiment_id], f"tags.`{NAME_TAG}` = '{of}'", max_results=1)
    tags = {MLFLOW_PARENT_RUN_ID: found[0].info.run_id} if found else {}
    tracker = Tracker(uri(run), client.create_run(experiment_id, tags=tags, run_name=name).info.run_id)
    tracker.sum_up(metrics, files)
    return tracker


def close_trials(uri: str, parent: str, status: Mapping[str, str]) -> None:
    """End the MLflow runs of trials by what became of them, as one that is stopped early cannot, or takes it for a failure.

    `status` by trial: finished, stopped early or failed.
    """
    client = _client(uri)
    experiment_id = client.get_run(parent).info.experiment_id
    for run in client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'", max_results=5000):
        became = status.get(run.data.tags["ray.trial_id"])
        if became == "stopped early":
            client.set_tag(run.info.run_id, STOPPED_TAG, "the sweep's scheduler")
        ended = "FAILED" if became == "failed" else "FINISHED"
        if became and run.info.status != ended:
            client.set_terminated(run.info.run_id, ended)


def parameter(value: Any) -> str:
    """A field's value as MLflow shows it."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


class Board:
    """The actor: takes rows and files from rank 0, hands rows to the driver's progress line and a stop to the workers.

    Its methods return at once, but those that wait for MLflow, which is a thread's business.
    """

    def __init__(self, tracker: Tracker, folder: str) -> None:
        self.stopping = False
        self.news: list[Row | str] = []
        self.steps: set[int] = set()
        self.log = _Log(tracker, Folder(folder))

    def add(self, rows: list[Row], files: list[str]) -> None:
        """Rows of metrics, and paths in the run's folder to log as artifacts. A step that came before is left out."""
        for row in rows:
            if int(row["step"]) not in self.steps:
                self.steps.add(int(row["step"]))
                self.news.append(row)
                self.log.queue.put(row)
        for path in files:
            self.log.queue.put(path)

    def tell(self, text: str) -> None:
        """A line for the driver to print."""
        self.news.append(text)

    def since(self, place: int) -> list[Row | str]:
        return self.news[place:]

    def stop(self) -> None:
        self.stopping = True

    def must_stop(self) -> bool:
        return self.stopping

    def settle(self, seconds: float) -> None:
        """Wait, so long at most, until all that came has been logged, or MLflow has failed."""
        settled = threading.Event()
        self.log.queue.put(settled)
        settled.wait(seconds)

    def flush(self) -> str | None:
        """Log the rest and end. Returns what could not be logged and why, None when all was."""
        self.log.queue.put(None)
        self.log.thread.join()
        return self.log.fault


class _Log:
    """A thread that logs what is queued, in order. What fails stays, for the next time."""

    def __init__(self, tracker: Tracker, folder: Folder) -> None:
        self.tracker, self.folder = tracker, folder
        self.queue: queue.SimpleQueue[Row | str | threading.Event | None] = queue.SimpleQueue()
        self.pending: list[Row | str] = []
        self.logged: set[int] | None = None  # steps; unknown until MLflow has answered
        self.fault: str | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        while (item := self.queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                self.pending.append(item)
                self.attempt()
        self.attempt()

    def attempt(self) -> None:
        try:
            if self.logged is None:
                self.logged = self.tracker.steps()
            while self.pending:
                item = self.pending[0]
                if isinstance(item, str):
                    self.tracker.file(self.folder, item)
                elif int(item["step"]) not in self.logged:
                    self.tracker.log(item)
                    self.logged.add(int(item["step"]))
                self.pending.pop(0)
            self.fault = None
        except Exception as error:
            self.fault = f"{len(self.pending)} entries could not be logged to MLflow at {self.tracker.uri}: {error}"
            logging.getLogger(__name__).warning(self.fault)


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    for noisy in ("alembic", "mlflow"):  # importing it sets its own level
        logging.getLogger(noisy).setLevel(logging.WARNING)
    return MlflowClient(uri)
