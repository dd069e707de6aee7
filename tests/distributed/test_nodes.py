"""Pools on simulated nodes with labels: who runs where, and what happens when a node goes."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from raydiff.config import ConfigError, Run
from raydiff.distributed.launch import Result, train
from tests.distributed.conftest import wait_for
from tests.distributed.pools import assert_equal_step_by_step
from tests.distributed.test_train import index

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(500)]
MakeRun = Callable[..., Run]
POOLS = ("train", "generate", "reward")


class Nodes:
    """A head that has no CPUs, and labelled nodes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = {pool: self.add(pool) for pool in POOLS}

    def add(self, pool: str) -> Any:
        return self.cluster.add_node(num_cpus=1, labels={"raydiff-pool": pool})


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """One node for each pool."""
    import ray

    os.environ.setdefault("RAY_worker_niceness", "0")
    found = Nodes()
    ray.init(address=found.cluster.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.cluster.shutdown()
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # or later drivers would look for this cluster


@pytest.fixture
def labelled(pooled: MakeRun) -> MakeRun:
    def make(changes: dict[str, Any] | None = None) -> Run:
        labels = {f"pools.{pool}.labels": {"raydiff-pool": pool} for pool in POOLS}
        return pooled({**labels, "pools.reward.replicas": 1, "pools.generate.num_cpus": 0.5, **(changes or {})})

    return make


def label_of(node_id: str) -> str:
    import ray

    return next(n["Labels"]["raydiff-pool"] for n in ray.nodes() if n["NodeID"] == node_id)


def test_actors_are_where_their_labels_say(nodes: Nodes, labelled: MakeRun, tmp_path: Path) -> None:
    places = {"model.places": str(tmp_path), "rewards.blue.places": str(tmp_path)}
    train(labelled({**places, "train.updates": 1}))
    seen = {path.name.split("-")[0]: label_of(path.name.split("-")[1]) for path in tmp_path.iterdir()}
    assert seen == {"learner": "train", "generator": "generate", "reward": "reward"}


def test_a_label_that_no_node_carries_is_named(nodes: Nodes, labelled: MakeRun) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"pools\.generate\.labels = \{'raydiff-pool': 'nowhere'\}: no node .* carries them"):
        train(labelled({"pools.generate.labels": {"raydiff-pool": "nowhere"}}))
    assert time.monotonic() - start < 30


def reference(labelled: MakeRun) -> list[dict[str, float]]:
    """The same run in one process: what pools give at staleness 0."""
    from raydiff.local import fit

    alone = {"generation.where": "learner", "rewards.where": "learner", "pools.train.replicas": 1}
    return list(fit(labelled(alone)))


def disturbed(run: Run, disturb: Callable[[], None]) -> Result:
    """The run, with something done to the cluster after its first update's checkpoint."""
    with ThreadPoolExecutor(1) as thread:  # for the run: Ray adds nodes in the main thread only
        running = thread.submit(train, run)
        wait_for(index(run.storage, 1))
        disturb()
        return running.result()


def test_a_removed_generation_node(nodes: Nodes, labelled: MakeRun, tmp_path: Path) -> None:
    second = nodes.add("generate")
    run = labelled({"storage": str(tmp_path), "pools.generate.num_cpus": 1, "rewards.blue.pause": 0.5})
    result = disturbed(run, lambda: nodes.cluster.remove_node(second, allow_graceful=False))
    assert_equal_step_by_step(result, reference(labelled))


def test_all_generation_nodes_removed_and_one_added(nodes: Nodes, labelled: MakeRun, tmp_path: Path) -> None:
    def disturb() -> None:
        nodes.cluster.remove_node(nodes.nodes["generate"], allow_graceful=False)
        time.sleep(5)
        nodes.add("generate")

    run = labelled({"storage": str(tmp_path), "rewards.blue.pause": 0.5, "pools.generate.replicas": 1})
    assert_equal_step_by_step(disturbed(run, disturb), reference(labelled))


def test_a_removed_reward_node(nodes: Nodes, labelled: MakeRun, tmp_path: Path) -> None:
    def disturb() -> None:
        nodes.cluster.remove_node(nodes.nodes["reward"], allow_graceful=False)
        time.sleep(5)
        nodes.add("reward")

    run = labelled({"storage": str(tmp_path), "rewards.blue.pause": 0.5})
    assert_equal_step_by_step(disturbed(run, disturb), reference(labelled))


def test_a_reward_node_removed_for_good(nodes: Nodes, labelled: MakeRun, tmp_path: Path) -> None:
    second = nodes.add("reward")
    run = labelled(
        {"storage": str(tmp_path), "rewards.blue.pause": 0.5, "pools.reward.replicas": 2, "pools.reward.num_cpus": 1}
    )
    result = disturbed(run, lambda: nodes.cluster.remove_node(second, allow_graceful=False))
    assert_equal_step_by_step(result, reference(labelled))


def test_a_removed_train_node_is_waited_for(nodes: Nodes, labelled: MakeRun, tmp_path: Path) -> None:
    second = nodes.add("train")

    def disturb() -> None:
        nodes.cluster.remove_node(second, allow_graceful=False)
        time.sleep(5)
        nodes.add("train")

    run = labelled({"storage": str(tmp_path), "rewards.blue.pause": 0.5, "pools.train.num_cpus": 1})
    assert_equal_step_by_step(disturbed(run, disturb), reference(labelled))


def test_a_removed_train_node(nodes: Nodes, labelled: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that is left goes on with twice the micro-batches."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
    second = nodes.add("train")
    trainers = {"pools.train.num_cpus": 1, "pools.train.min_replicas": 1}
    run = labelled({"storage": str(tmp_path), "rewards.blue.pause": 0.5, **trainers})
    result = disturbed(run, lambda: nodes.cluster.remove_node(second, allow_graceful=False))
    assert_equal_step_by_step(result, reference(labelled))
