"""MLflow: its runs of a run, a sweep and a benchmark, and what it refuses."""

from __future__ import annotations

import fcntl
import functools
import json
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff import drafts
from raydiff.config import ConfigError, Run, Tracking, flat
from raydiff.distributed import checkpoint, lease
from raydiff.distributed.storage import Folder
from raydiff.preflight import metrics_fault, unquotable

NAME_TAG, BEST_TAG, STOPPED_TAG = "raydiff.name", "raydiff.best", "raydiff.stopped_by"
FOLDER_TAG = "raydiff.folder"
_LONGEST = 6000  # characters of a parameter's value
_AT_ONCE = 100  # parameters in one request

_FOR_GOOD = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}  # MLflow's codes for what it will never take

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

    def log(self, row: Row) -> dict[str, str]:
        """Log a row's metrics. Returns {metric: why} of those that MLflow refuses for good, and has logged the others."""
        from mlflow.entities import Metric

        now, step = int(time.time() * 1000), int(row["step"])
        metrics = [Metric(name, value, now, step) for name, value in row.items() if name != "step"]
        return _all_but_refused(lambda some: self.client().log_batch(self.run_id, metrics=some), metrics)

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
        warn(self.log({"step": 0, **metrics}))
        for file in files:
            self.client().log_artifact(self.run_id, str(file))
        self.finish("FINISHED", {})


def uri(run: Run) -> str:
    """The tracking server, or a SQLite file in the storage folder. Raises ConfigError when that cannot be."""
    if fault := metrics_fault(run):
        raise ConfigError(fault)
    if run.tracking.uri is not None:
        return run.tracking.uri
    local = Folder(run.storage).local
    if local is None:
        raise ConfigError(f"tracking.uri: storage = {run.storage!r} cannot hold a SQLite file; name a tracking server")
    return _sqlite(local, f"storage = {run.storage!r}")


def _sqlite(folder: Path, field: str) -> str:
    """The URI of a folder's SQLite file. Raises ConfigError."""
    if fault := unquotable(folder, field):
        raise ConfigError(fault)
    return f"sqlite:///{folder}/mlflow.db"


def prepare(run: Run) -> str:
    """Open the tracking store, the first time for seconds as SQLite's tables are made. Returns the experiment's id."""
    return experiment(uri(run), run.tracking.experiment, Folder(run.storage))


def experiment(uri: str, name: str, folder: Folder) -> str:
    """The id of the experiment of this name, made if need be; its artifacts go to the server, or below `folder`.

    Raises ConfigError for one that was deleted.
    """
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    # A server has a place for artifacts; MLflow's own without one is the folder where the driver happens to run.
    place = None if Tracking(uri=uri).served else (folder / "mlartifacts" / name).uri
    if (found := client.get_experiment_by_name(name)) is None:
        try:
            return str(client.create_experiment(name, artifact_location=place))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)  # made by another run that was started at once
    if found.lifecycle_stage == "deleted":
        raise ConfigError(f"tracking.experiment = {name!r} was deleted in MLflow: restore it there, or give another name")
    return str(found.experiment_id)


def open_run(
    uri: str, experiment_id: str, name: str, fields: Mapping[str, Any], tags: Mapping[str, str] | None = None
) -> Tracker:
    """A running MLflow run: found by its name's tag, or made with `fields` as parameters.

    The experiment's other runs whose driver was killed, and which still are RUNNING, are ended.
    """
    from mlflow.entities import Param

    client = _client(uri)
    threading.Thread(target=end_abandoned, args=(uri, experiment_id), daemon=True, name="raydiff-abandoned").start()
    if found := _named(client, experiment_id, name):
        client.update_run(found[0].info.run_id, status="RUNNING")
        return Tracker(uri, found[0].info.run_id)
    run_id = client.create_run(experiment_id, tags={NAME_TAG: name, **(tags or {})}, run_name=name).info.run_id
    params = [Param(path, parameter(value)) for path, value in fields.items()]
    for i in range(0, len(params), _AT_ONCE):
        warn(_all_but_refused(lambda some: client.log_batch(run_id, params=some), params[i : i + _AT_ONCE]))
    return Tracker(uri, run_id)


def end_abandoned(uri: str, experiment_id: str, patience: float = lease.EXPIRY) -> None:
    """End the RUNNING runs of an experiment whose folder nobody works on any more: their driver was killed, and could not.

    Of a driver on another host this takes `patience` seconds. What MLflow or a storage refuses stays as it is.
    """
    from mlflow.exceptions import MlflowException

    client = _client(uri)
    with suppress(MlflowException, OSError, ValueError):
        running = client.search_runs([experiment_id], "attributes.status = 'RUNNING'", max_results=1000)
        runs = {run.data.tags[FOLDER_TAG]: run.info.run_id for run in running if FOLDER_TAG in run.data.tags}
        for folder in lease.abandoned([Folder(uri) for uri in runs], patience):
            if client.get_run(run_id := runs[folder.uri]).info.status == "RUNNING":
                client.set_terminated(run_id, "KILLED" if folder.size(checkpoint.FINISHED) is None else "FINISHED")


def _named(client: Any, experiment_id: str, name: str) -> Any:
    """The runs, at most one, of this name's tag. MLflow's filters know no escapes: a name with both quotes is not found."""
    quote = '"' if "'" in name else "'"
    if quote in name:
        return []
    return client.search_runs([experiment_id], f"tags.`{NAME_TAG}` = {quote}{name}{quote}", max_results=1)


def _all_but_refused(log: Callable[[list[Any]], object], entries: list[Any]) -> dict[str, str]:
    """Log entries together, or one by one where MLflow refuses some for good. Returns {key: why} of these.

    Raises MlflowException for what may pass, or when it would take none of several: then it is not the entries' fault.
    """
    from mlflow.exceptions import MlflowException

    try:
        log(entries)
        return {}
    except MlflowException as error:
        if error.error_code not in _FOR_GOOD:
            raise
        first, refused = error, dict[str, str]()
    for entry in entries:
        try:
            log([entry])
        except MlflowException as error:
            if error.error_code not in _FOR_GOOD:
                raise
            refused[entry.key] = " ".join(str(error).split())
    if len(refused) == len(entries) > 1:
        raise first
    return refused


def left_out(refused: Mapping[str, str]) -> str:
    """What is told of entries that MLflow refuses."""
    return "\n".join(f"MLflow refuses {name!r} for good, and it is left out: {why}" for name, why in refused.items())


def warn(refused: Mapping[str, str]) -> None:
    if refused:
        logging.getLogger(__name__).warning(left_out(refused))


def start(run: Run, experiment_id: str, name: str, folder: Folder, tags: Mapping[str, str] | None = None) -> Tracker:
    """The MLflow run of a started run, with the run's fields as parameters."""
    tracker = open_run(uri(run), experiment_id, name, flat(run), {FOLDER_TAG: folder.uri, **(tags or {})})
    tracker.file(folder, "run.json")
    return tracker


def of_comparison(folder: Path, files: Sequence[Path]) -> Tracker:
    """The MLflow run of a `raydiff bench` folder, in a SQLite file there: the report's files and records, and what each method
    paid."""
    place = _sqlite(folder.resolve(), f"FOLDER = {str(folder)!r}")
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
    found = _named(client, experiment_id, of)
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


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    for noisy in ("alembic", "mlflow"):  # importing it sets its own level
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if uri.startswith("sqlite:"):
        _make_tables(uri)
    return MlflowClient(uri)


@functools.cache
def _make_tables(uri: str) -> None:
    """Make or upgrade the tables of a SQLite file: once a process, and one process at a time, as MLflow looks and then makes.

    A new file gets its name when it is whole: who dies over it leaves nothing that is half made. Raises ConfigError.
    """
    from mlflow.tracking import MlflowClient
    from sqlalchemy.engine import make_url

    name = make_url(uri).database
    if not name or name == ":memory:":
        return
    file = Path(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            if not file.exists():
                above, _, last = uri.partition("?")[0].rpartition("/")
                draft = f"{above}/.{last}{drafts.ENDING}"  # of the URI, whose quoting it keeps
                made = Path(str(make_url(draft).database))
                made.unlink(missing_ok=True)
                MlflowClient(draft).search_experiments(max_results=1)
                made.rename(file)
            MlflowClient(uri).search_experiments(max_results=1)
        except Exception as error:
            why = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"tracking.uri: {file} cannot be used as MLflow's SQLite file ({why}); move it away, or give another storage"
            ) from error
