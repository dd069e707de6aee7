"""Start a run on Ray: preflight, workers, progress, and what is left at the end."""

from __future__ import annotations

import math
import secrets
import shlex
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff import __version__, contents, placement
from raydiff.config import ConfigError, Run, geometry, override
from raydiff.contents import Contents
from raydiff.distributed import checkpoint, cluster, learn, pipeline, score, tracking
from raydiff.distributed.lease import Lease
from raydiff.distributed.progress import Progress, duration
from raydiff.distributed.ranks import Refused
from raydiff.distributed.score import Group
from raydiff.distributed.storage import PATIENCE, Folder, StorageError
from raydiff.distributed.tracking import Board, Tracker
from raydiff.distributed.weights import WeightStore
from raydiff.plan.clusters import cluster_nodes
from raydiff.preflight import faults
from raydiff.watch import Best

RUN = "run.json"
_POLL = 0.5  # seconds between looks at the board
_LOOK = 5.0  # seconds between looks at the cluster's nodes


@dataclass(frozen=True)
class Result:
    """A finished run."""

    name: str
    folder: str
    adapter: str
    before: dict[str, float]  # held_out/* of the untrained model
    after: dict[str, float]
    grid: str | None  # PNG of held-out pictures before and after
    best: Best | None  # the evaluation whose weights are in `adapter_best`
    adapter_best: str | None
    stopped_by: str | None  # the condition of train.stop_when that ended it
    mlflow_uri: str
    mlflow_run_id: str


def train(run: Run, *, resume: str | Path | None = None) -> Result:
    """Train on a Ray cluster: the one that is connected, that RAY_ADDRESS names, or a local one.

    `resume` is the name or the folder of a started run; it goes on after its newest checkpoint. Raises ConfigError before any
    worker starts when the run cannot work here, or another driver is at it; NonFiniteReward, FloatingPointError or
    StorageError, without a retry, when it cannot go on; KeyboardInterrupt after a last checkpoint on Ctrl-C.
    """
    preflight(run)
    folder = _resumed(run, resume) if resume is not None else _fresh(run)
    with Lease(folder) as mine, Progress(run.train.updates, pools=_pools(run)) as progress:
        if resume is not None:  # a fresh run's name is its own: it leaves no folder when it cannot start
            mine.take()
            _resumed(run, resume)  # it may have been finished meanwhile
        held = _held(run, folder)
        progress.say(f"{folder.name}: {geometry(run)}, {run.train.updates} updates, ZeRO-{run.train.zero_stage}")
        progress.waiting("starting Ray and MLflow")
        with ThreadPoolExecutor(1) as thread:
            experiment = thread.submit(tracking.prepare, run)
            use_gpu = connect(run)
        mine.take()
        _begin(run, folder, held)
        tracker = tracking.start(run, experiment.result(), folder.name, folder)
        outcome = _carried_out(run, folder, mine, held, tracker, use_gpu, progress)
    if "refused" in outcome:
        raise Refused(*outcome["refused"]).error()
    if "stopped" in outcome:
        print(f"stopped after update {outcome['stopped']} of {run.train.updates}; go on with --resume {folder.name}")
        raise KeyboardInterrupt
    return _finished(run, folder, tracker, outcome["finished"])


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM, which `ray job stop` and a node's end send, counts as Ctrl-C; so does Ctrl-C where a shell had it ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def trial(run: Run, name: str, tags: Mapping[str, str], progress: Progress, started: Contents | None = None) -> None:
    """One trial of a sweep in the folder `name` of the storage: begun, or continued after its newest checkpoint.

    `progress` gets the rows, those from before included. Its MLflow run, found again by name, carries `tags`. `started`: what
    the run's files held when the sweep began, which all its trials share. Raises what `train` does.
    """
    folder = Folder(run.storage) / name
    with Lease(folder) as mine:
        mine.take()
        if (before := recorded_run(folder)) is not None:
            checkpoint.check_same_run(before, run)
        held = _held(run, folder)
        if started:
            started.compare(held.digests)
        _begin(run, folder, held)
        tracker = tracking.start(run, tracking.prepare(run), name, folder, tags)
        use_gpu = placement.claims(run, cluster_nodes())[0].gpus > 0
        outcome = _carried_out(run, folder, mine, held, tracker, use_gpu, progress)
    if "refused" in outcome:
        raise Refused(*outcome["refused"]).error()


def recorded_run(folder: Folder) -> Mapping[str, Any] | None:
    """The JSON of a started run: of RUN, and when that is missing or broken of the newest checkpoint, which holds it too."""
    found = folder.json_or_none(RUN)
    try:
        Run.model_validate(found)
    except ValueError:
        newest = checkpoint.latest(folder)
        return found if newest is None else newest.run
    return dict(found)


def recorded(folder: Folder) -> Contents | None:
    """What the files of a started run, or sweep, held; None when that was not written down, or is broken."""
    try:
        return Contents.load(folder.read(contents.FILE))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def same_contents(before: Contents | None, now: Contents, folder: Folder, may_change: Sequence[str] = ()) -> Contents:
    """What a run, or sweep, that is gone on with holds from now on. Raises ConfigError for files that hold something else."""
    if before is None:
        warnings.warn(f"{folder} has no {contents.FILE}: what its files held when it was started is unknown", stacklevel=2)
        return now
    if before.raydiff != __version__:
        warnings.warn(f"{folder} was started by raydiff {before.raydiff}, and this is {__version__}", stacklevel=2)
    before.compare(now.digests, may_change)
    return now.joined({name: d for name, d in before.digests.items() if not contents.within(name, may_change)})


def _held(run: Run, folder: Folder) -> Contents:
    """What the run's files hold. Raises ConfigError when a run that was started had others."""
    before = recorded(folder)  # first: what it has read need not be read again
    now = Contents.of(run)
    return now if recorded_run(folder) is None else same_contents(before, now, folder, checkpoint.MAY_CHANGE)


def _begin(run: Run, folder: Folder, held: Contents) -> None:
    """Write down what is carried out: a run exists when RUN does."""
    folder.write(contents.FILE, held.dump().encode())
    folder.write(RUN, run.model_dump_json(indent=1).encode())


def _carried_out(
    run: Run, folder: Folder, mine: Lease, held: Contents, tracker: Tracker, use_gpu: bool, progress: Progress
) -> dict[str, Any]:
    """Start pools and workers, and follow them to the end: what `learn.work` returned."""
    if short := _not_free(run):
        progress.say(f"waiting for {short}: other work holds them")
    board = _board(tracker, folder)
    progress.attach(board)
    store = _store(run, folder) if "pool" in (run.generation.where, run.rewards.where) else None
    status, said = "FAILED", dict[str, str]()
    try:
        progress.waiting("loading rewards")
        rewards = score.start(run, cluster_nodes(), held) if run.rewards.where == "pool" else []
        if found := {name: d for group in rewards for name, d in group.loaded.items() if name not in held.digests}:
            held = held.joined(found)
            folder.write(contents.FILE, held.dump().encode())
        progress.waiting("starting workers")
        with _interruptible():
            outcome = _trained(run, folder, mine, held, board, use_gpu, store, rewards, progress)
        status = "FINISHED" if "finished" in outcome else "KILLED" if "stopped" in outcome else "FAILED"
        said = tags(outcome.get("finished", {}))
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except Exception as error:
        error.add_note(f"Its checkpoints are in {folder}; --resume {folder.name} goes on after the newest.")
        raise
    finally:
        _close(board, tracker, folder, status, said, progress)
    return outcome


def preflight(run: Run) -> None:
    """What can be known without a cluster. Raises ConfigError, one line per fault."""
    if found := faults(run):
        raise ConfigError("\n".join(found))
    try:
        Folder(run.storage).check_writable()
    except (StorageError, ValueError) as error:
        raise ConfigError(f"storage = {run.storage!r}: {error}") from None
    tracking.uri(run)


def connect(run: Run) -> bool:
    """Connect to Ray unless that is done, and check that the pools fit. Returns whether the workers use GPUs."""
    cluster.start()
    cluster.check_fits(lambda nodes: placement.faults(run, nodes, "the cluster"))
    return placement.claims(run, cluster_nodes())[0].gpus > 0


def _pools(run: Run) -> dict[str, int]:
    """Replicas of the pools that the run has beside its trainers."""
    used = {placement.GENERATE: run.generation.where, placement.REWARD: run.rewards.where}
    groups = len(placement.reward_groups(run))
    sizes = {placement.GENERATE: run.pools.generate.replicas, placement.REWARD: run.pools.reward.replicas * groups}
    return {pool: sizes[pool] for pool, where in used.items() if where == "pool"}


def _not_free(run: Run) -> str:
    """What other work holds of the resources that the pools claim."""
    import ray

    free, claims = ray.available_resources(), placement.claims(run, cluster_nodes())
    need = {"CPU": sum(c.replicas * c.cpus for c in claims), "GPU": sum(c.replicas * c.gpus for c in claims)}
    return " and ".join(f"{n:g} {name}s, {free.get(name, 0):g} are free" for name, n in need.items() if free.get(name, 0) < n)


def _fresh(run: Run) -> Folder:
    name = f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    return Folder(run.storage, PATIENCE) / name


def _resumed(run: Run, resume: str | Path) -> Folder:
    """The folder of a started run, checked: it exists, is not finished, and was started with this config."""
    text = str(resume)
    folder = Folder(text, PATIENCE) if "/" in text else Folder(run.storage, PATIENCE) / text
    if (before := recorded_run(folder)) is None:
        names = [name for name in Folder(run.storage).folders() if (Folder(run.storage) / name).size(RUN) is not None]
        there = f"; there are {', '.join(names[-5:])}" if names else ""
        raise ConfigError(f"resume = {text!r}: no run was started in {folder}{there}")
    checkpoint.check_same_run(before, run)
    if (finished := folder.json_or_none(learn.FINISHED)) is not None:
        stopped = finished["stopped_by"] if run.train.stop_when == Run.model_validate(before).train.stop_when else None
        if finished["updates"] >= run.train.updates or stopped:
            way_out = f"It was stopped by {stopped}; another train.stop_when" if stopped else "A larger train.updates"
            raise ConfigError(
                f"resume = {text!r}: this run is finished, {finished['updates']} of {run.train.updates} updates; its weights"
                f" are in {folder / learn.ADAPTER}. {way_out} continues it"
            )
    return folder


def _here() -> dict[str, Any]:
    """Options of an actor that lives beside the driver: a node of a pool may be taken away."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": here}


def _board(tracker: Tracker, folder: Folder) -> Any:
    import ray

    return ray.remote(**_here())(Board).remote(tracker, folder.uri)


def _store(run: Run, folder: Folder) -> Any:
    """The weight store, which only its handle finds. When it dies it comes back empty, and the workers start anew."""
    import ray

    actor = ray.remote(**_here(), max_task_retries=-1)(WeightStore)
    return actor.remote(folder.name, run.train.updates, pipeline.blocks(run), run.generation.max_staleness)


def _trained(
    run: Run,
    folder: Folder,
    mine: Lease,
    held: Contents,
    board: Any,
    use_gpu: bool,
    store: Any,
    rewards: list[Group],
    progress: Progress,
) -> dict[str, Any]:
    """The workers' outcome; when not all of them find a place any more, of as many as the run allows."""
    from ray.train import ControllerError

    while True:
        try:
            return _follow(run, _fit(run, folder, mine, held, board, use_gpu, store, rewards), board, progress, store)
        except ControllerError:
            if (fewer := with_fewer_trainers(run, cluster_nodes())) is None:
                raise
            run = fewer
            progress.say(f"goes on with what has room: {geometry(run)}")


def with_fewer_trainers(run: Run, nodes: Sequence[placement.Node]) -> Run | None:
    """The run with the most trainers that have room and divide its batch; None when these are fewer than it allows."""
    room, least = placement.room(run, nodes, placement.TRAIN), run.pools.train.min_replicas
    for workers in range(room, least - 1, -1) if least else ():
        with suppress(ValueError):
            geometry(run, workers)
            return override(run, {"pools.train.replicas": workers})
    return None


def _fit(
    run: Run, folder: Folder, mine: Lease, held: Contents, board: Any, use_gpu: bool, store: Any, rewards: list[Group]
) -> Future[dict[str, Any]]:
    """Start the workers in a thread: in the main one Ray would answer Ctrl-C by killing them."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raydiff.distributed.rendezvous import Rendezvous

    nodes = cluster_nodes()
    claim = placement.claims(run, nodes)[0]
    streamed = run.generation.where == "pool"
    resources = {"CPU": claim.cpus, **({"GPU": claim.gpus} if use_gpu else {})}
    trainer = TorchTrainer(
        learn.work,
        train_loop_config={
            "run": run.model_dump_json(),
            "timeout": run.train.timeout,
            "folder": folder.uri,
            "lease": mine.token,
            "contents": held.dump(),
            "board": board,
            "store": store,
            "rewards": rewards,
        },
        torch_config=Rendezvous(
            backend="nccl" if use_gpu else "gloo", timeout_s=math.ceil(run.train.timeout), ports=run.pools.train.ports
        ),
        scaling_config=ScalingConfig(
            num_workers=claim.replicas,
            use_gpu=use_gpu,
            resources_per_worker=resources,
            label_selector=dict(claim.labels) or None,
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=folder.uri.rpartition("/")[0],
            # Workers that find no place within RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S: -1 looks on for ever
            failure_config=FailureConfig(
                max_failures=run.train.max_failures, controller_failure_limit=-1 if run.pools.train.min_replicas is None else 0
            ),
        ),
        datasets={"train": pipeline.factory(run, store, rewards, contents=held)} if streamed else None,
        dataset_config=pipeline.data_config(run, nodes) if streamed else None,
    )
    future: Future[dict[str, Any]] = Future()

    def fit() -> None:
        try:
            future.set_result(trainer.fit().return_value)
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=fit, daemon=True, name="raydiff-fit").start()
    return future


def _follow(run: Run, future: Future[dict[str, Any]], board: Any, progress: Progress, store: Any) -> dict[str, Any]:
    """Show the run until it ends. Ctrl-C asks for a last checkpoint; a second one does not wait for it."""
    import ray

    place, stopping, room = 0, False, Room(run)
    while True:
        try:
            ended = future.done()
            news = ray.get(board.since.remote(place))
            place += len(news)
            for item in news:
                if isinstance(item, str):
                    progress.restart(item)
                else:
                    progress.row(item)
            if store is not None and not ended:
                progress.pools(ray.get(store.status.remote()))
            if news := room.news():
                progress.say(news)
            if ended:
                return future.result()
            time.sleep(_POLL)
        except KeyboardInterrupt:
            if stopping:
                raise
            stopping = True
            board.stop.remote()
            progress.say("stopping: this update, then a checkpoint; Ctrl-C again stops without one")


class Room:
    """Tells when the cluster has lost room for a pool, or has it again: a run that waits says for what."""

    def __init__(self, run: Run) -> None:
        self.run, self.next, self.lacking = run, 0.0, list[str]()

    def news(self) -> str | None:
        """What has changed, looked up every few seconds."""
        if time.monotonic() < self.next:
            return None
        self.next = time.monotonic() + _LOOK
        before, self.lacking = self.lacking, placement.faults(self.run, cluster_nodes(), "the cluster")
        if self.lacking == before:
            return None
        return "\n".join(["nodes were lost", *self.lacking]) if self.lacking else "all pools have room again"


def tags(finished: Mapping[str, Any]) -> dict[str, str]:
    """What a finished run says of itself in MLflow."""
    best, reason = finished.get("best"), finished.get("stopped_by")
    return {
        **({tracking.BEST_TAG: str(Best(**best))} if best else {}),
        **({tracking.STOPPED_TAG: reason} if reason else {}),
    }


def _close(board: Any, tracker: Tracker, folder: Folder, status: str, tags: dict[str, str], progress: Progress) -> None:
    """Log what is left. MLflow's faults are told, with the way to send it later, and go no further."""
    import ray

    try:
        left = ray.get(board.flush.remote(), timeout=60)
        if refused := ray.get(board.left_out.remote(), timeout=60):
            progress.say(refused)
        tracker.finish(status, tags)
    except Exception as error:
        left = f"MLflow at {tracker.uri}: {error}"
    if left:
        progress.say(f"{left}\nraydiff log {folder} sends what is missing, when it answers again")
    ray.kill(board)


def _finished(run: Run, folder: Folder, tracker: Tracker, outcome: dict[str, Any]) -> Result:
    grid = (folder / learn.GRID).uri if folder.size(learn.GRID) is not None else None
    result = Result(
        name=folder.name,
        folder=folder.uri,
        adapter=(folder / learn.ADAPTER).uri,
        before=outcome["before"],
        after=outcome["after"],
        grid=grid,
        best=Best(**outcome["best"]) if outcome["best"] else None,
        adapter_best=(folder / learn.BEST).uri if outcome["best"] else None,
        stopped_by=outcome["stopped_by"],
        mlflow_uri=tracker.uri,
        mlflow_run_id=tracker.run_id,
    )
    updates = folder.read_json(learn.FINISHED)["updates"]
    lines = [f"finished {updates} updates in {duration(outcome['seconds'])}"]
    if result.stopped_by:
        lines[0] += f" of {run.train.updates}, stopped by {result.stopped_by}"
    for name, after in result.after.items():
        before = result.before.get(name)
        lines.append(f"{name:24} {'' if before is None else f'{before:.4f} -> '}{after:.4f}")
    lines += [f"weights      {result.adapter}", f"best         {result.adapter_best}: {result.best}" if result.best else ""]
    lines += [f"pictures     {grid}" if grid else "", f"checkpoints  {result.folder}"]
    if run.tracking.uri is None:
        lines.append(f"metrics      mlflow ui --backend-store-uri {shlex.quote(tracker.uri)}")
    else:
        lines.append(f"metrics      {tracker.uri}, run {tracker.run_id}")
    print("\n".join(line for line in lines if line))
    return result
