"""Many runs of a recipe by Ray Tune: each trial is a run of its own, with its own workers, pools, store and MLflow run.

A trial's driver claims next to nothing and stays on this node; what it starts claims what `placement` says of a run.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import rich

from raydiff import contents, placement
from raydiff.config import ConfigError, Run, dump, fresh_name, override
from raydiff.contents import Contents
from raydiff.distributed import checkpoint, cluster, launch, run_folder, sweep_report, tracking
from raydiff.distributed.lease import Lease
from raydiff.distributed.progress import Progress
from raydiff.distributed.storage import Folder
from raydiff.distributed.sweep_report import Outcome, Point
from raydiff.plan.clusters import cluster_nodes
from raydiff.plan.cost import count
from raydiff.preflight import faults
from raydiff.search import Sweep

SWEEP, TUNE = "sweep.json", "tune"
_OBJECTIVE, _QUERIES = "objective", "reward_queries"
_SETTLE = 30.0  # seconds that an evaluation waits for MLflow at most
_BY_CONTENT = ("recipe", "set", "content", "folder")  # fields of a sweep that are compared as the one recipe that they make
_COMPARED = ("train.updates", "train.stop_when", "generation", "evaluate")  # trials are, so it stays what it is
MAY_CHANGE = ("name", *(path for path in checkpoint.MAY_CHANGE if not path.startswith(_COMPARED)))
"""Fields of the recipe, or tables of them, that a resumed sweep may set anew: where and how its trials run."""
_DRIVER = 0.001  # of the node's own resource: pins the driver, where a SQLite tracking file is


@dataclass(frozen=True)
class Result:
    """A sweep that ended."""

    name: str
    folder: str
    outcomes: list[Outcome]  # the best first
    best: Path | None  # recipe of the best trial
    mlflow_uri: str
    mlflow_run_id: str

    @property
    def failed(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.status == "failed"]


def sweep(config: Sweep, *, resume: str | None = None) -> Result:
    """Run the trials, on the cluster that `train` would take. `resume` names a started sweep: what failed or was cut off goes
    on, each trial after its own newest checkpoint.

    Raises ConfigError before any trial starts when one of them cannot work here.
    """
    base, examples = config.base(), config.examples()
    _preflight(config, base, examples)
    folder = _resumed(config, base, resume) if resume else _fresh(config, base)
    with Lease(folder) as mine:
        mine.take()
        return _carried_out(config, base, examples, folder, resumed=resume is not None)


def _carried_out(config: Sweep, base: Run, examples: Sequence[Run], folder: Folder, *, resumed: bool) -> Result:
    held = _held(examples, folder, resumed=resumed)
    cluster.start(dashboard=True)
    most = concurrent(config, examples)
    uri = tracking.uri(base)
    parent = _parent(config, base, folder, uri)
    rich.print(f"{folder.name}: {config.count} trials, {most} at a time")
    job = {"sweep": config.model_dump_json(), "storage": folder.uri, "uri": uri, "parent": parent.run_id}
    job["contents"] = held.dump()
    try:
        grid = _tuner(config, examples, folder, job, most, resumed).fit()
        outcomes = sorted((_outcome(config, folder, result) for result in grid), key=lambda o: o.rank)
        tracking.close_trials(uri, parent.run_id, {o.trial: o.status for o in outcomes})
        return _finished(config, base, folder, parent, outcomes)
    except BaseException:
        parent.finish("FAILED", {})
        raise


def concurrent(config: Sweep, examples: Sequence[Run]) -> int:
    """Trials at once: as many as have room with all their pools. Raises ConfigError, with the sum, when there is none for one,
    or not for as many as the sweep asks for."""
    cluster.check_fits(
        lambda nodes: list(dict.fromkeys(f for run in examples for f in placement.faults(run, nodes, "the cluster")))
    )
    nodes, most = cluster_nodes(), config.max_concurrent or config.count
    room, largest = min(((placement.copies(run, nodes, most), run) for run in examples), key=lambda pair: pair[0])
    if config.max_concurrent and room < config.max_concurrent:
        claims = " + ".join(f"{claim.pool} {claim}" for claim in placement.claims(largest, nodes))
        cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
        raise ConfigError(
            f"max_concurrent = {config.max_concurrent}: a trial claims {claims}, and the cluster has {cpus:g} CPUs and {gpus:g}"
            f" GPUs: room for {room}; set max_concurrent to {room}, or leave it out"
        )
    return min(room, config.count)


def _preflight(config: Sweep, base: Run, examples: Sequence[Run]) -> None:
    launch.preflight(base)
    if config.search == "optuna" and not importlib.util.find_spec("optuna"):
        raise ConfigError('search = "optuna": it is not installed; pip install "raydiff[sweep]", or use "random"')
    if found := list(dict.fromkeys(fault for run in examples for fault in faults(run))):
        raise ConfigError("\n".join(found))


def _fresh(config: Sweep, base: Run) -> Folder:
    folder = Folder(base.storage) / fresh_name(config.name)
    folder.write(SWEEP, config.model_dump_json(indent=1).encode())
    return folder


def _resumed(config: Sweep, base: Run, name: str) -> Folder:
    """The folder of a started sweep, checked: it is there, is the same, and is not finished."""
    folder = Folder(base.storage) / name
    if folder.size(SWEEP) is None:
        names = [n for n in Folder(base.storage).folders() if (Folder(base.storage) / n).size(SWEEP) is not None]
        there = f"; there are {', '.join(names[-5:])}" if names else ""
        raise ConfigError(f"resume = {name!r}: no sweep was started in {folder}{there}")
    before, now = folder.read_json(SWEEP), json.loads(config.model_dump_json())
    if not before.get("content"):
        raise ConfigError(f"resume = {name!r}: {folder}/{SWEEP} does not hold the recipe; start a fresh sweep")
    free = ("max_concurrent", *_BY_CONTENT)
    differ = [f"{f}: {before.get(f)} then, {now[f]} now" for f in now if before.get(f) != now[f] and f not in free]
    if differ := differ + checkpoint.differing(before["content"], base, MAY_CHANGE):
        raise ConfigError(
            f"resume = {name!r}: the sweep was started with other settings; set these back, or start a fresh one:\n  "
            + "\n  ".join(differ)
        )
    return folder


def _held(examples: Sequence[Run], folder: Folder, *, resumed: bool) -> Contents:
    """What the files hold that trials name, by field and place, written down. Raises ConfigError when a sweep that is gone on
    with had others."""
    before = run_folder.recorded(folder)
    found = {key: digest for run in examples for key, digest in Contents.of(run).by_place(run).items()}
    now = Contents.with_seen(found)
    if resumed:
        now = run_folder.same_contents(before, now, folder)
    folder.write(contents.FILE, now.dump().encode())
    return now


def _parent(config: Sweep, base: Run, folder: Folder, uri: str) -> tracking.Tracker:
    fields = config.model_dump(mode="json", exclude_unset=True, exclude={"name", "content", "folder"})
    return tracking.open_run(uri, tracking.prepare(base), folder.name, fields, {tracking.FOLDER_TAG: folder.uri})


def _tuner(config: Sweep, examples: Sequence[Run], folder: Folder, job: dict[str, str], most: int, restored: bool) -> Any:
    import ray
    from ray import tune

    node = f"node:{ray.util.get_node_ip_address()}"
    drive = tune.with_resources(tune.with_parameters(_drive, job=job), {"CPU": 0, node: _DRIVER})
    space = {path: _domain(axis, config.search) for path, axis in config.space.items()}
    if restored:
        return tune.Tuner.restore(f"{folder.uri}/{TUNE}", drive, param_space=space, resume_errored=True, resume_unfinished=True)
    return tune.Tuner(
        drive,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=_OBJECTIVE,
            mode="max",
            num_samples=config.trials or 1,
            search_alg=_search(config, space, most),
            scheduler=_scheduler(config, examples),
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(name=TUNE, storage_path=folder.uri, verbose=0, callbacks=[_told()]),
    )


def _domain(axis: Any, search: str) -> Any:
    """A Tune domain. Listed values go as JSON: a table is one value, and to Optuna a category."""
    from ray import tune

    if axis.values is not None:
        texts = [json.dumps(value) for value in axis.values]
        return tune.grid_search(texts) if axis.grid or search == "grid" else tune.choice(texts)
    return getattr(tune, axis.kind)(*axis.ends)


def _search(config: Sweep, space: Mapping[str, Any], most: int) -> Any:
    """`most` trials at once is the search's to keep: TuneConfig's own limit is ignored where the search is given."""
    if config.search != "optuna":
        from ray.tune.search.basic_variant import BasicVariantGenerator

        return BasicVariantGenerator(max_concurrent=most, random_state=config.seed)
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    return ConcurrencyLimiter(OptunaSearch(seed=config.seed, metric=_OBJECTIVE, mode="max"), max_concurrent=most)


def _scheduler(config: Sweep, examples: Sequence[Run]) -> Any:
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

    if config.scheduler is None:
        return FIFOScheduler()
    if config.scheduler.kind == "median":
        return MedianStoppingRule(time_attr=_QUERIES, grace_period=config.scheduler.grace, min_samples_required=2)
    longest = max(count(run)[0].reward_queries * run.train.updates for run in examples)
    if longest <= config.scheduler.grace:
        raise ConfigError(f"scheduler.grace = {config.scheduler.grace}: a whole trial asks for {longest} rewards; lower it")
    return ASHAScheduler(
        time_attr=_QUERIES,
        max_t=longest + 1,  # a trial that gets there ends by itself, with its adapter
        grace_period=config.scheduler.grace,
        reduction_factor=config.scheduler.reduction,
    )


def _drive(config: dict[str, Any], job: dict[str, str]) -> None:
    """A trial, in a process of its own. Its name is its id, by which a restored sweep finds it again."""
    from ray import tune

    sweep = Sweep.model_validate_json(job["sweep"])
    name = tune.get_context().get_trial_id()
    run = sweep.run(_values(config) | {"name": name, "storage": job["storage"], "tracking.uri": job["uri"]})
    tags = {"mlflow.parentRunId": job["parent"], "ray.trial_id": name}
    first = Contents.load(job["contents"]).at_place(run)
    sweep_folder = Folder(job["storage"])
    reporting = _Reporting(sweep, run.train.updates, lambda: check_loaded(sweep_folder, name, run, first))
    launch.trial(run, name, tags, reporting, first)


def check_loaded(sweep_folder: Folder, name: str, run: Run, started: Contents) -> None:
    """Raise ConfigError when a trial has loaded something else than another one, of what was unknown when the sweep `started`,
    as the commit of a hub id.

    Each trial has written down what it loaded before it looks at the others', so of two one sees the other. It is then held to
    what the other has, from its first update, when the sweep is resumed.
    """

    def digests(place: Folder) -> dict[str, str]:
        return (run_folder.recorded(place) or Contents({})).digests

    def loaded(place: Folder, ran: Run) -> Contents:
        return Contents(Contents({k: d for k, d in digests(place).items() if k not in started.digests}).by_place(ran))

    folder = sweep_folder / name
    mine = loaded(folder, run)
    for other in sweep_folder.folders() if mine.digests else ():
        if other == name or (ran := run_folder.recorded_run(sweep_folder / other)) is None:
            continue
        theirs = loaded(sweep_folder / other, Run.model_validate(ran))
        try:
            theirs.compare(mine.digests)
        except ConfigError as error:
            for part in folder.folders():
                folder.delete(part)
            folder.write(contents.FILE, theirs.at_place(run).joined(digests(folder)).dump().encode())
            raise ConfigError(f"trial {name} has loaded something else than trial {other}: {error}") from None


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Tune's draw as fields of a run."""
    return {path: json.loads(value) if isinstance(value, str) else value for path, value in config.items()}


class _Reporting(Progress):
    """Hands evaluations to Tune, which may end the trial there."""

    def __init__(self, sweep: Sweep, updates: int, check: Callable[[], None]) -> None:
        """`check` is called once, when the trial has loaded all that it needs."""
        super().__init__(updates)
        self.sweep, self.check = sweep, check

    def attach(self, board: Any) -> None:
        self.board = board

    def row(self, row: dict[str, float]) -> None:
        import ray
        from ray import tune

        self.check()
        self.check = lambda: None
        if "held_out/total" in row:
            # A trial that is ended there logs nothing more; a board that is away logs it all when it is back.
            ray.wait([self.board.settle.remote(_SETTLE)], timeout=2 * _SETTLE)
            shown = {name: value for name, value in row.items() if name != "step"}
            tune.report({**shown, "update": row["step"], _OBJECTIVE: self.sweep.objective(row)})


def _told() -> Any:
    from ray import tune

    class Told(tune.Callback):
        """A line for each trial that ends."""

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            last = trial.last_result or {}
            place, objective = last.get("update", 0), last.get(_OBJECTIVE, float("nan"))
            rich.print(f"{trial.trial_id} ended at update {place:g}, objective {objective:.4f}")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            rich.print(f"{trial.trial_id} failed")

    return Told()


def _outcome(config: Sweep, folder: Folder, result: Any) -> Outcome:
    """What a trial came to, from what it reported and what lies in its folder."""
    trial = Path(result.path).name
    frame = result.metrics_dataframe
    rows = {int(row["update"]): row for row in frame.to_dict("records")} if frame is not None and len(frame) else {}
    points = [
        Point(update, int(row[_QUERIES]), float(row[_OBJECTIVE]), float(row[config.metric]))
        for update, row in sorted(rows.items())
    ]
    finished = (folder / trial).json_or_none(checkpoint.FINISHED) is not None
    status = "finished" if finished else "failed" if result.error else "stopped early"
    return Outcome(
        trial, status, _values(result.config), points, str(result.error).strip().splitlines()[-1] if result.error else ""
    )


def recipe_of(trial: Folder, base: Run) -> Run:
    """The recipe that a trial ran, by its run.json; name, storage and tracking, which the sweep had set, are as in `base`."""
    ran = Run.model_validate(run_folder.recorded_run(trial))
    return override(ran, {"name": base.name, "storage": base.storage, "tracking": base.tracking.model_dump(mode="json")})


def _finished(config: Sweep, base: Run, folder: Folder, parent: tracking.Tracker, outcomes: list[Outcome]) -> Result:
    """Write and log what the sweep found."""
    folder.write_json("outcomes.json", [asdict(o) for o in outcomes])
    local = folder.local
    files = sweep_report.write(config, outcomes)
    best = outcomes[0] if outcomes and outcomes[0].best else None
    if best:
        files["best.toml"] = dump(recipe_of(folder / best.trial, base)).encode()
    for name, data in files.items():
        folder.write(name, data)
        parent.file(folder, name)
    result = Result(
        folder.name, folder.uri, outcomes, local / "best.toml" if best and local else None, parent.uri, parent.run_id
    )
    parent.finish("FAILED" if result.failed else "FINISHED", {"raydiff.best": best.trial} if best else {})
    print(
        "\n".join([*sweep_report.table(config, outcomes), f"report: {folder.uri}; MLflow: {parent.uri}, run {parent.run_id}"])
    )
    if result.failed:
        print(f"{len(result.failed)} of {len(outcomes)} trials failed; --resume {folder.name} runs them again")
    return result
