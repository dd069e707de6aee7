"""Start a run on Ray: preflight, workers, progress, and what is left at the end."""

from __future__ import annotations

import math
import os
import shlex
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff import contents, placement
from raydiff.config import ConfigError, Run, geometry, override
from raydiff.contents import Contents
from raydiff.distributed import checkpoint, cluster, learn, pipeline, run_folder, score, tracking
from raydiff.distributed.board import Board
from raydiff.distributed.follow import follow
from raydiff.distributed.lease import Lease
from raydiff.distributed.progress import Progress, duration
from raydiff.distributed.ranks import Refused
from raydiff.distributed.score import Group
from raydiff.distributed.storage import Folder, StorageError
from raydiff.distributed.tracking import Tracker
from raydiff.distributed.weights import WeightStore
from raydiff.plan.clusters import cluster_nodes
from raydiff.preflight import faults
from raydiff.watch import Best


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
    folder = run_folder.resumed(run, resume) if resume is not None else run_folder.fresh(run)
    with Lease(folder) as lease, Progress(run.train.updates, pools=_pools(run)) as progress:
        if resume is not None:  # a fresh run's name is its own: it leaves no folder when it cannot start
            lease.take()
            run_folder.resumed(run, resume)  # it may have been finished meanwhile
        held = run_folder.held(run, folder)
        progress.say(f"{folder.name}: {geometry(run)}, {run.train.updates} updates, ZeRO-{run.train.zero_stage}")
        progress.waiting("starting Ray and MLflow")
        with ThreadPoolExecutor(1) as thread:
            experiment = thread.submit(tracking.prepare, run)
            connect(run)
        lease.take()
        run_folder.begin(run, folder, held)
        tracker = tracking.start(run, experiment.result(), folder.name, folder)
        outcome = Launch(run, folder, lease, held, tracker, progress).carried_out()
    if "refused" in outcome:
        raise Refused(*outcome["refused"]).error()
    if "stopped" in outcome:
        print(f"stopped after update {outcome['stopped']} of {run.train.updates}; go on with --resume {folder.name}")
        raise KeyboardInterrupt
    return _finished(run, folder, tracker, outcome["finished"])


def trial(run: Run, name: str, tags: Mapping[str, str], progress: Progress, first: Contents | None = None) -> None:
    """One trial of a sweep in the folder `name` of the storage: begun, or continued after its newest checkpoint.

    `progress` gets the rows, those from before included. Its MLflow run, found again by name, carries `tags`. `first`: what the
    run's files held when the sweep began, which all its trials share. Raises what `train` does.
    """
    folder = Folder(run.storage) / name
    with Lease(folder) as lease:
        lease.take()
        if (before := run_folder.recorded_run(folder)) is not None:
            checkpoint.check_same_run(before, run)
        held = run_folder.held(run, folder)
        if first:
            first.compare(held.digests)
        run_folder.begin(run, folder, held)
        tracker = tracking.start(run, tracking.prepare(run), name, folder, tags)
        outcome = Launch(run, folder, lease, held, tracker, progress).carried_out()
    if "refused" in outcome:
        raise Refused(*outcome["refused"]).error()


class Launch:
    """A run on its way, as its driver holds it: what was asked for, and the actors that it has started."""

    def __init__(self, run: Run, folder: Folder, lease: Lease, held: Contents, tracker: Tracker, progress: Progress) -> None:
        self.run, self.folder, self.lease, self.held = run, folder, lease, held
        self.tracker, self.progress = tracker, progress
        self.rewards: list[Group] = []
        self.store: Any = None

    def carried_out(self) -> dict[str, Any]:
        """Start pools and workers, and follow them to the end: what `learn.work` returned."""
        if short := _not_free(self.run):
            self.progress.say(f"waiting for {short}: other work holds them")
        self.board = self._beside_the_driver(Board, self.tracker, self.folder.uri)
        self.progress.attach(self.board)
        status, about = "FAILED", dict[str, str]()
        try:
            self._start_pools()
            self.progress.waiting("starting workers")
            with _interruptible():
                outcome = self._trained()
            status = "FINISHED" if "finished" in outcome else "KILLED" if "stopped" in outcome else "FAILED"
            about = tags(outcome.get("finished", {}))
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except Exception as error:
            error.add_note(f"Its checkpoints are in {self.folder}; --resume {self.folder.name} goes on after the newest.")
            raise
        finally:
            self._close(status, about)
        return outcome

    def _beside_the_driver(self, kind: type, *arguments: Any, **options: Any) -> Any:
        """An actor on the driver's node, as a node of a pool may be taken away. Only its handle finds it."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        actor = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here, **options)(kind)
        return actor.remote(*arguments)

    def _start_pools(self) -> None:
        """The weight store, which comes back empty when it dies, and the rewards, with what they have loaded."""
        run = self.run
        if "pool" in (run.generation.where, run.rewards.where):
            sizes = run.train.updates, pipeline.blocks(run), run.generation.max_staleness
            self.store = self._beside_the_driver(WeightStore, self.folder.name, *sizes, max_task_retries=-1)
        self.progress.waiting("loading rewards")
        if run.rewards.where == "pool":
            self.rewards = score.start(run, cluster_nodes(), self.held)
        loaded = {name: digest for group in self.rewards for name, digest in group.loaded.items()}
        if loaded.keys() - self.held.digests.keys():
            self.held = self.held.joined(loaded)
            self.folder.write(contents.FILE, self.held.dump().encode())

    def _trained(self) -> dict[str, Any]:
        """The workers' outcome; when not all of them find a place any more, of as many as the run allows."""
        from ray.train import ControllerError

        run = self.run
        while True:
            try:
                return follow(run, self._fit(run), self.board, self.progress, self.store)
            except ControllerError:
                if (fewer := with_fewer_trainers(run, cluster_nodes())) is None:
                    raise
                run = fewer
                self.progress.say(f"goes on with what has room: {geometry(run)}")

    def _fit(self, run: Run) -> Future[dict[str, Any]]:
        """Start the workers in a thread: in the main one Ray would answer Ctrl-C by killing them."""
        # A worker whose process does not answer Ray Train, as one that was stopped, is lost after this.
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(min(600, math.ceil(run.train.timeout)))
        trainer, future = self._trainer(run), Future[dict[str, Any]]()

        def fit() -> None:
            try:
                future.set_result(trainer.fit().return_value)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=fit, daemon=True, name="raydiff-fit").start()
        return future

    def _trainer(self, run: Run) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from raydiff.distributed.rendezvous import Rendezvous

        nodes = cluster_nodes()
        claim, streamed = placement.of(run, nodes, placement.TRAIN), run.generation.where == "pool"
        # Workers that find no place within RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S: -1 looks on for ever
        tries = -1 if run.pools.train.min_replicas is None else 0
        return TorchTrainer(
            learn.work,
            train_loop_config={
                "run": run.model_dump_json(),
                "timeout": run.train.timeout,
                "folder": self.folder.uri,
                "lease": self.lease.token,
                "contents": self.held.dump(),
                "board": self.board,
                "store": self.store,
                "rewards": self.rewards,
            },
            torch_config=Rendezvous(
                backend="nccl" if claim.gpus else "gloo", timeout_s=math.ceil(run.train.timeout), ports=run.pools.train.ports
            ),
            scaling_config=ScalingConfig(
                num_workers=claim.replicas,
                use_gpu=claim.gpus > 0,
                resources_per_worker={"CPU": claim.cpus, **({"GPU": claim.gpus} if claim.gpus else {})},
                label_selector=dict(claim.labels) or None,
            ),
            run_config=RunConfig(
                name=self.folder.name,
                storage_path=self.folder.uri.rpartition("/")[0],
                failure_config=FailureConfig(max_failures=run.train.max_failures, controller_failure_limit=tries),
            ),
            datasets={"train": pipeline.factory(run, self.store, self.rewards, contents=self.held)} if streamed else None,
            dataset_config=pipeline.data_config(run, nodes) if streamed else None,
        )

    def _close(self, status: str, tags: dict[str, str]) -> None:
        """Log what is left, and end the actors. MLflow's faults are told, with the way to send it later, and go no further."""
        import ray

        try:
            left = ray.get(self.board.flush.remote(), timeout=60)
            if refused := ray.get(self.board.left_out.remote(), timeout=60):
                self.progress.say(refused)
            self.tracker.finish(status, tags)
        except Exception as error:
            left = f"MLflow at {self.tracker.uri}: {error}"
        if left:
            self.progress.say(f"{left}\nraydiff log {self.folder} sends what is missing, when it answers again")
        replicas = [replica for group in self.rewards for replica in group.replicas]
        for actor in [self.board, *([self.store] if self.store else []), *replicas]:
            ray.kill(actor)  # now, and not when the last handle goes: a notebook goes on


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


def preflight(run: Run) -> None:
    """What can be known without a cluster. Raises ConfigError, one line per fault."""
    if found := faults(run):
        raise ConfigError("\n".join(found))
    try:
        Folder(run.storage).check_writable()
    except (StorageError, ValueError) as error:
        raise ConfigError(f"storage = {run.storage!r}: {error}") from None
    tracking.uri(run)


def connect(run: Run) -> None:
    """Connect to Ray unless that is done, and check that the pools fit. Raises ConfigError."""
    cluster.start()
    cluster.check_fits(lambda nodes: placement.faults(run, nodes, "the cluster"))


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


def with_fewer_trainers(run: Run, nodes: Sequence[placement.Node]) -> Run | None:
    """The run with the most trainers that have room and divide its batch; None when these are fewer than it allows."""
    room, least = placement.room(run, nodes, placement.TRAIN), run.pools.train.min_replicas
    for workers in range(room, least - 1, -1) if least else ():
        with suppress(ValueError):
            geometry(run, workers)
            return override(run, {"pools.train.replicas": workers})
    return None


def tags(finished: Mapping[str, Any]) -> dict[str, str]:
    """What a finished run says of itself in MLflow."""
    best, reason = finished.get("best"), finished.get("stopped_by")
    return {
        **({tracking.BEST_TAG: str(Best(**best))} if best else {}),
        **({tracking.STOPPED_TAG: reason} if reason else {}),
    }


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
    updates = folder.read_json(checkpoint.FINISHED)["updates"]
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
