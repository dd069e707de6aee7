"""Whole runs with pools: the same numbers as without, and what happens when a part of them dies, lies or fails."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydiff.config import Run, override
from raydiff.core.policy import NonFiniteReward, RewardFailed
from raydiff.distributed import launch
from raydiff.distributed.launch import Result, train
from raydiff.distributed.ranks import PoolLost
from raydiff.distributed.weights import SyncError
from raydiff.local import fit
from tests.distributed.conftest import wait_for
from tests.distributed.pools import assert_equal_step_by_step, history, signal_one
from tests.distributed.test_train import adapter, distance

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
MakeRun = Callable[..., Run]


@pytest.fixture(scope="module")
def undisturbed(cluster: str, pooled: MakeRun) -> Result:
    return train(pooled())


def test_pools_equal_fit(undisturbed: Result, pooled: MakeRun) -> None:
    alone = list(fit(pooled({"generation.where": "learner", "rewards.where": "learner", "pools.train.replicas": 1})))
    assert_equal_step_by_step(undisturbed, alone)


def test_metrics_of_the_pools(undisturbed: Result) -> None:
    rows = history(undisturbed)[1:]
    for row in rows:
        assert row["pools/staleness"] == 0
        assert row["pools/version"] == row["step"]
        assert row["pools/probe_error"] == 0  # the same machine
        for name in ("learner_waited", "gate_waited", "generate_busy", "generate_idle", "reward_busy", "reward_idle"):
            assert row[f"pools/{name}"] >= 0, name
    assert sum(row["pools/generate_busy"] for row in rows) > 0
    size = sum(t.numel() * 4 for t in adapter(undisturbed).values())
    assert {row["pools/bytes_published"] for row in rows[1:]} == {size}
    # 4 prompts, 1 + n = 3 pictures each; evaluations ask too
    assert rows[0]["pools/reward_images"] >= 12


@pytest.mark.slow
@pytest.mark.parametrize("method", ["draft_k", "refl"])
def test_other_methods_and_one_generator_equal_fit(cluster: str, pooled: MakeRun, method: str) -> None:
    own = {"method.k": 2} if method == "draft_k" else {"method.last_steps": 3}
    one = {"pools.generate.replicas": 1, "pools.reward.replicas": 1, "batch.micro": 2, "sampler.eta": 0.5}
    run = pooled({**one, **own}, method)
    alone = list(fit(override(run, {"generation.where": "learner", "rewards.where": "learner"})))
    assert_equal_step_by_step(train(run), alone)


@pytest.mark.slow
def test_three_generators_equal_two(undisturbed: Result, pooled: MakeRun) -> None:
    result = train(pooled({"pools.generate.replicas": 3}))
    assert_equal_step_by_step(result, history(undisturbed))
    assert distance(result, undisturbed) < 1e-5


@pytest.mark.slow
def test_stale_samples_stay_within_the_bound(cluster: str, pooled: MakeRun) -> None:
    rows = history(train(pooled({"generation.max_staleness": 2, "train.updates": 6, "rewards.where": "learner"})))[1:]
    assert all(0 <= row["pools/staleness"] <= 2 for row in rows)
    assert max(row["pools/staleness"] for row in rows) > 0  # or the bound was never used


@pytest.mark.slow
def test_killed_generator_changes_nothing(undisturbed: Result, pooled: MakeRun, tmp_path: Path) -> None:
    result = train(pooled({"model.die_once": str(tmp_path / "died")}))
    assert (tmp_path / "died").exists()
    assert_equal_step_by_step(result, history(undisturbed))
    assert distance(result, undisturbed) < 1e-5


@pytest.mark.slow
def test_killed_reward_replica_changes_nothing(undisturbed: Result, pooled: MakeRun, tmp_path: Path) -> None:
    result = train(pooled({"rewards.blue.die_once": str(tmp_path / "died")}))
    assert (tmp_path / "died").exists()
    assert_equal_step_by_step(result, history(undisturbed))
    assert distance(result, undisturbed) < 1e-5


@pytest.mark.slow
def test_killed_learner_goes_on_at_the_committed_version(undisturbed: Result, pooled: MakeRun, tmp_path: Path) -> None:
    run = pooled({"rewards.where": "learner", "rewards.blue.die_once": str(tmp_path / "died"), "rewards.blue.die_at": 5})
    result = train(run)
    assert (tmp_path / "died").exists()
    assert_equal_step_by_step(result, history(undisturbed))
    assert distance(result, undisturbed) < 1e-5


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The weight stores of the runs that a test starts."""
    found: list[Any] = []
    original = launch.Launch._start_pools

    def kept(self: launch.Launch) -> None:
        original(self)
        found.append(self.store)

    monkeypatch.setattr(launch.Launch, "_start_pools", kept)
    return found


@pytest.mark.slow
def test_lost_store_starts_the_workers_again(
    undisturbed: Result, pooled: MakeRun, stores: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    follow, killed = launch.Progress.row, []

    def row(self: Any, row: dict[str, float]) -> None:
        follow(self, row)
        if row["step"] == 1 and not killed:
            killed.append(ray.kill(stores[0], no_restart=False))

    monkeypatch.setattr(launch.Progress, "row", row)
    result = train(pooled({"rewards.blue.pause": 0.3}))
    assert killed
    assert_equal_step_by_step(result, history(undisturbed))
    assert distance(result, undisturbed) < 1e-5


@pytest.mark.slow
def test_runs_do_not_share_a_store(undisturbed: Result, pooled: MakeRun, stores: list[Any]) -> None:
    for _ in range(2):
        train(pooled({"train.updates": 1, "evaluate.every": 9}))
    assert stores[0]._actor_id != stores[1]._actor_id


@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        ("copies", "the weights did not arrive"),
        pytest.param("deaf", "its network answers as if it did not", marks=pytest.mark.slow),
    ],
)
def test_sabotaged_sync_stops_the_run_within_one_round(cluster: str, pooled: MakeRun, sabotage: str, message: str) -> None:
    with pytest.raises(SyncError, match=message) as error:
        train(pooled({"model.sabotage": sabotage, "rewards.where": "learner"}))
    assert "update 1:" in str(error.value)  # update 0's samples are from the first weights, which it has by its seed


def test_rewards_that_raise(cluster: str, pooled: MakeRun, tmp_path: Path) -> None:
    """Once: asked again. Always: the run ends with what it said, the prompt and the seed."""
    run = pooled({"generation.where": "learner", "rewards.blue.raise_once": str(tmp_path / "raised")})
    with pytest.raises(
        RewardFailed, match=r"reward 'blue' failed for prompt 'a fox', seed \d+: RuntimeError: the judge is asleep"
    ):
        train(override(run, {"rewards.blue.raise_for": "a fox"}))
    assert (tmp_path / "raised").exists()


@pytest.mark.slow
def test_a_reward_replica_that_dies_at_every_call_ends_the_run_with_one_sentence(cluster: str, pooled: MakeRun) -> None:
    with pytest.raises(PoolLost) as error:
        train(pooled({"rewards.blue.die_for": "a fox", "pools.reward.replicas": 1, "generation.where": "learner"}))
    said = str(error.value)
    assert said.startswith("a reward replica with 'blue', 'mirror', 'size' has died 11 times, and is not started again; ")
    assert len(said.splitlines()) == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_reward_that_raises_once_changes_nothing(undisturbed: Result, pooled: MakeRun, tmp_path: Path) -> None:
    result = train(pooled({"rewards.blue.raise_once": str(tmp_path / "raised")}))
    assert (tmp_path / "raised").exists()
    assert_equal_step_by_step(result, history(undisturbed))


@pytest.mark.slow
def test_nan_from_the_pool_ends_the_run(cluster: str, pooled: MakeRun) -> None:
    start = time.monotonic()
    with pytest.raises(NonFiniteReward, match=r"reward 'blue' is nan for prompt 'a fox', seed \d+"):
        train(pooled({"rewards.blue.nan_for": "a fox"}))
    print(f"NaN: refused after {time.monotonic() - start:.0f} s")


@pytest.mark.slow
def test_reward_with_an_environment_of_its_own(cluster: str, pooled: MakeRun) -> None:
    """Environment variables stand for pip packages: both go through the actor's runtime_env, and reach no other process."""
    own = {"kind": "tests.distributed.environment", "runtime_env": {"env_vars": {"RAYDIFF_TEST_ENVIRONMENT": "0.25"}}}
    result = train(pooled({"rewards.own": own, "pools.reward.replicas": 1, "generation.where": "learner"}))
    assert result.after["held_out/own"] == pytest.approx(0.25)


TRAJECTORIES = {"sampler.eta": 1.0, "sampler.final_alpha": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("ddpo", {**TRAJECTORIES, "method.attempts": 2, "method.inner_epochs": 2, "method.minibatches": 2}),
        ("d3po", {**TRAJECTORIES, "method.preference": "total"}),
        ("diffusion_dpo", {"batch.micro": 2}),
    ],
)
def test_black_box_methods_equal_fit(cluster: str, pooled: MakeRun, method: str, changes: dict[str, Any]) -> None:
    """Generators ship pictures, the reward pool scores them without gradients, the learner gets rows with rewards."""
    run = pooled({**changes, "rewards.size": {"kind": "jpeg_size", "weight": 0.01}, "evaluate.rewards": {}}, method)
    alone = {"generation.where": "learner", "rewards.where": "learner", "pools.train.replicas": 1}
    # Mean advantages and log-ratios are 0 but for rounding.
    assert_equal_step_by_step(train(run), list(fit(override(run, alone))), near_zero=1e-6)


@pytest.mark.slow
def test_killed_scorer_and_learner_change_nothing(cluster: str, pooled: MakeRun, tmp_path: Path) -> None:
    """DDPO's advantages remember rewards of earlier updates, so this is also a test of what a checkpoint keeps."""
    run = pooled({**TRAJECTORIES, "method.attempts": 2, "method.min_count": 1, "storage": str(tmp_path)}, "ddpo")
    calm = history(train(run))
    killed: list[str] = []

    def found() -> list[Path]:
        return list(tmp_path.glob("*/checkpoint_000001/checkpoint.json"))

    def kill() -> None:
        wait_for(lambda: next((p for p in found() if p.stat().st_mtime > started), None))
        for name in ("MapBatches(Scorer)", "RayTrainWorker"):
            killed.append(signal_one(name, signal.SIGKILL))
            time.sleep(3)

    started = time.time()
    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = train(override(run, {"rewards.blue.pause": 0.5}))
    thread.join()
    assert len(killed) == 2
    assert_equal_step_by_step(result, calm)
