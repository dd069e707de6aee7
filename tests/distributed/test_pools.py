"""Whole runs with pools: the same numbers as without, and what happens when a part of them dies, lies or fails."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydiff.config import Run, override
from raydiff.core.policy import NonFiniteReward, RewardFailed
from raydiff.distributed import checkpoint, launch
from raydiff.distributed.launch import Result, train
from raydiff.distributed.storage import Folder
from raydiff.distributed.weights import SyncError
from raydiff.local import fit
from tests.distributed.test_train import adapter, distance

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
MakeRun = Callable[..., Run]
UPDATES = 3
BOTH = {"generation.where": "pool", "rewards.where": "pool"}


@pytest.fixture(scope="module")
def pooled(tiny_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """pooled({"method.n": 1}): two trainers, two generators and two reward replicas, on-policy, on 4 CPUs."""
    storage = str(tmp_path_factory.mktemp("storage"))

    def make(changes: dict[str, Any] | None = None, method: str = "draft_lv") -> Run:
        base = tiny_run(
            method,
            {
                "storage": storage,
                "model.kind": "tests.distributed.faulty",
                "rewards": {"blue": {"kind": "tests.distributed.steered"}, "mirror": {"kind": "symmetry", "weight": 0.3}},
                "evaluate": {"images": 4, "every": 2, "grid": 0, "rewards": {"size": {"kind": "jpeg_size"}}},
                "batch": {"size": 4, "micro": 1},
                "generation.max_staleness": 0,
                "train": {"updates": UPDATES, "checkpoint_every": 1},
                "pools.train": {"replicas": 2, "num_cpus": 0.5},
                "pools.generate": {"replicas": 2, "num_cpus": 0.5},
                "pools.reward": {"replicas": 2, "num_cpus": 0.25},
                **BOTH,
            },
        )
        return override(base, changes or {})

    return make


@pytest.fixture(scope="module")
def undisturbed(cluster: str, pooled: MakeRun) -> Result:
    return train(pooled())


def history(result: Result) -> list[dict[str, float]]:
    last = checkpoint.latest(Folder(result.folder))
    assert last is not None
    return last.history


def assert_equal_step_by_step(result: Result, reference: list[dict[str, float]], rel: float = 1e-5) -> None:
    """The metrics of `reference`, at each step; counts of calls included."""
    ours = history(result)
    assert [row["step"] for row in ours] == [row["step"] for row in reference]
    for mine, theirs in zip(ours, reference, strict=True):
        for name in theirs.keys() - {"seconds"}:
            if not name.startswith("pools/"):
                assert mine[name] == pytest.approx(theirs[name], rel=rel), (theirs["step"], name)


def steps_without(result: Result) -> list[float]:
    return [row["step"] for row in history(result)]


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
    run = pooled({"pools.generate.replicas": 1, "pools.reward.replicas": 1, "batch.micro": 2, "sampler.eta": 0.5}, method)
    run = override(run, {"method.k": 2} if method == "draft_k" else {"method.last_steps": 3})
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
    original = launch._store

    def kept(*args: Any) -> Any:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(launch, "_store", kept)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sabotage", "message"),
    [("copies", "the weights did not arrive"), ("deaf", "its network answers as if it did not")],
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
