"""The one streaming pipeline of an attempt: tickets -> gate -> generators -> scorers -> the learner's shard.

Its settings are those under which Ray Data neither deadlocks nor lets samples grow old; each says why.
"""

from __future__ import annotations

import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from raydiff import placement
from raydiff.config import Run
from raydiff.contents import Contents
from raydiff.core.rollouts import Rollouts
from raydiff.distributed import rows, weights
from raydiff.distributed.generate import Gate, Generator
from raydiff.distributed.hangs import beats
from raydiff.distributed.meter import PREFIX
from raydiff.distributed.proof import Published
from raydiff.distributed.ranks import Ranks, plain
from raydiff.distributed.score import RESTARTS, Group, Scorer, client
from raydiff.plan.clusters import cluster_nodes
from raydiff.session import Session

_STALENESS, _PROBE, _WAIT = (PREFIX + name for name in ("staleness", "probe_error", "learner_waited"))
_WAITING = 8  # tickets that lie ready at the gate: handing it one takes Ray Data's loop longer than letting one pass
_PATIENCE = 30.0  # seconds without a block after which a learner looks whether the generators still have room


def blocks(run: Run) -> int:
    """Micro-batches of an update, each one ticket and one block."""
    return run.batch.size // run.batch.micro


def factory(
    run: Run,
    store: Any,
    groups: list[Group],
    generator: type = Generator,
    *,
    contents: Contents | None = None,
    **options: Any,
) -> Callable[[], Any]:
    """What Ray Train calls at the start of each attempt: opens it in the store and returns its dataset.

    An attempt has as many generators as the cluster then has room for, up to what the run asks for; they compare what they have
    loaded with `contents`. `generator` and Ray's `options` for it are there for simulations.
    """
    held = () if contents is None else (contents.dump(),)

    def make() -> Any:
        import ray.data
        from ray.data import ActorPoolStrategy, DataContext

        nodes = cluster_nodes()
        claim = placement.of(run, nodes, placement.GENERATE)
        generators = max(1, placement.room(run, nodes, placement.GENERATE))
        attempt = secrets.token_hex(8)
        ray.get(store.open.remote(attempt, generators))
        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_no_progress_timeout_s = -1  # a slow update is no hang
        context.retried_map_errors, context.max_map_retries = True, 2
        context.issue_detectors_config.detectors = []  # they take a closed gate for a hanging task
        faults = {"max_restarts": RESTARTS, "max_task_retries": -1}  # a node that is gone takes many tries to be called dead
        # One ticket is one row and one block: a block of several would be waited for as a whole. What makes and admits
        # tickets claims nothing: the run's pools may leave nothing.
        # One at a time: unbounded, 2000 tickets keep Ray starting processes for minutes before the first sample; bounded, they
        # take about a quarter of a minute, and 20000 half a minute.
        tickets = run.train.updates * blocks(run)
        data = ray.data.read_datasource(_tickets(tickets), num_cpus=0, concurrency=1, override_num_blocks=tickets)
        data = data.map_batches(
            Gate,
            fn_constructor_args=(store, attempt, run.train.timeout),
            batch_size=None,
            compute=ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=_WAITING),
            num_cpus=0,
            **faults,
        )
        data = data.map_batches(
            generator,
            fn_constructor_args=(run.model_dump_json(), store, attempt, *held),
            batch_size=None,
            compute=ActorPoolStrategy(size=generators, max_tasks_in_flight_per_actor=2),
            num_cpus=claim.cpus,
            num_gpus=claim.gpus or None,
            label_selector=dict(claim.labels) or None,
            **faults,
            **options,
        )
        if run.method.needs_rewards and groups:
            data = data.map_batches(
                Scorer,
                fn_constructor_args=(client(run, groups, store), attempt, run.train.timeout),
                batch_size=None,
                compute=ActorPoolStrategy(size=run.pools.reward.replicas),
                num_cpus=0,
                **faults,
            )
        return data

    return make


def data_config(run: Run, nodes: list[placement.Node]) -> Any:
    """How Ray Train shares the blocks out: in order, so that ticket t goes to worker t mod workers."""
    from ray.data import ExecutionOptions
    from ray.data._internal.execution.interfaces import ExecutionResources
    from ray.train import DataConfig

    others = [c for c in placement.claims(run, nodes) if c.pool == placement.REWARD]  # the trainers are left out by Train
    taken = ExecutionResources(cpu=sum(c.replicas * c.cpus for c in others), gpu=sum(c.replicas * c.gpus for c in others))
    with warnings.catch_warnings():  # Ray 2.60's other way, labels, would need them on every node
        warnings.filterwarnings("ignore", message=".*exclude_resources. is deprecated")
        options = ExecutionOptions(preserve_order=True, exclude_resources=taken)
    return DataConfig(enable_shard_locality=False, execution_options=options)  # locality waits for blocks that cannot come


def _tickets(n: int) -> Any:
    """A datasource of n blocks with one row each, n = 0, 1, ..."""
    import pyarrow as pa
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    class Tickets(Datasource):
        def estimate_inmemory_data_size(self) -> int:
            return 8 * n

        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
            about = BlockMetadata(num_rows=1, size_bytes=8, input_files=None, exec_stats=None)
            return [ReadTask(lambda i=i: [pa.table({"n": [i]})], about) for i in range(n)]

    return Tickets()


class Stream:
    """A learner's end of the pipeline: its blocks in order, each proven to come from weights that were published.

    `publish` and `batches` are collective.
    """

    def __init__(self, session: Session, store: Any, ranks: Ranks, base: Mapping[str, str]) -> None:
        """`base`: digests of what this worker holds and does not train."""
        import ray.train

        self.session, self.store, self.ranks = session, store, ranks
        self.run, self.blocks = session.run, blocks(session.run)
        self.attempt, self.generators = ray.get(store.current.remote())
        self.published = Published(session.run, base)
        shard = ray.train.get_dataset_shard("train")
        # A batch is a block; prefetching would let blocks grow old in a buffer, and at staleness 0 wait for ever.
        self.iterator = iter(shard.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
        self.thread = ThreadPoolExecutor(1)
        self.first: Future[rows.Columns] | None = None  # on its way while the learner evaluates
        self.started, self.consumed = False, 0
        self.metrics: dict[str, float] = {}

    def publish(self, version: int, trained: Any) -> dict[str, float]:
        """Hand the trained weights, whole, to the pool. Returns metrics of the update before."""
        import ray

        start = time.monotonic()
        arrays = weights.to_numpy(trained)
        # Every rank has the same weights, so no rank has to ask.
        self.published.add(version, weights.digest(arrays), weights.probe(self.session))
        if self.ranks.rank == 0:
            ray.get(self.store.publish.remote(self.attempt, version, arrays, self.consumed))
        if not self.started:
            self.started, self.first = True, self.thread.submit(self._pull)
        return {**self.metrics, f"{PREFIX}publish_seconds": time.monotonic() - start}

    def batches(self, step: int) -> Iterable[Rollouts]:
        """This worker's micro-batches of an update."""
        self.metrics = dict.fromkeys((_STALENESS, _PROBE, _WAIT), 0.0)
        geometry, rank = self.session.geometry, self.ranks.rank
        for a in range(geometry.accumulation):
            start = time.monotonic()
            with self.ranks.agreed():
                columns, lost = self._next()
                if lost is None:
                    staleness, error = self.published.check(columns, step, step * self.blocks + a * geometry.workers + rank)
                    self.metrics[_STALENESS] += staleness / geometry.accumulation
                    self.metrics[_PROBE] = max(self.metrics[_PROBE], error)
            if lost is not None:
                raise lost  # Ray starts the workers again
            self.metrics[_WAIT] += time.monotonic() - start
            self.consumed += geometry.workers
            policy = self.session.policy
            policy.calls.images += columns["seeds"].size
            policy.calls.denoiser_forward += int(columns["denoiser_forward"].sum())
            rollouts = rows.to_rollouts(columns, self.session.model.device)
            if rollouts.rewards is not None:
                policy.calls.reward_queries += columns["seeds"].size
            yield self.session.scored(rollouts)

    def close(self) -> None:
        import ray

        ray.get(self.store.close.remote(self.attempt))

    def _next(self) -> tuple[rows.Columns, Exception | None]:
        """The next block with rows; or what was lost on the way to it. Raises what is final: a fault of the run itself."""
        try:
            coming, self.first = self.first or self.thread.submit(self._pull), None
            since = time.monotonic()
            while not wait([coming], min(_PATIENCE, beats(self.run.train.timeout))).done:
                self.ranks.touch()
                since = self._waiting_since(since)
            return coming.result(), None
        except Exception as error:
            if (cause := plain(error)) is not None:
                raise cause from None
            return {}, error

    def _pull(self) -> rows.Columns:
        for columns in self.iterator:
            if len(columns["ticket"]):
                return columns
        raise RuntimeError("the generation pipeline ended before the run did")

    def _waiting_since(self, since: float) -> float:
        """Since when a block is waited for that could come.

        Raises RuntimeError when part of the generators has lost its place, or no block has come for too long.

        Ray would keep the tickets of the lost until the place is back, and all blocks behind them; a new attempt makes do with
        the others. When no generator has a place, or a reward lacks one, waiting is all there is.
        """
        nodes = cluster_nodes()
        left = placement.room(self.run, nodes, placement.GENERATE)
        if 0 < left < self.generators:
            raise RuntimeError(f"the cluster has room for {left} of {self.generators} generators left; the workers start again")
        rewards = sum(c.replicas for c in placement.claims(self.run, nodes) if c.pool == placement.REWARD)
        if left == 0 or placement.room(self.run, nodes, placement.REWARD) < rewards:
            return time.monotonic()
        # Who hangs was started again after one limit, and has had another one for its work.
        if (waited := time.monotonic() - since) > 2 * self.run.train.timeout:
            raise RuntimeError(
                f"no samples have come for {waited:.0f} s: an unknown part of the pipeline hangs, and the workers restart;"
                " if sampling takes that long, raise train.timeout"
            )
        return since
