"""Datasets of pictures on a pool: the same rows from any pool, once each, whatever breaks; and plain refusals."""

import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raydiff import drafts
from raydiff import generate as drawing
from raydiff.config import ConfigError, Pool, Run, Sampler, rewards
from raydiff.data import images
from raydiff.data.images import Columns
from raydiff.data.pictures import NO_IMAGE
from raydiff.distributed.batch import ABOUT, BAD_ROWS, BatchError
from raydiff.distributed.generate_batch import generate
from raydiff.distributed.score_batch import score
from raydiff.generate import Adapter
from raydiff.models import lora
from raydiff.models.stable_diffusion import Plugin
from tests.tiny import make_adapter

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

PROMPTS = [f"a {animal} {number}" for number in range(6) for animal in ("cat", "dog", "bee", "fox")]
SEEDS = (7, 8)
SAMPLER = Sampler(steps=2, guidance=2.0)
HERE = Pool(num_gpus=0)
BLUE = {"blue": "tests.distributed.steered"}
Draw = Callable[..., Any]


@pytest.fixture(scope="module")
def adapter(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    return Adapter(str(make_adapter(tiny_pipeline, tmp_path_factory.mktemp("adapter"), seed=1)), 0.5)


@pytest.fixture(scope="module")
def draw(tiny_pipeline: Path, adapter: Adapter) -> Draw:
    """draw(folder, prompts=..., replicas=3): 24 prompts × 2 seeds, 8 pictures a file, so 6 files."""

    def call(to: Path, replicas: int = 1, **changes: Any) -> Any:
        options = {
            "model": Plugin(path=str(tiny_pipeline)), "sampler": SAMPLER, "prompts": PROMPTS, "adapters": [adapter],
            "seeds": SEEDS, "batch_size": 4, "rows_per_file": 8, "pool": Pool(replicas=replicas, num_gpus=0),
        }  # fmt: skip
        return generate(str(to), **{**options, **changes})

    return call


@pytest.fixture(scope="module")
def drawn(cluster: str, draw: Draw, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of one actor."""
    folder = tmp_path_factory.mktemp("drawn") / "one.parquet"
    draw(folder)
    return folder


def times(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in sorted(folder.glob("rows-*"))}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def png(value: int, size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(value).integers(0, 256, (size, size, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def bad_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / BAD_ROWS).read_text().splitlines()]


def test_any_pool_draws_the_same_rows_and_they_are_those_of_this_process(
    drawn: Path, draw: Draw, adapter: Adapter, tiny_pipeline: Path, tmp_path: Path
) -> None:
    summary = draw(tmp_path / "three.parquet", 3)
    assert (summary.rows, summary.bad, summary.files, summary.made) == (24, 0, 6, 6)
    one, three = pq.read_table(drawn), pq.read_table(tmp_path / "three.parquet")
    assert one.equals(three)
    names = [f"rows-{a:012d}-{a + 4:012d}.parquet" for a in range(0, 24, 4)]
    assert list(times(drawn)) == list(times(tmp_path / "three.parquet")) == names
    assert [(tmp_path / "three.parquet" / n).read_bytes() for n in names] == [(drawn / n).read_bytes() for n in names]

    model = drawing.load(Plugin(path=str(tiny_pipeline)), [adapter])
    here = list(drawing.samples(model, PROMPTS, SEEDS, SAMPLER, 4))
    assert one["prompt"].to_pylist() == [s.prompt for s in here]
    assert one["seed"].to_pylist() == [s.seed for s in here]
    assert all((pixels(a) == np.asarray(s.image)).all() for a, s in zip(one["image"].to_pylist(), here, strict=True))


def test_a_row_says_what_it_takes_to_make_it_again(drawn: Path) -> None:
    row = pq.read_table(drawn).to_pylist()[13]
    model = drawing.load(
        Plugin(path=row["model"], dtype=row["dtype"]), [Adapter(a["folder"], a["weight"]) for a in row["adapters"]]
    )
    (again,) = drawing.samples(model, [row["prompt"]], [row["seed"]], Sampler.model_validate_json(row["sampler"]), 1)
    assert np.abs(pixels(row["image"]).astype(int) - np.asarray(again.image)).max() <= 1  # the batch was another
    assert row["adapters"][0]["sha256"] == lora.digest(row["adapters"][0]["folder"])
    assert len(row["model_digest"]) == 64


def test_other_readers_see_the_rows_alone(drawn: Path) -> None:
    import pandas as pd
    import ray.data

    assert len(pd.read_parquet(drawn)) == 48
    assert ray.data.read_parquet(str(drawn)).count() == 48


def test_a_second_call_makes_only_what_is_missing(drawn: Path, draw: Draw, tmp_path: Path) -> None:
    folder = tmp_path / "x.parquet"
    draw(folder, 2)
    before = times(folder)
    lost = sorted(before)[1], sorted(before)[4]
    for name in lost:
        (folder / name).unlink()
    dead = drafts.name("rows-000000000004-000000000008.parquet").replace(f"_{os.getpid()}_", f"_{2**22 + 1}_")
    draft = folder / dead  # of a writer that was killed
    draft.write_bytes(b"half")
    summary = draw(folder, 2)
    assert (summary.files, summary.made) == (6, 2)
    after = times(folder)
    assert [name for name in before if after[name] != before[name]] == list(lost)
    assert pq.read_table(folder).equals(pq.read_table(drawn))
    assert not draft.exists()
    assert draw(folder, 3).made == 0  # another pool is no other dataset
    assert times(folder) == after


def test_other_settings_are_refused(drawn: Path, draw: Draw, tmp_path: Path) -> None:
    before = times(drawn)
    with pytest.raises(ConfigError, match=r"made from other settings: sampler\.steps = 2 there, 3 now\. Give another folder"):
        draw(drawn, sampler=Sampler(steps=3, guidance=2.0))
    for changes in (
        {"prompts": [*PROMPTS, "more"]},
        {"seeds": (7,)},
        {"adapters": []},
        {"rows_per_file": 4},
        {"batch_size": 3},
    ):
        with pytest.raises(ConfigError, match="made from other settings"):
            draw(drawn, **changes)
    assert times(drawn) == before
    (tmp_path / "mine.parquet").mkdir()
    (tmp_path / "mine.parquet" / "part-0.parquet").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"holds 'part-0\.parquet' and no _raydiff/dataset\.json"):
        draw(tmp_path / "mine.parquet")
    assert [p.name for p in (tmp_path / "mine.parquet").iterdir()] == ["part-0.parquet"]
    with pytest.raises(ConfigError, match="is a file; a dataset is a folder"):
        draw(tmp_path / "mine.parquet" / "part-0.parquet")


def test_prompts_of_a_file_and_empty_ones(cluster: str, draw: Draw, tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a", "", "b", None, "c"], "n": range(5)}), tmp_path / "prompts.parquet")
    call = {"prompts": (), "prompts_file": str(tmp_path / "prompts.parquet"), "rows_per_file": 4, "seeds": (1, 2)}
    with pytest.raises(BatchError, match="--max-bad-rows 1: already 2 rows cannot be used"):
        draw(tmp_path / "x.parquet", **call, max_bad_rows=1)
    assert len(bad_rows(tmp_path / "x.parquet")) == 2
    summary = draw(tmp_path / "x.parquet", **call, max_bad_rows=2)
    assert (summary.rows, summary.bad) == (5, 2)
    assert pq.read_table(tmp_path / "x.parquet")["prompt"].to_pylist() == ["a", "a", "b", "b", "c", "c"]
    assert [(row["row"], row["reason"]) for row in bad_rows(tmp_path / "x.parquet")] == [(1, "empty prompt"), (3, "no prompt")]


def test_a_folder_of_pngs(drawn: Path, draw: Draw, tmp_path: Path) -> None:
    draw(tmp_path / "pictures", 2)
    index = json.loads((tmp_path / "pictures" / "images.json").read_text())
    rows = pq.read_table(drawn).to_pylist()
    assert [(i["prompt"], i["seed"]) for i in index["images"]] == [(r["prompt"], r["seed"]) for r in rows]
    assert sorted(p.name for p in (tmp_path / "pictures").glob("*.png")) == [i["file"] for i in index["images"]]
    for entry, row in zip(index["images"], rows, strict=True):
        data = (tmp_path / "pictures" / entry["file"]).read_bytes()
        assert (pixels(data) == pixels(row["image"])).all()
        assert Image.open(io.BytesIO(data)).text["prompt"] == row["prompt"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "pictures").glob("*.png")}
    assert draw(tmp_path / "pictures", 2).made == 0
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "pictures").glob("*.png")} == before


def test_what_is_missing_is_refused_before_anything_starts(cluster: str, draw: Draw, drawn: Path, tmp_path: Path) -> None:
    to, start = tmp_path / "x.parquet", time.monotonic()
    with pytest.raises(ConfigError, match=r"--label = {'raydiff-pool': 'nowhere'}: no node of the cluster carries them"):
        draw(to, pool=Pool(num_gpus=0, labels={"raydiff-pool": "nowhere"}))
    with pytest.raises(ConfigError, match=r"5 × \(1 CPUs\) = 5 CPUs; the cluster has 4 CPUs.*set --replicas to 4"):
        draw(to, pool=Pool(num_gpus=0, replicas=5))
    with pytest.raises(FileNotFoundError, match="there is no pytorch_lora_weights"):
        draw(to, adapters=[Adapter(str(tmp_path))])
    with pytest.raises(FileNotFoundError, match="--prompts-file = '/nowhere.txt'"):
        draw(to, prompts_file="/nowhere.txt")
    with pytest.raises(FileNotFoundError, match="DATASET = '/nowhere': there is no Parquet file"):
        score("/nowhere", str(to), rewards(BLUE))
    with pytest.raises(ConfigError, match="is the dataset itself"):
        score(str(drawn), str(drawn), rewards(BLUE))
    with pytest.raises(ValueError, match=r"rows-0.*: there is no column 'picture'; there are image, prompt"):
        score(str(drawn), str(to), rewards(BLUE), columns=Columns("picture"))
    assert time.monotonic() - start < 10
    assert not list(to.glob("rows-*")) and not (to / ABOUT).exists()  # and so other settings may follow


def test_scores_are_those_of_the_reward_called_directly(drawn: Path, tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    held_out = {"evaluate.rewards": {"size": {"kind": "jpeg_size"}}, "rewards.mirror": {"kind": "symmetry", "weight": 0.25}}
    run = tiny_run(changes=held_out)
    for replicas in (1, 3):
        pool = Pool(replicas=replicas, num_gpus=0)
        summary = score(str(drawn), str(tmp_path / f"{replicas}.parquet"), run, pool=pool, batch_size=3, rows_per_file=16)
        assert (summary.rows, summary.bad, summary.files) == (48, 0, 6)  # never of two input files
    scored, given = pq.read_table(tmp_path / "1.parquet"), pq.read_table(drawn)
    assert scored.equals(pq.read_table(tmp_path / "3.parquet"))
    assert scored.select(given.schema.names).equals(given)
    assert images.rewards_in(scored.schema) == ["blue", "mirror", "size", "total"]
    pictures = torch.stack([torch.from_numpy(pixels(data).copy()) for data in given["image"].to_pylist()])
    for name, reward in {**run.rewards.named, **run.evaluate.rewards}.items():
        direct = reward.build()(pictures.permute(0, 3, 1, 2).float() / 255, given["prompt"].to_pylist())
        assert scored[f"reward_{name}"].to_pylist() == direct.tolist()
    total = np.array(scored["reward_blue"]) + np.float32(0.25) * np.array(scored["reward_mirror"])
    np.testing.assert_allclose(np.array(scored["reward_total"]), total, rtol=1e-6)


def test_other_peoples_datasets_with_rows_that_cannot_be_used(cluster: str, tmp_path: Path) -> None:
    source, to = tmp_path / "source", tmp_path / "to.parquet"
    source.mkdir()
    pictures = [png(0), b"broken", png(2, 12), png(3), None, png(5), png(6), png(7)]
    texts = ["a", "b", "c", " ", "e", "odd", "g", "h"]
    struct = [None if p is None else {"bytes": p, "path": "x"} for p in pictures]
    table = pa.table({"id": range(8), "picture": struct, "caption": texts, "reward_old": [0.5] * 8, "reward_blue": ["x"] * 8})
    pq.write_table(table.slice(0, 6), source / "a.parquet", row_group_size=6)  # a row group of several files
    pq.write_table(table.slice(6), source / "b.parquet", row_group_size=1)  # a file of several row groups
    reward = rewards(BLUE, ["rewards.blue.nan_for=odd"])
    call: dict[str, Any] = {"columns": Columns("picture", "caption"), "rows_per_file": 4, "pool": HERE}
    with pytest.raises(BatchError, match="--max-bad-rows 2"):
        score(str(source), str(to), reward, **call, max_bad_rows=2)
    summary = score(str(source), str(to), reward, **call)
    assert (summary.rows, summary.bad, summary.files) == (8, 4, 3)
    scored = pq.read_table(to)
    assert scored["id"].to_pylist() == [0, 2, 6, 7]
    assert scored.schema.names == table.schema.names
    assert scored["reward_old"].to_pylist() == [0.5] * 4
    direct = [
        reward["blue"].build()(torch.from_numpy(pixels(pictures[i]).copy()).permute(2, 0, 1)[None].float() / 255, [texts[i]])
        for i in (0, 2, 6, 7)
    ]
    assert scored["reward_blue"].to_pylist() == [float(d) for d in direct]
    assert [(Path(row["file"]).name, row["row"], row["reason"]) for row in bad_rows(to)] == [
        ("a.parquet", 1, f"undecodable image: {NO_IMAGE}"),
        ("a.parquet", 3, "empty prompt"),
        ("a.parquet", 4, "no image"),
        ("a.parquet", 5, "reward blue is nan"),
    ]
    (source / "b.parquet").write_bytes((source / "a.parquet").read_bytes())
    with pytest.raises(ConfigError, match="files by name, size and time"):
        score(str(source), str(to), reward, **call)


@pytest.mark.parametrize("fault", ["die_once", "raise_once"])
def test_a_lost_actor_loses_and_doubles_no_row(drawn: Path, tmp_path: Path, fault: str) -> None:
    marker, plain = tmp_path / "marker", rewards(BLUE)
    faulty = rewards(BLUE, [f"rewards.blue.{fault}={marker}", "rewards.blue.die_at=0"])
    pool = Pool(replicas=2, num_gpus=0)
    summary = score(str(drawn), str(tmp_path / "faulty.parquet"), faulty, pool=pool, rows_per_file=4)
    assert marker.exists()
    assert (summary.rows, summary.bad, summary.files, summary.made) == (48, 0, 12, 12)
    score(str(drawn), str(tmp_path / "plain.parquet"), plain, pool=pool, rows_per_file=4)
    assert pq.read_table(tmp_path / "faulty.parquet").equals(pq.read_table(tmp_path / "plain.parquet"))
    assert not list((tmp_path / "faulty.parquet").rglob("*.draft"))


def test_rows_that_always_fail_stop_the_run_and_the_rest_stays(drawn: Path, tmp_path: Path) -> None:
    import ray

    to = tmp_path / "x.parquet"
    failing = rewards(BLUE, [f"rewards.blue.raise_for={PROMPTS[-1]}"])
    with pytest.raises(BatchError, match="--max-bad-rows 1: already 2 rows cannot be used"):
        score(str(drawn), str(to), failing, pool=HERE, rows_per_file=8, max_bad_rows=1)
    assert [row["reason"] for row in bad_rows(to)] == ["reward 'blue' failed: RuntimeError: the judge is asleep"] * 2
    assert len(times(to)) >= 5
    assert json.loads((to / ABOUT).read_text())["rows"] == 48
    end = time.monotonic() + 20
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < end:  # no actor is left
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 4


def test_a_worker_that_cannot_be_built_says_why(cluster: str, draw: Draw, tmp_path: Path) -> None:
    from tests.tiny import make_pipeline

    wider = make_adapter(make_pipeline(tmp_path / "wider", width=20), tmp_path / "adapter")
    with pytest.raises(BatchError, match=r"generate: ValueError: adapter .* is for another base model"):
        draw(tmp_path / "x.parquet", adapters=[Adapter(str(wider))])


def test_rows_that_kill_every_actor_stop_the_run(drawn: Path, tmp_path: Path) -> None:
    deadly = rewards(BLUE, [f"rewards.blue.die_for={PROMPTS[-1]}"])
    with pytest.raises(BatchError, match=r"score: Actor.*Error: (.|\n)*What is finished stays"):
        score(str(drawn), str(tmp_path / "x.parquet"), deadly, pool=HERE, rows_per_file=8)
    assert len(times(tmp_path / "x.parquet")) == 5
