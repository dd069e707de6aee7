"""Labelled pairs on Ray: workers share the encoding, and a killed one changes nothing."""

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from raydiff.config import ConfigError, Run, override
from raydiff.data import latents
from raydiff.data.pieces import PairsError
from raydiff.distributed import checkpoint
from raydiff.distributed.launch import train
from raydiff.distributed.storage import Folder
from raydiff.local import fit
from raydiff.models.lora import WEIGHTS
from tests.data import shards
from tests.distributed.pools import found

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def test_a_killed_run_on_pairs_is_fit(cluster: str, ray_run: Callable[..., Run], tmp_path: Path) -> None:
    """Two workers encode and train; one is killed while it evaluates, after the encoding. `fit` has a cache of its own."""
    file = shards.pairs(tmp_path / "p.parquet", 2 * latents._ROWS)
    run = ray_run(
        {
            "method": {"kind": "diffusion_dpo", "source": "dataset", "beta": 500},
            "pairs.path": str(file),
            "rewards.blue.die_at": 0,
            "evaluate.clip": None,
            "storage": str(tmp_path / "runs"),
        }
    )
    alone = list(fit(override(run, {"pairs.cache": str(tmp_path / "alone")}), folder=tmp_path / "adapter"))
    result = train(override(run, {"rewards.blue.die_once": str(tmp_path / "died")}))
    assert (tmp_path / "died").exists()
    (cache,) = Path(f"{file}.latents").iterdir()
    assert len(list(cache.glob("*.f32"))) == 2
    last = checkpoint.latest(Folder(result.folder))
    assert last is not None
    for ours, theirs in zip(last.history, alone, strict=True):
        for name in theirs.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), (theirs["step"], name)
    ours, theirs = (safetensors.torch.load_file(Path(place) / "adapter" / WEIGHTS) for place in (result.folder, tmp_path))
    error = max(float((ours[name] - theirs[name]).abs().max()) for name in theirs)
    print(f"pairs on two workers and fit: adapter {error:.1e} absolute")
    assert error < 1e-5


def test_a_pool_encodes_what_one_process_does(cluster: str, ray_run: Callable[..., Run], tmp_path: Path) -> None:
    """Two actors, one row without a prompt; the second call finds nothing missing."""
    from raydiff.distributed.encode_batch import encode

    file = shards.pairs(tmp_path / "p.parquet", 4 * latents._ROWS, prompt=[" ", *["a cat"] * (4 * latents._ROWS - 1)])
    method = {"kind": "sft", "source": "dataset"}
    run = ray_run({"method": method, "pairs.path": str(file), "pools.generate.replicas": 2})
    alone = override(run, {"pairs.cache": str(tmp_path / "alone")})
    expected = latents.prepare(alone.pairs, alone.model.build(), alone.evaluate.batch)
    made = encode(run)
    assert len(made) == len(expected) == 4 * latents._ROWS - 1
    names = sorted(path.name for path in expected.folder.iterdir())
    assert sorted(path.name for path in made.folder.iterdir()) == names
    assert all((made.folder / name).read_bytes() == (expected.folder / name).read_bytes() for name in names)
    times = {path: path.stat().st_mtime_ns for path in made.folder.iterdir()}
    assert len(encode(run)) == len(made)
    assert {path: path.stat().st_mtime_ns for path in made.folder.iterdir()} == times


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_actors_that_are_killed_while_they_encode_change_no_byte(
    cluster: str, ray_run: Callable[..., Run], tmp_path: Path, seed: int
) -> None:
    """Two actors, and a kill of either every few seconds at random instants, in the middle of a write too."""
    from raydiff.distributed.encode_batch import encode

    file = shards.pairs(tmp_path / "p.parquet", 20 * latents._ROWS)
    run = ray_run({"method": {"kind": "sft", "source": "dataset"}, "pairs.path": str(file), "pools.generate.replicas": 2})
    alone = override(run, {"pairs.cache": str(tmp_path / "alone")})
    expected = latents.prepare(alone.pairs, alone.model.build(), alone.evaluate.batch)
    draw, over, killed = random.Random(seed), threading.Event(), list[int]()

    def kill() -> None:
        while not over.wait(draw.uniform(0.5, 4)) and len(killed) < 4:
            if actors := found("MapBatches(Actor)"):
                killed.append(draw.choice(actors))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    made = encode(run)
    over.set()
    thread.join()
    assert killed
    names = sorted(path.name for path in expected.folder.iterdir())
    assert sorted(path.name for path in made.folder.iterdir()) == names
    assert all((made.folder / name).read_bytes() == (expected.folder / name).read_bytes() for name in names)


def test_a_pool_ends_at_too_many_bad_pairs_and_names_one(cluster: str, ray_run: Callable[..., Run], tmp_path: Path) -> None:
    from raydiff.distributed.encode_batch import encode

    file = shards.pairs(tmp_path / "p.parquet", 40, prompt=[*["a cat"] * 3, " ", *["a dog"] * 35, " "])
    pairs = {"pairs.path": str(file), "pairs.max_bad_rows": 1}
    with pytest.raises(PairsError, match=r"pairs\.max_bad_rows = 1: already 2 rows cannot be used, the first: .*row 3"):
        encode(ray_run({"method": {"kind": "sft", "source": "dataset"}, **pairs}))


def test_pairs_that_cannot_be_encoded_end_the_run(cluster: str, ray_run: Callable[..., Run], tmp_path: Path) -> None:
    file = shards.pairs(tmp_path / "p.parquet", 4, size=(8, 8))
    method = {"kind": "sft", "source": "dataset"}
    with pytest.raises(ConfigError, match=r"no pair can be used; .*bad_rows.jsonl says why"):
        train(ray_run({"method": method, "pairs.path": str(file), "storage": str(tmp_path / "runs")}))
