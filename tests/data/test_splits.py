"""Splits of a published dataset: told by the names of its files, and never mixed unless that is asked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff.config import Run, rewards
from raydiff.data import feedback, files, images, pickapic, preferences
from raydiff.data.images import Columns
from raydiff.data.pieces import PairsError
from raydiff.distributed.score_batch import score
from raydiff.preflight import faults
from tests.data import shards

# Layouts: those of Hugging Face's datasets, as their documentation has them, and of other tools.
LAYOUTS = {
    "data/train-00000-of-00645-b66ac786bf6fb553.parquet": "train",
    "data/test_unique-00000-of-00001.parquet": "test_unique",
    "data/validation-00003-of-00004.parquet": "validation",
    "data/split.two-00000-of-00001.parquet": "split.two",
    "default/partial-train/0007.parquet": "train",
    "default/validation_unique/0000.parquet": "validation_unique",
    "en/dev/0000.parquet": "dev",
    "train/part-00000-0f1c.snappy.parquet": "train",
    "split=test/part-0.parquet": "test",
    "training/a.parquet": "train",
    "my_val_set.parquet": "validation",
    "test.parquet": "test",
    "TEST-2.parquet": "test",
    "evaluation/x.parquet": "test",
    "rows-000000000000-000000002048.parquet": "",
    "latest.parquet": "",
    "contest/restrained.parquet": "",
    "developed/devices.parquet": "",
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_split_is_told_by_the_files_name(name: str) -> None:
    assert files.split_of(f"/home/train/test/{name}", "/home/train/test") == LAYOUTS[name]


def folder(to: Path, write: Callable[[Path, int], Any], *names: str) -> Path:
    """A data folder: a file of each name, of one row more than the one before."""
    for n, name in enumerate(names or ("test_unique-00000-of-00001", "test-00000-of-00001", "train-00000-of-00002")):
        path = to / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, n + 3)
    return to


def pairs(path: Path, rows: int) -> None:
    shards.pairs(path, rows, seed=rows)


def pictures(path: Path, rows: int) -> None:
    file = shards.picture(shards.BLUE, 0)
    pq.write_table(
        pa.table({"image": [file] * rows, "prompt": ["a"] * rows, "reward_clip": [float(n) for n in range(rows)]}), path
    )


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("default/test_unique/0000", "default/test/0000", "default/train/0000"),
        ("test_unique", "test", "train"),
        ("split=test_unique/part-0", "split=test/part-0", "split=train/part-0"),
    ],
)
def test_pairs_of_several_splits_are_refused(tmp_path: Path, tiny_run: Callable[..., Run], names: tuple[str, ...]) -> None:
    data = folder(tmp_path / "data", pairs, *names)
    rows = r"\(test 4 rows, test_unique 3 rows, train 5 rows\)"
    with pytest.raises(
        PairsError, match=rf"pairs.path = .* holds several splits of a dataset {rows}: pairs.split = NAME takes one"
    ):
        preferences.overview(data)
    assert preferences.overview(data, split="train").rows == 5
    assert preferences.overview(data, split="all").rows == 12
    with pytest.raises(PairsError, match=rf"pairs.split tran: .* has no such split; there are {rows[2:-2]}"):
        preferences.overview(data, split="tran")
    changes = {"method.source": "dataset", "pairs.path": str(data)}
    (found,) = faults(tiny_run("diffusion_dpo", changes))
    assert "holds several splits" in found
    assert faults(tiny_run("diffusion_dpo", {**changes, "pairs.split": "train"})) == []


def test_files_without_a_split_beside_some_of_one_are_a_mix_too(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", pairs, "extra", "test")
    with pytest.raises(PairsError, match=r"\(no name 3 rows, test 4 rows\)"):
        preferences.overview(data)
    (data / "test.parquet").unlink()
    assert preferences.overview(data).rows == 3
    folder(data, pairs, "train-00000-of-00002", "train-00001-of-00002")
    with pytest.raises(PairsError, match=r"\(no name 3 rows, train 7 rows\)"):
        preferences.overview(data)


def test_pickapics_own_folder_asks_for_a_split(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", lambda path, rows: shards.pickapic(path, 5 * rows, first=100 * rows))
    message = r"\(test 20 rows, test_unique 15 rows, train 25 rows\): --split NAME takes one, --split all all"
    with pytest.raises(PairsError, match=f"SHARDS = .*{message}"):
        pickapic.convert([data], tmp_path / "to")
    with pytest.raises(PairsError, match=f"SHARDS = .*{message}"):  # as the shell spells the folder out
        pickapic.convert(sorted(data.glob("*.parquet")), tmp_path / "to")
    assert not (tmp_path / "to").exists()
    assert pickapic.convert([data], tmp_path / "train", split="train").pairs == 10
    assert pickapic.convert([data / "test-00000-of-00001.parquet"], tmp_path / "test").pairs == 8
    assert pickapic.convert([data], tmp_path / "all", split="all").pairs == 24


def test_scored_pictures_of_several_splits_are_refused(tmp_path: Path) -> None:
    data = folder(tmp_path / "data", pictures)
    with pytest.raises(PairsError, match=r"SCORED = .* holds several splits"):
        feedback.from_scores(data, tmp_path / "to", ["clip"])
    assert feedback.from_scores(data, tmp_path / "to", ["clip"], split="test").pairs == 1
    reward = rewards({"size": "jpeg_size"})
    with pytest.raises(ValueError, match=r"DATASET = .* holds several splits of a dataset \(test 4 rows, .*: --split NAME"):
        score(str(data), str(tmp_path / "scored"), reward)
    _, found = files.parquet_files(data, "DATASET", "train")
    assert [Path(file.path).name for file in found] == ["train-00000-of-00002.parquet"]
    images.check(pq.read_schema(found[0].path), "x", Columns())


def test_a_download_of_links_is_read_by_its_names(tmp_path: Path) -> None:
    """As Hugging Face's cache keeps one: the names are links to nameless files."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for n, name in enumerate(("test-00000-of-00001.parquet", "train-00000-of-00001.parquet")):
        pairs(tmp_path / "blobs" / f"{n:064x}", n + 3)
        (tmp_path / "snapshot" / name).symlink_to(tmp_path / "blobs" / f"{n:064x}")
    with pytest.raises(PairsError, match=r"\(test 3 rows, train 4 rows\)"):
        preferences.overview(tmp_path / "snapshot")
    (found,) = preferences.files(tmp_path / "snapshot", split="train")
    assert found == tmp_path / "snapshot" / "train-00000-of-00001.parquet"
