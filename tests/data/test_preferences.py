"""Datasets of pairs: the schema, Pick-a-Pic's shards, pairs from rewards, and what is told of files that cannot be used."""

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from raydiff.config import Run
from raydiff.data import feedback, pickapic, preferences
from raydiff.data.feedback import Labelling
from raydiff.data.pictures import NO_IMAGE
from raydiff.data.pieces import BadRow, PairsError
from raydiff.data.preferences import Pair
from tests.data import shards
from tests.data.shards import BLUE, RED, picture


def colour(image: Any) -> str:
    red, _, blue = np.asarray(image.convert("RGB"), float).mean((0, 1))
    return "blue" if blue > red else "red"


def usable(path: Path) -> list[Pair]:
    return [row for file in preferences.files(path) for row in preferences.read(file) if isinstance(row, Pair)]


def bad(path: Path) -> list[str]:
    return [row.reason for file in preferences.files(path) for row in preferences.read(file) if isinstance(row, BadRow)]


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Each file's bytes and time."""
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.rglob("*.parquet")}


def test_the_schema_goes_to_a_file_and_back(tmp_path: Path) -> None:
    adapters = [[{"folder": "a", "weight": 0.5, "sha256": "f00"}], None]
    columns = {
        "image_0": [picture(BLUE, 0), picture(RED, 1)], "image_1": [picture(RED, 2), picture(BLUE, 3)],
        "prompt": ["a cat", "a dog"], "label": [1.0, 0.0], "annotator": ["7", "clip"], "source": ["x", None],
        "model_0": ["m", "m"], "model_1": ["n", None], "adapters_0": adapters, "adapters_1": [[], None],
        "seed_0": [2**62, 1], "seed_1": [3, None], "uid_0": ["u", None], "uid_1": ["v", None],
        "score_0": [1.5, None], "score_1": [-1.0, None], "created": [datetime(2023, 5, 1, tzinfo=UTC), None],
    }  # fmt: skip
    pq.write_table(preferences.table(columns, 2), tmp_path / "pairs.parquet")
    back = pq.read_table(tmp_path / "pairs.parquet")
    assert back.schema.equals(preferences.schema()) and back.to_pydict() == columns
    first, second = usable(tmp_path / "pairs.parquet")
    assert (first.prompt, first.label, [colour(i) for i in first.images]) == ("a cat", 1.0, ["blue", "red"])
    assert (second.prompt, second.label, second.row) == ("a dog", 0.0, 1)
    with pytest.raises(PairsError, match="column 'seed_0'"):
        preferences.table(columns | {"seed_0": ["one", "two"]}, 2)


def test_pictures_may_be_paths_and_hugging_faces_structs(tmp_path: Path) -> None:
    for side, rgb in enumerate((BLUE, RED)):
        (tmp_path / f"{side}.jpg").write_bytes(picture(rgb, side))
    paths = {"image_0": ["0.jpg", str(tmp_path / "0.jpg"), "no.jpg"], "image_1": ["1.jpg"] * 3}
    shards.pairs(tmp_path / "paths.parquet", 3, label=[1.0] * 3, prompt=["a"] * 3, x=None, **paths)
    structs = [{"bytes": picture(BLUE, 0), "path": None}]
    shards.pairs(tmp_path / "structs.parquet", 1, label=[1.0], image_0=structs, x=None)
    for name, count in (("paths", 2), ("structs", 1)):
        found = usable(tmp_path / f"{name}.parquet")
        assert [colour(pair.images[0]) for pair in found] == ["blue"] * count
    assert bad(tmp_path / "paths.parquet") == ["column 'image_0': there is no image file 'no.jpg'"]


def test_pickapic_is_converted_as_published(tmp_path: Path) -> None:
    one = shards.pickapic(tmp_path / "train-00000.parquet", 23, broken=[5])
    two = shards.pickapic(tmp_path / "train-00001.parquet", 12, first=23)
    done = pickapic.convert([one, two], tmp_path / "pairs.parquet", rows_per_file=10)
    # KINDS cycle: of 35 rows 7 are ties, 7 without a label, 7 of one picture, and of the 14 others row 5 is broken.
    assert (done.pairs, done.files, done.made, done.bad) == (13, 5, 5, 1)
    assert done.dropped == {"tie": 7, "no label": 7, "the same picture twice": 7}
    listed = [json.loads(line) for line in (tmp_path / "pairs.parquet/_raydiff/bad_rows.jsonl").read_text().splitlines()]
    assert listed == [{"file": str(one), "row": 5, "reason": f"column 'jpg_0': undecodable image: {NO_IMAGE}"}]
    rows = pq.read_table(preferences.files(tmp_path / "pairs.parquet"), schema=preferences.schema()).to_pylist()
    source = pq.read_table(two).to_pylist()[2]  # row 25 of all: KINDS[0]
    (row,) = [row for row in rows if row["uid_0"] == "uid-25-0"]
    assert (row["image_0"], row["prompt"], row["label"], row["annotator"]) == (source["jpg_0"], source["caption"], 1.0, "1")
    assert (row["model_1"], row["uid_1"]) == ("dreamlike-art/dreamlike-photoreal-2.0", "uid-25-1")
    assert row["created"] == datetime(2023, 1, 1, 0, 25, tzinfo=UTC) and row["source"] == "pickapic"
    for pair in usable(tmp_path / "pairs.parquet"):
        assert colour(pair.images[0 if pair.label == 1 else 1]) == "blue"


def test_ties_are_kept_if_asked_and_left_out_when_read(tmp_path: Path) -> None:
    shard = shards.pickapic(tmp_path / "s.parquet", 10)
    done = pickapic.convert([tmp_path / "s.parquet"], tmp_path / "kept", ties="keep")
    assert done.pairs == 6 and "tie" not in done.dropped
    there = preferences.overview(tmp_path / "kept")
    assert (there.rows, there.decided) == (6, 4) and len(usable(tmp_path / "kept")) == 4
    assert shard.is_file()


def test_a_conversion_goes_on_after_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = shards.pickapic(tmp_path / "s.parquet", 40, broken=[6, 20])
    whole = pickapic.convert([shard], tmp_path / "whole", rows_per_file=10)
    real, reads = preferences.batches, []

    def dying(file: Path, columns: Any, start: int = 0, stop: int | None = None) -> Any:
        reads.append(start)
        for n, batch in enumerate(real(file, columns, start, stop)):
            yield batch
            if start == 20 and n == 0:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(preferences, "batches", dying)
        with pytest.raises(KeyboardInterrupt):
            pickapic.convert([shard], tmp_path / "parts", rows_per_file=10)
    before = snapshot(tmp_path / "parts")
    assert sorted(before) == ["rows-000000000000-000000000010.parquet", "rows-000000000010-000000000020.parquet"]
    assert not list((tmp_path / "parts").rglob(".*"))  # nothing half-written
    done = pickapic.convert([shard], tmp_path / "parts", rows_per_file=10)
    after = snapshot(tmp_path / "parts")
    assert {name: after[name] for name in before} == before  # neither touched nor read again
    assert {name: data for name, (data, _) in after.items()} == {n: d for n, (d, _) in snapshot(tmp_path / "whole").items()}
    assert (done.pairs, done.dropped, done.bad, done.made) == (whole.pairs, whole.dropped, whole.bad, 2)
    assert pickapic.convert([shard], tmp_path / "parts", rows_per_file=10).made == 0
    with pytest.raises(PairsError, match=r"made from other settings: ties = 'drop' there, 'keep' now"):
        pickapic.convert([shard], tmp_path / "parts", rows_per_file=10, ties="keep")
    shards.pickapic(shard, 41)
    with pytest.raises(PairsError, match="made from other settings: shards"):
        pickapic.convert([shard], tmp_path / "parts", rows_per_file=10)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"caption": None}, r"there is no column 'caption', which Pick-a-Pic's shards have; there are are_different"),
        ({"has_label": [False] * 5}, "not one pair came of it .*5 dropped: no label"),
        ({"label_0": [0.5] * 5, "label_1": [0.5] * 5, "has_label": [True] * 5, "are_different": [True] * 5}, "5 dropped: tie"),
        (
            {"label_1": [1.0, 1.0, 0.5, 0.0, 0.0]},
            r"s.parquet, row 0: columns 'label_0' and 'label_1': 1.0 and 1.0 are no label",
        ),
        ({"caption": ["", "b", "c", "d", "e"]}, "row 0: column 'caption': empty prompt"),
        ({"created_at": ["yesterday"] * 5}, "created_at|yesterday"),
    ],
)
def test_a_shard_that_cannot_be_used_is_told(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    shards.pickapic(tmp_path / "s.parquet", 5, **changes)
    with pytest.raises(ValueError, match=message):
        pickapic.convert([tmp_path / "s.parquet"], tmp_path / "to", max_bad_rows=0)


def test_more_bad_rows_than_allowed_stop_it_and_allowing_them_goes_on(tmp_path: Path) -> None:
    shard = shards.pickapic(tmp_path / "s.parquet", 30, broken=[0, 1, 10, 15])
    with pytest.raises(PairsError, match=r"--max-bad-rows = 2: already 3 rows cannot be used, the first: .*s.parquet, row 0"):
        pickapic.convert([shard], tmp_path / "to", rows_per_file=15, max_bad_rows=2)
    lines = (tmp_path / "to/_raydiff/bad_rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [0, 1, 10]
    assert pickapic.convert([shard], tmp_path / "to", rows_per_file=15, max_bad_rows=4).bad == 4


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (3, {"label": None}, "p.parquet: there is no column 'label'; there are image_0, image_1, prompt"),
        (3, {"label": ["a", "b", "c"], "x": None}, "column 'label' is string, and should be a number: 1 the first wins"),
        (3, {"image_1": [1, 2, 3], "x": None}, "column 'image_1' is int64, and should be the bytes of an image file"),
        (3, {"label": [0.5] * 3}, "every row is a tie in column 'label': there is nothing to prefer"),
        (3, {"label": [0.5, 0.7, None]}, r"no row of 3 has a winner \(1 ties\)"),
        (0, {}, "has no rows"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_with_the_column(
    tmp_path: Path, rows: int, columns: dict[str, Any], message: str
) -> None:
    shards.pairs(tmp_path / "p.parquet", rows, **columns)
    with pytest.raises(PairsError, match=message):
        preferences.overview(tmp_path / "p.parquet")


def test_no_file_no_parquet_and_other_places(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"pairs.path = .*: there is no Parquet file"):
        preferences.overview(tmp_path)
    (tmp_path / "p.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(PairsError, match="p.parquet: is no Parquet file"):
        preferences.overview(tmp_path / "p.parquet")
    with pytest.raises(PairsError, match="pairs are read from a disk"):
        preferences.overview("s3://bucket/p.parquet")
    with pytest.raises(PairsError, match="holds 'p.parquet' and no dataset of pairs"):
        pickapic.convert([shards.pickapic(tmp_path / "q.parquet", 5)], tmp_path)


def test_bad_rows_name_their_column(tmp_path: Path) -> None:
    good = picture(BLUE, 0)
    rows = 7
    columns = {
        "image_0": [good, None, b"text", good[: len(good) // 2], good, good, good], "image_1": [good] * rows,
        "prompt_0": ["a", "a", "a", "a", "a", None, "a"], "prompt_1": ["a", "a", "a", "a", "b", None, "a"],
        "label": [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.3],
    }  # fmt: skip
    shards.pairs(tmp_path / "p.parquet", rows, prompt=None, **columns)
    assert len(usable(tmp_path / "p.parquet")) == 1
    reasons = bad(tmp_path / "p.parquet")
    assert reasons[:2] == ["column 'image_0': no image", f"column 'image_0': undecodable image: {NO_IMAGE}"]
    assert reasons[2].startswith("column 'image_0': undecodable image: ")
    assert reasons[3] == "columns 'prompt_0' and 'prompt_1' differ: 'a' and 'b' are no pair"
    assert reasons[4:] == ["column 'prompt': no prompt", "column 'label': 0.3 is none of 1, 0.5 and 0"]


SCORES = {  # prompt: (clip, aesthetic) of its pictures
    "a cat": [(1.0, 5.0), (3.0, 4.0), (2.0, 6.0)],
    "a dog": [(1.0, 1.0), (1.0, 1.0)],
    "an ant": [(9.0, 9.0)],
    "a bee": [(1.0, 2.0), (1.4, 3.0)],
}


def scored(path: Path, **columns: Any) -> Path:
    """Scored pictures whose rows of a prompt lie apart; the blue channel says which row a picture is."""
    turns = [(prompt, i) for i in range(3) for prompt, rows in SCORES.items() if i < len(rows)]
    table = {
        "image": [picture((0, 0, 20 * n), n, kind="PNG") for n in range(len(turns))],
        "prompt": [prompt for prompt, _ in turns],
        "seed": [i for _, i in turns],
        "model": ["embedded"] * len(turns),
        "reward_clip": pa.array([SCORES[p][i][0] for p, i in turns], pa.float32()),
        "reward_aesthetic": pa.array([SCORES[p][i][1] for p, i in turns], pa.float32()),
    }
    pq.write_table(pa.table(table | columns), path, row_group_size=3)
    return path


@pytest.mark.parametrize(
    ("rewards", "labelling", "expected", "ties"),
    [
        # (prompt, seeds of both sides in the order of rows, label), worked out from SCORES by hand
        (["clip"], Labelling(), [("a cat", (0, 1), 0.0), ("a bee", (0, 1), 0.0)], 1),
        (["clip"], Labelling(min_margin=0.5), [("a cat", (0, 1), 0.0)], 2),
        (["aesthetic"], Labelling(), [("a bee", (0, 1), 0.0), ("a cat", (1, 2), 0.0)], 1),
        (
            ["clip"],
            Labelling(which="all"),
            [("a cat", (0, 1), 0.0), ("a cat", (0, 2), 0.0), ("a bee", (0, 1), 0.0), ("a cat", (1, 2), 1.0)],
            1,
        ),
        (["clip", "aesthetic"], Labelling("all", "pareto"), [("a cat", (0, 2), 0.0), ("a bee", (0, 1), 0.0)], 3),
    ],
)
def test_pairs_from_scores_are_those_of_a_hand_computation(
    tmp_path: Path, rewards: list[str], labelling: Labelling, expected: list[Any], ties: int
) -> None:
    done = feedback.from_scores(scored(tmp_path / "s.parquet"), tmp_path / "pairs", rewards, labelling, rows_per_file=2)
    rows = pq.read_table(preferences.files(tmp_path / "pairs"), schema=preferences.schema()).to_pylist()
    found = [(r["prompt"], (r["seed_0"], r["seed_1"]), r["label"]) for r in rows]
    assert found == expected
    assert done.dropped == {"tie": ties, "the only picture of its prompt": 1}
    there = {(r["prompt"], r["seed"]): r for r in pq.read_table(tmp_path / "s.parquet").to_pylist()}
    for row in rows:
        for side in (0, 1):
            source = there[row["prompt"], row[f"seed_{side}"]]
            assert row[f"image_{side}"] == source["image"] and row[f"model_{side}"] == "embedded"
            assert row[f"score_{side}"] == source[f"reward_{rewards[0]}"]


def test_scores_that_are_no_numbers_and_broken_pictures_are_listed(tmp_path: Path) -> None:
    file = scored(tmp_path / "s.parquet")
    rows = pq.read_table(file)
    clip, images = rows["reward_clip"].to_pylist(), rows["image"].to_pylist()
    clip[0], images[3] = float("nan"), b"broken"  # the first picture of "a cat", and that of "a bee"
    scored(file, reward_clip=clip, image=images)
    done = feedback.from_scores(file, tmp_path / "pairs", ["clip"])
    reasons = [json.loads(line) for line in (tmp_path / "pairs/_raydiff/bad_rows.jsonl").read_text().splitlines()]
    assert [(r["row"], r["reason"].partition(":")[0]) for r in reasons] == [(0, "column 'reward_clip'"), (3, "column 'image'")]
    assert (done.pairs, done.bad) == (1, 2)


@pytest.mark.parametrize(
    ("rewards", "labelling", "message"),
    [
        (["hps"], Labelling(), r"no column 'reward_hps'; .*\(rewards clip, aesthetic\)"),
        ([], Labelling(), "--reward: there is none"),
        (["clip", "aesthetic"], Labelling(), "--rule total labels by one number"),
        (["clip"], Labelling(rule="pareto"), "--rule pareto compares several"),
        (["clip", "aesthetic"], Labelling(rule="pareto"), "needs a total to tell them by"),
        (["clip"], Labelling(min_margin=100.0), r"not one pair came of it .*dropped: tie"),
    ],
)
def test_scores_that_make_no_pairs_are_told(tmp_path: Path, rewards: list[str], labelling: Labelling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feedback.from_scores(scored(tmp_path / "s.parquet"), tmp_path / "pairs", rewards, labelling)


def test_ai_feedback_draws_scores_and_pairs(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    run = tiny_run("diffusion_dpo")
    done = feedback.from_rewards(run, tmp_path / "pairs", Labelling("all"), n=3, seed=7, prompts_per_file=2)
    assert (done.pairs, done.files) == (5 * 3, 3)
    rows = pq.read_table(preferences.files(tmp_path / "pairs"), schema=preferences.schema()).to_pylist()
    assert {row["prompt"] for row in rows} == set(run.prompts.train)
    reward = run.rewards.named["blue"].build()
    import torch

    from raydiff import generate

    for row, pair in zip(rows, usable(tmp_path / "pairs"), strict=True):
        pixels = torch.from_numpy(np.stack([np.array(i) for i in pair.images])).permute(0, 3, 1, 2).float() / 255
        ours = reward(pixels, [pair.prompt] * 2)
        assert ours.tolist() == pytest.approx([row["score_0"], row["score_1"]], abs=1e-6)
        assert row["label"] == float(ours[0] > ours[1]) and {row["seed_0"], row["seed_1"]} < {7, 8, 9}
    model = generate.load(run.model)
    again = next(generate.samples(model, [rows[0]["prompt"]], [rows[0]["seed_0"]], run.sampler)).image
    assert np.abs(np.asarray(again, int) - np.asarray(usable(tmp_path / "pairs")[0].images[0], int)).max() <= 1
    assert feedback.from_rewards(run, tmp_path / "pairs", Labelling("all"), n=3, seed=7, prompts_per_file=2).made == 0
    with pytest.raises(ValueError, match="one picture of a prompt makes no pair"):
        feedback.from_rewards(run, tmp_path / "other", n=1)


def test_pairs_that_were_begun_with_another_model_are_not_gone_on_with(
    tiny_run: Callable[..., Run], tiny_pipeline: Path, tmp_path: Path
) -> None:
    """The folder's name is the same, and what lies in it is not."""
    shutil.copytree(tiny_pipeline, tmp_path / "model")
    run = tiny_run("diffusion_dpo", {"model.path": str(tmp_path / "model")})
    feedback.from_rewards(run, tmp_path / "pairs", n=2)
    (weights,) = (tmp_path / "model/vae").glob("*.safetensors")
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, weights, {"format": "pt"})
    with pytest.raises(PairsError, match="made from other settings: model's files"):
        feedback.from_rewards(run, tmp_path / "pairs", n=2)


@pytest.mark.parametrize("kind", [pa.int8(), pa.int64(), pa.float32(), pa.float64()])
def test_labels_of_any_number_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    shards.pairs(tmp_path / "p.parquet", 3, label=pa.array([1, 0, 1], kind), x=None)
    assert preferences.overview(tmp_path / "p.parquet").decided == 3
    assert [pair.label for pair in usable(tmp_path / "p.parquet")] == [1, 0, 1]


def test_a_picture_by_path_in_a_file_that_should_hold_it_is_a_bad_row(tmp_path: Path) -> None:
    file = scored(tmp_path / "s.parquet", image=["x.png"] * 8)
    with pytest.raises(PairsError, match="not one pair came of it"):
        feedback.from_scores(file, tmp_path / "pairs", ["clip"])
    assert "'x.png' is a path, and here the bytes" in (tmp_path / "pairs/_raydiff/bad_rows.jsonl").read_text()
