"""The streaming pipeline without a model: order, staleness, and every way in which it could wait for ever."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.pipeline import RUN, Seen, simulate
from raydiff.config import Run, override
from raydiff.distributed import rows, weights
from raydiff.distributed.meter import Lines, Meter
from raydiff.distributed.weights import WeightStore

SMALL = {"a": np.arange(6, dtype=np.float32)}


def run(updates: int = 4, **changes: Any) -> Run:
    return override(RUN, {"train.updates": updates, **{k.replace("__", "."): v for k, v in changes.items()}})


def in_order(seen: Seen, updates: int, blocks: int, workers: int) -> None:
    """Every ticket once, each at the worker and in the update that it is for."""
    assert seen.tickets == {rank: list(range(rank, updates * blocks, workers)) for rank in range(workers)}


@pytest.mark.ray
@pytest.mark.timeout(90)
@pytest.mark.parametrize(
    ("workers", "generators", "micro", "staleness"),
    [
        *((1, 3, 2, 0), (2, 3, 1, 0), (2, 3, 2, 2)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1, 2, 0), (2, 1, 4, 0), (1, 3, 2, 1))),
    ],
)
def test_blocks_come_in_order_and_young_enough(cluster: str, workers: int, generators: int, micro: int, staleness: int) -> None:
    """At staleness 0 each of these hangs if blocks are prefetched, kept for locality, reordered, or joined."""
    config = run(
        pools__train__replicas=workers, pools__generate__replicas=generators, batch__micro=micro,
        generation__max_staleness=staleness,
    )  # fmt: skip
    seen = simulate(config, sample=0.02, train=0.02, adapter=SMALL)
    in_order(seen, 4, 8 // micro, workers)
    assert min(seen.staleness) >= 0
    assert max(seen.staleness) <= staleness
    assert seen.digests == {weights.digest(SMALL)}
    assert seen.store["bytes_published"] == 5 * 24
    assert 4 * 8 - micro <= seen.store["pools"]["generate"]["images"] <= 4 * 8  # nobody waits for the last report


@pytest.mark.ray
@pytest.mark.timeout(120)
@pytest.mark.parametrize("generators", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_crash_at_staleness_0_neither_hangs_nor_loses_a_block(cluster: str, generators: int, tmp_path: Path) -> None:
    crash = {"CRASH_AT": "5", "CRASH_ONCE": str(tmp_path / "crashed")}
    config = run(generation__max_staleness=0, pools__generate__replicas=generators)
    seen = simulate(config, sample=0.02, train=0.02, adapter=SMALL, environment=crash)
    assert (tmp_path / "crashed").exists()
    in_order(seen, 4, 4, 1)
    assert set(seen.staleness) == {0}


@pytest.mark.ray
@pytest.mark.timeout(90)
def test_a_long_update_is_not_taken_for_a_hang(cluster: str) -> None:
    seen = simulate(run(updates=2, generation__max_staleness=0), sample=0.01, train=2.0, adapter=SMALL)
    in_order(seen, 2, 4, 1)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Callable[..., WeightStore]:
    """store(blocks, max_staleness, updates): the actor's object, without Ray."""
    monkeypatch.setattr("ray.put", lambda value: value)
    return lambda blocks=2, max_staleness=1, updates=9: WeightStore("tiny", updates, blocks, max_staleness)


def test_gate_waits_for_the_version_that_the_bound_needs(store: Callable[..., WeightStore]) -> None:
    async def scenario() -> None:
        gate = store(blocks=2, max_staleness=1)
        await gate.open("one", 1)
        early = asyncio.create_task(gate.admit("one", 0))
        await asyncio.sleep(0)
        assert not early.done()  # nothing is published
        await gate.publish("one", 3, SMALL, 0)
        assert await early == 6  # resumed at version 3: its first block
        assert [await gate.admit("one", n) for n in (1, 2, 3)] == [7, 8, 9]  # updates 3 and 4 may use version 3
        late = asyncio.create_task(gate.admit("one", 4))
        await asyncio.sleep(0)
        assert not late.done()
        assert (await gate.status())["waiting_for"] == 4
        assert (await gate.status())["blocks_in_flight"] == 4
        await gate.publish("one", 4, SMALL, 2)
        assert await late == 10
        assert await gate.admit("one", 4) == 10  # a replay of a lost block
        assert (await gate.status())["blocks_in_flight"] == 3

    asyncio.run(scenario())


def test_an_earlier_attempt_and_the_end_get_no_block(store: Callable[..., WeightStore]) -> None:
    async def scenario() -> None:
        gate = store(blocks=2, max_staleness=0, updates=2)
        await gate.open("one", 1)
        await gate.publish("one", 0, SMALL, 0)
        waiting = asyncio.create_task(gate.admit("one", 2))
        await asyncio.sleep(0)
        await gate.open("two", 1)
        assert await waiting is None
        assert await gate.admit("one", 0) is None
        for call in (gate.publish("one", 1, SMALL, 0), gate.latest("one", None), gate.latest("two", None)):
            with pytest.raises(RuntimeError, match="lost this attempt"):
                await call
        await gate.publish("two", 1, SMALL, 0)
        assert [await gate.admit("two", n) for n in range(4)] == [2, 3, None, None]  # the run has two updates
        assert (await gate.latest("two", None)) == (1, [SMALL])
        assert await gate.latest("two", 1) is None
        for _ in range(2):
            await gate.report("generate", {"images": 4.0})
        assert (await gate.status())["pools"] == {"generate": {"images": 8.0}}
        await gate.close("two")
        assert await gate.admit("two", 0) is None

    asyncio.run(scenario())


def test_status_is_rays_gauges_too(store: Callable[..., WeightStore], monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.util.metrics

    seen: dict[str, tuple[float, dict[str, str]]] = {}

    class Gauge:
        def __init__(self, name: str, tag_keys: tuple[str, ...]) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            seen[self.name] = (value, tags)

    monkeypatch.setattr(ray.util.metrics, "Gauge", Gauge)

    async def scenario() -> None:
        gate = store()
        await gate.open("one", 1)
        await gate.publish("one", 3, SMALL, 0)
        await gate.report("generate", {"images": 4.0})
        await gate.status()

    asyncio.run(scenario())
    assert seen["raydiff_pools_version"] == (3.0, {"run": "tiny"})
    assert seen["raydiff_pools_generate_images"] == (4.0, {"run": "tiny"})
    assert seen["raydiff_pools_bytes_published"] == (24.0, {"run": "tiny"})


def test_digest_is_of_names_shapes_and_values() -> None:
    a = {"x": np.zeros((2, 3), np.float32), "y": np.ones(2, np.float32)}
    others = [
        {"y": a["x"], "x": a["y"]},
        {"x": a["x"].reshape(3, 2), "y": a["y"]},
        {"x": a["x"], "y": a["y"] + np.float32(1e-7)},
        {"x": a["x"]},
    ]
    assert weights.digest(dict(reversed(a.items()))) == weights.digest(a)
    assert weights.digest({name: np.asfortranarray(w) for name, w in a.items()}) == weights.digest(a)
    assert len({weights.digest(w) for w in [a, *others]}) == 5


def test_rows_give_the_rollouts_back() -> None:
    import torch

    from raydiff.core.rollouts import Rollouts

    made = Rollouts(
        ("a", "bé"), torch.tensor([[1, 2], [3, 2**62]]), torch.randn(2, 2, 3, 1, 4, 4), (0, 2, 5),
        rewards={"total": torch.randn(2, 2), "clip": torch.randn(2, 2)}, log_probs=torch.randn(2, 2, 5), version=7, digest="d",
    )  # fmt: skip
    columns = rows.to_columns(made, 3, probe=np.zeros(4), denoiser_forward=8)
    assert all(len(column) == 2 for column in columns.values())
    back = rows.to_rollouts(columns)
    for name, value in vars(made).items():
        other = getattr(back, name)
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other), name
        elif isinstance(value, dict):
            assert value.keys() == other.keys()
            assert all(torch.equal(value[k], other[k]) for k in value)
        else:
            assert value == other, name


def status(images: float, version: int | None, waiting_for: int | None = None) -> dict[str, Any]:
    pools = {"generate": {"images": images, "busy": images / 4}} if images else {}
    return {
        "version": version, "waiting_for": waiting_for, "gate_waited": 1.0, "blocks_in_flight": 2,
        "bytes_published": 100 * (version or 0), "pools": pools,
    }  # fmt: skip


def test_meter_tells_what_an_update_added() -> None:
    meter = Meter()
    meter.since(status(4, 1))
    added = meter.since(status(10, 2))
    assert added["pools/generate_images"] == 6
    assert added["pools/bytes_published"] == 100
    assert (added["pools/version"], added["pools/blocks_in_flight"]) == (2, 2)


def test_one_line_a_pool() -> None:
    shown = Lines({"generate": 2, "reward": 1})
    assert shown.lines(status(0, None), now=0)[0].endswith("waits for the first weights")
    generate, reward = shown.lines(status(8, 3, 4), now=4)
    assert generate == "generate 2.0 pictures/s  25% busy  version 3, waits for version 4"
    assert reward.startswith("reward   0.0 pictures/s")
