"""How well the pools overlap with training: rounds a second, the learner's idle share, how old the samples are.

python benchmarks/pipeline.py                # simulated costs: sampling and training sleep, all else is the real pipeline
python benchmarks/pipeline.py --publish      # what it takes to publish an adapter of 13 MB
python benchmarks/pipeline.py --embedded     # the embedded model: sampling in the learner against sampling in a pool
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydiff.config import Run, override
from raydiff.core.rollouts import Rollouts
from raydiff.distributed import pipeline, rows, weights
from raydiff.distributed.generate import Generator
from raydiff.distributed.weights import WeightStore
from raydiff.plan.clusters import cluster_nodes

RUN = Run.model_validate(
    {
        "name": "simulated",
        "model": {"kind": "stable_diffusion"},
        "method": {"kind": "draft_k"},
        "rewards": {"blue": {"kind": "colour"}},
        "batch": {"size": 8, "micro": 2},
        "train": {"updates": 12},
        "generation": {"where": "pool"},
        "pools": {"train": {"num_cpus": 0.1}, "generate": {"num_cpus": 0.1}},
    }
)
_WARMUP, _WORK = 3, 15.0  # updates that are not counted, and seconds of work in those that are
ADAPTER = {"adapter": np.zeros(13 * 2**20 // 4, np.float32)}  # 13 MiB, about SD 1.5's LoRA of rank 16


class Simulated(Generator):
    """A generator whose sampling is a sleep of SAMPLE_SECONDS. All else is a generator's."""

    def load(self) -> None:
        self.seconds = float(os.environ.get("SAMPLE_SECONDS", "0"))

    def hold(self, arrays: weights.Arrays) -> tuple[str, np.ndarray]:
        return weights.digest(arrays), self.probe

    def sample(self, ticket: int) -> rows.Columns:
        if (crash := os.environ.get("CRASH_AT")) and ticket == int(crash) and _first(Path(os.environ["CRASH_ONCE"])):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        n = self.run.batch.micro
        blank = Rollouts(("a",) * n, torch.zeros(n, 1, dtype=torch.int64), torch.zeros(n, 1, 1, 4, 8, 8), (0,))
        return self.columns(blank, ticket, denoiser_forward=0)


@dataclass
class Seen:
    """What the learners of a simulated run saw."""

    tickets: dict[int, list[int]] = field(default_factory=dict)  # by worker, in the order they came
    staleness: list[int] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)
    ends: list[float] = field(default_factory=list)  # of each update
    waits: list[float] = field(default_factory=list)  # of worker 0, one an update
    publish: list[float] = field(default_factory=list)
    store: dict[str, Any] = field(default_factory=dict)

    def steady(self, warmup: int = _WARMUP) -> dict[str, float]:
        """Over the updates after the first ones: seconds a round, and worker 0's idle share."""
        span = self.ends[-1] - self.ends[warmup - 1]
        return {"round": span / (len(self.ends) - warmup), "idle": sum(self.waits[warmup:]) / span}


def simulate(
    run: Run, *, sample: float, train: float, adapter: weights.Arrays, environment: dict[str, str] | None = None
) -> Seen:
    """Drive the real pipeline of `run` with sampling and training that sleep so many seconds a block. Ray must be up.

    Learners are threads here, which take their blocks as Ray Train's workers do and wait for each other after each update.
    """
    import ray

    blocks, workers = pipeline.blocks(run), run.pools.train.replicas
    store = ray.remote(num_cpus=0)(WeightStore).remote(run.name, run.train.updates, blocks, run.generation.max_staleness)
    environment = {"SAMPLE_SECONDS": str(sample), **(environment or {})}
    data = pipeline.factory(run, store, [], generator=Simulated, runtime_env={"env_vars": environment})()
    shards = pipeline.data_config(run, cluster_nodes()).configure({"train": data}, workers, None, None)
    (attempt, _), seen, failures = ray.get(store.current.remote()), Seen(), []
    ray.get(store.publish.remote(attempt, 0, adapter, 0))

    def publish(version: int) -> None:
        start = time.monotonic()
        ray.get(store.publish.remote(attempt, version, adapter, version * blocks))
        seen.publish.append(time.monotonic() - start)
        seen.ends.append(time.monotonic())

    barrier = threading.Barrier(workers)

    def learn(rank: int) -> None:
        batches = iter(shards[rank]["train"].iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
        seen.tickets[rank] = []
        for step in range(run.train.updates):
            waited = 0.0
            for _ in range(blocks // workers):
                start = time.monotonic()
                block = next(batches)
                waited += time.monotonic() - start
                seen.tickets[rank].append(int(block["ticket"][0]))
                seen.staleness.append(step - int(block["version"][0]))
                seen.digests.add(str(block["digest"][0]))
                time.sleep(train)
            barrier.wait()
            if rank == 0:
                seen.waits.append(waited)
                publish(step + 1)

    def guarded(rank: int) -> None:
        try:
            learn(rank)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=guarded, args=(rank,), daemon=True) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen.store = ray.get(store.status.remote())
    ray.get(store.close.remote(attempt))
    ray.kill(store)
    if failures:
        raise failures[0]
    return seen


def _first(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def table(sample: float, train: float, cases: Sequence[tuple[int, int]]) -> list[dict[str, float]]:
    """One row per (generators, staleness): a block takes `sample` seconds to make and `train` to learn from."""
    found = []
    blocks = pipeline.blocks(RUN)
    for generators, staleness in cases:
        # What perfect overlap, and none at all, would take.
        making, learning = -(-blocks // generators) * sample, blocks * train
        best, serial = max(blocks * sample / generators, learning), making + learning
        run = override(
            RUN,
            {
                "generation.max_staleness": staleness,
                "pools.generate.replicas": generators,
                "train.updates": _WARMUP + max(4, int(_WORK / best)),
            },
        )
        seen = simulate(run, sample=sample, train=train, adapter=ADAPTER)
        steady = seen.steady()
        row = {
            "generators": generators, "staleness": staleness, "worst": max(seen.staleness), "s_a_round": steady["round"],
            "overlap": (serial - steady["round"]) / (serial - best), "learner_idle": steady["idle"],
            "ideal": best, "serial": serial,
        }  # fmt: skip
        print({k: round(v, 3) for k, v in row.items()}, flush=True)
        found.append(row)
    return found


def publication(times: int = 20) -> float:
    """Median seconds in which a learner hands 13 MiB to the store: numpy by value, digest included."""
    import ray

    store = ray.remote(num_cpus=0)(WeightStore).remote("publish", times, 4, 1)
    ray.get(store.open.remote("a", 1))
    spent = []
    for version in range(times):
        start = time.monotonic()
        weights.digest(ADAPTER)
        ray.get(store.publish.remote("a", version, ADAPTER, 0))
        spent.append(time.monotonic() - start)
    ray.kill(store)
    return statistics.median(spent)


def embedded(updates: int) -> dict[str, dict[str, float]]:
    """The demo's recipe with one trainer that samples for itself, and with one generator beside it: seconds an update."""
    from raydiff.config import load
    from raydiff.distributed import checkpoint
    from raydiff.distributed.launch import train
    from raydiff.distributed.storage import Folder

    changes = {"train.updates": updates, "evaluate.every": 1000, "evaluate.images": 2, "train.checkpoint_every": 1000}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        base = override(
            load("jobs/recipes/emoji_draft_lv.toml"),
            {**changes, "storage": folder, "pools.train.replicas": 1, "batch.micro": 2},
        )
        for name, where in {"learner": {}, "pool": {"generation.where": "pool", "generation.max_staleness": 2}}.items():
            run = override(base, {**where, "pools.train.num_cpus": 0.9, "pools.generate.num_cpus": 0.9})
            last = checkpoint.latest(Folder(train(run).folder))
            assert last is not None
            history = last.history[3:-1]  # without the start, and the last update's evaluation
            span = history[-1]["seconds"] - history[0]["seconds"]
            waited = sum(row.get("pools/learner_waited", 0.0) for row in history[1:])
            found[name] = {"s_an_update": span / (len(history) - 1), "learner_idle": waited / span}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish", action="store_true")
    parser.add_argument("--embedded", action="store_true")
    every = ["1,0", "1,1", "2,1", "4,0", "4,1", "4,2", "6,1", "6,2"]
    parser.add_argument("--cases", nargs="+", default=every, metavar="GENERATORS,STALENESS")
    parser.add_argument("--updates", type=int, default=16)
    arguments = parser.parse_args()
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    if arguments.publish:
        print(json.dumps({"publish_13_MiB_seconds": publication()}))
    elif arguments.embedded:
        print(json.dumps(embedded(arguments.updates), indent=1))
    else:
        table(1.2, 0.3, [(int(a), int(b)) for a, b in (case.split(",") for case in arguments.cases)])
