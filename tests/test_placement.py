"""What pools claim, and which clusters have room for them."""

from collections.abc import Callable
from typing import Any

import pytest

from raydiff import placement
from raydiff.config import ConfigError, Pool, Run
from raydiff.placement import Node

Make = Callable[..., Run]
POOLS = {"generation.where": "pool", "rewards.where": "pool"}


def faults(run: Run, *nodes: Node) -> list[str]:
    return placement.faults(run, nodes, "the cluster")


def test_pools_in_use_are_counted_and_no_others(tiny_run: Make) -> None:
    idle = {"pools.generate.replicas": 100, "pools.reward.replicas": 100}
    assert faults(tiny_run(changes=idle), Node(1)) == []
    run = tiny_run(
        changes={**POOLS, "pools.generate.replicas": 3, "pools.generate.num_cpus": 0.5, "pools.reward.num_cpus": 0.25}
    )
    assert faults(run, Node(2.75)) == []
    (fault,) = faults(run, Node(2.25))
    assert fault.startswith(
        "pools.generate: 3 × (0.5 CPUs) = 1.5 CPUs; the cluster has 1.25 CPUs left for it on 1 node, room for 2"
    )
    assert "set pools.generate.replicas to 2" in fault


def test_replicas_are_not_spread_over_nodes_by_halves(tiny_run: Make) -> None:
    run = tiny_run(changes={"pools.train.replicas": 2, "batch.micro": 1, "pools.train.num_cpus": 3})
    assert faults(run, Node(4), Node(3)) == []
    (fault,) = faults(run, Node(5), Node(1), Node(1))
    assert "2 × (3 CPUs) = 6 CPUs; the cluster has 7 CPUs left for it on 3 nodes, room for 1" in fault


def test_room_of_one_pool_is_what_the_others_leave(tiny_run: Make) -> None:
    run = tiny_run(changes={**POOLS, "pools.generate.replicas": 3, "pools.generate.labels": {"kind": "spot"}})
    spot = Node(1, 0, {"kind": "spot"})
    assert [placement.room(run, [Node(2), *[spot] * n], placement.GENERATE) for n in (0, 1, 2, 4)] == [0, 1, 2, 3]


def test_labels_keep_a_pool_to_its_nodes(tiny_run: Make) -> None:
    labelled = {f"pools.{name}.labels": {"raydiff-pool": name} for name in ("train", "generate", "reward")}
    run = tiny_run(changes={**POOLS, **labelled, "pools.generate.replicas": 2})
    train, generate, reward = (Node(2, labels={"raydiff-pool": name}) for name in ("train", "generate", "reward"))
    assert faults(run, train, generate, reward) == []
    (fault,) = faults(run, train, generate)
    assert "pools.reward.labels = {'raydiff-pool': 'reward'}: no node of the cluster carries them" in fault
    assert "there are raydiff-pool=generate, raydiff-pool=train" in fault


def test_unlabelled_pools_leave_room_for_the_labelled(tiny_run: Make) -> None:
    run = tiny_run(changes={**POOLS, "pools.generate.labels": {"raydiff-pool": "generate"}})
    assert faults(run, Node(1, labels={"raydiff-pool": "generate"}), Node(2)) == []


def test_fractions_share_a_gpu(tiny_run: Make) -> None:
    shares = {"pools.train.num_gpus": 0.5, "pools.generate.num_gpus": 0.25, "pools.reward.num_gpus": 0.25}
    assert faults(tiny_run(changes={**POOLS, **shares}), Node(8, 1)) == []
    (fault,) = faults(tiny_run(changes={**POOLS, **shares, "pools.train.num_gpus": 0.75}), Node(8, 1))
    assert "room for 0" in fault
    with pytest.raises(ConfigError, match=r"pools\.train\.num_gpus.*only be claimed whole"):
        tiny_run(changes={"pools.train.num_gpus": 1.5})


def test_open_gpus_are_one_each_where_there_are_any(tiny_run: Make) -> None:
    run = tiny_run(changes=POOLS)
    assert [c.gpus for c in placement.claims(run, [Node(8)])] == [0, 0, 0]
    assert [c.gpus for c in placement.claims(run, [Node(8), Node(8, 4)])] == [1, 1, 1]


def test_rewards_with_an_environment_have_replicas_of_their_own(tiny_run: Make) -> None:
    own: dict[str, Any] = {"kind": "symmetry", "runtime_env": {"pip": ["a-package==1.0"]}}
    run = tiny_run(changes={**POOLS, "rewards.mirror": own, "evaluate.rewards.size": {"kind": "jpeg_size"}})
    assert [sorted(group) for group in placement.reward_groups(run)] == [["blue", "size"], ["mirror"]]
    assert placement.claims(run, [Node(8)])[-1].replicas == 2
    with pytest.raises(ConfigError, match=r"has a runtime_env.*set rewards\.where to \"pool\""):
        tiny_run(changes={"rewards.mirror": own})


def test_a_pool_with_nothing_to_do_is_refused(tiny_run: Make) -> None:
    with pytest.raises(ConfigError, match="differentiates all 4 steps here"):
        tiny_run("draft", {"generation.where": "pool"})
    with pytest.raises(ConfigError, match="differentiates all 4 steps here"):
        tiny_run("draft_k", {"generation.where": "pool", "method.k": 4})
    tiny_run("draft_k", {"generation.where": "pool", "method.k": 3})


def test_a_commands_pool_is_named_by_its_options() -> None:
    node = Node(4, labels={"zone": "a"})
    for pool, message in (
        (
            Pool(replicas=5),
            "the pool: 5 × (1 CPUs) = 5 CPUs; the cluster has 4 CPUs left for it on 1 node, room for 4: set --replicas",
        ),
        (Pool(num_cpus=8), "set --num-cpus to 4 or less"),
        (Pool(num_gpus=1), "set --num-gpus to 0"),
        (Pool(labels={"zone": "b"}), "--label = {'zone': 'b'}: no node of the cluster carries them; there are zone=a"),
    ):
        (fault,) = placement.no_room([placement.claim("generate", pool, [node], options=True)], [node], "the cluster")
        assert message in fault
