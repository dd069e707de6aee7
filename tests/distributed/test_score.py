"""The reward pool against the same rewards in this process."""

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from raydiff.config import Run
from raydiff.core.reward_vjp import RewardError
from raydiff.distributed import score
from raydiff.distributed.score import Group, RewardReplica
from raydiff.distributed.weights import SyncError
from raydiff.placement import Node
from raydiff.session import Scores

MakeRun = Callable[..., Run]
PROMPTS = ["a cat", "a dog", "an ant", "a fox", "a bee"]


@pytest.fixture
def run(tiny_run: MakeRun) -> Run:
    """Two rewards that are trained on, and a black box that is measured."""
    rewards = {"blue": {"kind": "tests.distributed.steered"}, "mirror": {"kind": "symmetry", "weight": -0.3}, "where": "pool"}
    return tiny_run(
        changes={"rewards": rewards, "evaluate.rewards": {"size": {"kind": "jpeg_size"}}, "pools.reward.num_cpus": 0.2}
    )


def pictures(n: int = len(PROMPTS)) -> torch.Tensor:
    return torch.rand(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_remote_gradients_are_the_local_ones(cluster: str, run: Run) -> None:
    from raydiff.config import override

    groups = score.start(override(run, {"pools.reward.replicas": 3}), [Node(4)])
    local, weight = Scores.here(run, "cpu"), torch.linspace(0.5, 2, len(PROMPTS))
    mine = pictures().requires_grad_(True)
    total, parts = local.training(mine, PROMPTS)
    (weight * total).sum().backward()
    for workers in (1, 2, 5):  # learners share three replicas out: one has all, or one, or half of one
        for rank in range(workers):
            theirs = pictures().requires_grad_(True)
            remote = score.client(run, groups, None, rank, workers).scores()
            far, named = remote.training(theirs, PROMPTS)
            (weight * far).sum().backward()
            assert torch.allclose(far, total, rtol=1e-6)
            assert theirs.grad is not None
            assert mine.grad is not None
            assert (theirs.grad - mine.grad).norm() <= 1e-6 * mine.grad.norm()
            assert named.keys() == parts.keys() == {"blue", "mirror"}
            held_out = remote.evaluation(pictures(), PROMPTS)[1]
            assert torch.equal(held_out["size"], local.evaluation(pictures(), PROMPTS)[1]["size"])


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_learners_that_ask_at_once(cluster: str, run: Run) -> None:
    groups = score.start(run, [Node(4)])
    expected = Scores.here(run, "cpu").training(pictures(), PROMPTS)[0]
    found: dict[int, torch.Tensor] = {}

    def ask(rank: int) -> None:
        client = score.client(run, groups, None, rank, 8)
        found[rank] = torch.cat([client.score(pictures()[i : i + 1], PROMPTS[i : i + 1])[0] for i in range(len(PROMPTS))])

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.allclose(total, expected, rtol=1e-6) for total in found.values())


@pytest.fixture
def replica(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RewardReplica]:
    """replica(run): the actor's object, without Ray."""
    monkeypatch.setattr(score, "device", lambda cpus: torch.device("cpu"))
    return lambda changed=run, names=("blue", "mirror"): RewardReplica(changed.model_dump_json(), names)


def test_requests_that_wait_together_are_one_batch(replica: Callable[..., RewardReplica]) -> None:
    actor, images = replica(), pictures().numpy()
    sizes: list[int] = []
    call = actor._call

    def counted(pixels: np.ndarray, *rest: object) -> object:
        sizes.append(len(pixels))
        return call(pixels, *rest)  # type: ignore[arg-type]

    actor._call = counted  # type: ignore[method-assign, assignment]

    async def scenario() -> list[object]:
        asked = [actor.score(images[i : i + 1], [PROMPTS[i]], False, i < 4) for i in range(5)]
        return list(await asyncio.gather(*asked))

    answers = asyncio.run(scenario())
    assert sizes == [1, 3, 1]  # the first is served at once, three wait for it, and the fifth wants no gradient
    for i, answer in enumerate(answers):
        alone = asyncio.run(replica().score(images[i : i + 1], [PROMPTS[i]], False, i < 4))
        assert isinstance(alone, type(answer))
        assert np.allclose(alone.parts["blue"], answer.parts["blue"], rtol=1e-6)  # type: ignore[union-attr, attr-defined]


def test_one_request_that_raises_is_its_own_fault(replica: Callable[..., RewardReplica], run: Run) -> None:
    from raydiff.config import override

    actor, images = replica(override(run, {"rewards.blue.raise_for": "a fox"})), pictures().numpy()

    async def scenario() -> list[object]:
        return list(
            await asyncio.gather(
                actor.score(images[:2], PROMPTS[:2], False, True), actor.score(images[2:], PROMPTS[2:], False, True)
            )
        )

    good, bad = asyncio.run(scenario())
    assert not isinstance(good, RewardError)
    assert isinstance(bad, RewardError)
    assert (bad.name, bad.row) == ("blue", 1)  # the second of its own request
    assert str(bad) == "reward 'blue' failed: RuntimeError: the judge is asleep"


def test_a_reward_that_raises_once_is_asked_again(replica: Callable[..., RewardReplica], run: Run, tmp_path: Path) -> None:
    from raydiff.config import override

    actor = replica(override(run, {"rewards.blue.raise_once": str(tmp_path / "raised")}))
    answer = asyncio.run(actor.score(pictures().numpy(), PROMPTS, False, True))
    assert not isinstance(answer, RewardError)
    assert answer.gradient is not None
    assert answer.gradient.shape == (5, 3, 16, 16)


def test_learners_share_the_replicas_out(run: Run) -> None:
    def mine(workers: int, replicas: int) -> list[list[int]]:
        group = Group(("blue",), tuple(range(replicas)))
        return [list(score.client(run, [group], None, rank, workers).mine(group.replicas)) for rank in range(workers)]

    assert mine(1, 3) == [[0, 1, 2]]
    assert mine(2, 4) == [[0, 1], [2, 3]]
    assert mine(4, 2) == [[0], [0], [1], [1]]
    assert mine(3, 2) == [[0], [0], [1]]


def test_a_live_replica_with_other_weights_is_refused(tiny_run: MakeRun, replica: Callable[..., RewardReplica]) -> None:
    """As one would be that was started again while its files were replaced for a moment."""
    drawn = tiny_run(changes={"rewards": {"own": {"kind": "tests.distributed.drawn"}}, "rewards.where": "pool"})
    torch.manual_seed(0)
    first, other = (replica(drawn, ("own",)) for _ in range(2))
    files, held = asyncio.run(first.ready())
    group = Group(("own",), (), files, held)
    answer, wrong = (asyncio.run(replica.score(pictures().numpy(), PROMPTS, False, False)) for replica in (first, other))
    score._require_same(group, answer.held)  # type: ignore[union-attr]
    with pytest.raises(SyncError, match="a reward replica holds other weights of 'own' than the pool did at the start"):
        score._require_same(group, wrong.held)  # type: ignore[union-attr]
