"""The Parquet schema of pictures: what is written reads back, and what cannot be used says why."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydiff.config import rewards
from raydiff.contents import Contents
from raydiff.data import files, images, pictures
from raydiff.data.images import Columns
from raydiff.distributed.batch import Output
from raydiff.distributed.score_batch import Scorer

MADE_FROM = {
    "model": "embedded", "model_digest": None, "dtype": "float32", "sampler": "{}", "raydiff": "0",
    "adapters": [{"folder": "a", "weight": 0.5, "sha256": "ab"}],
}  # fmt: skip


def encoded(mode: str = "RGB", kind: str = "PNG", seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 4, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


def rows() -> pa.Table:
    return images.table([encoded(seed=1), encoded(seed=2)], ["a", "b"], [7, 2**62], MADE_FROM)


def test_rows_read_back_and_pandas_sees_columns(tmp_path: Path) -> None:
    scored = images.with_rewards(rows(), {"clip": np.array([0.5, -1], np.float32)})
    (tmp_path / "_hidden").mkdir()
    (tmp_path / "_hidden" / "prompts.parquet").write_bytes(images.to_bytes(pa.table({"x": [1]})))
    (tmp_path / "rows-0.parquet").write_bytes(images.to_bytes(scored))
    read = pq.read_table(tmp_path)
    assert read.equals(scored)
    assert images.rewards_in(read.schema) == ["clip"]
    assert read.schema.names[:-1] == images.schema().names
    frame = read.to_pandas()
    assert frame.reward_clip.tolist() == [0.5, -1]
    assert frame.adapters[1][0]["weight"] == 0.5
    (file,) = files.parquet_files(tmp_path, "DATASET")[1]
    assert file.base_name == "rows-0.parquet"


def test_a_reward_of_that_name_is_replaced_in_its_place() -> None:
    once = images.with_rewards(rows(), {"a": [1.0, 2.0], "image": [3.0, 4.0]})
    twice = images.with_rewards(once, {"a": [5.0, 6.0]})
    assert twice.schema.names == once.schema.names
    assert twice["reward_a"].to_pylist() == [5, 6]
    assert twice["image"].equals(rows()["image"])


def test_pictures_stay_out_of_the_footer() -> None:
    data = images.to_bytes(rows())
    group = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(0)
    about = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    assert about["image"].statistics is None
    assert about["seed"].statistics.max == 2**62


@pytest.mark.parametrize(
    ("schema", "columns", "message"),
    [
        (
            {"img": pa.binary(), "prompt": pa.string()},
            Columns(),
            "x.parquet: there is no column 'image'; there are img, prompt",
        ),
        ({"image": pa.binary(), "text": pa.string()}, Columns(), "no column 'prompt'.*--prompt-column names another"),
        ({"image": pa.string(), "prompt": pa.string()}, Columns(), "column 'image' is string, and should be the bytes"),
        ({"image": pa.binary(), "prompt": pa.int64()}, Columns(), "column 'prompt' is int64, and should be text"),
        ({"image": pa.struct([("path", pa.string())]), "prompt": pa.string()}, Columns(), "column 'image' is struct<path"),
    ],
)
def test_a_file_of_other_columns_is_refused(schema: dict, columns: Columns, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        images.check(pa.schema(schema), "x.parquet", columns)


@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])])
@pytest.mark.parametrize("prompt", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_other_peoples_columns_are_read(image: pa.DataType, prompt: pa.DataType) -> None:
    struct = pa.types.is_struct(image)
    values = [{"bytes": encoded(), "path": None} if struct else encoded(), None]
    table = pa.table({"picture": pa.array(values, image), "text": pa.array(["a", None], pa.string()).cast(prompt)})
    columns = Columns("picture", "text")
    images.check(table.schema, "x", columns)
    assert images.cells(table, columns) == [(encoded(), "a"), (None, None)]
    images.check(table.schema, "x", Columns("picture", None))
    assert [p for _, p in images.cells(table, Columns("picture", None))] == ["", ""]


def test_a_prompt_that_is_none_says_why() -> None:
    assert [images.bad_prompt(p) for p in (None, "", " \n", "a")] == ["no prompt", "empty prompt", "empty prompt", ""]
    assert images.bad_prompt("a\0c") == "a NUL byte in the prompt"


def test_a_struct_without_bytes_gives_its_path() -> None:
    """As Hugging Face's datasets keep pictures that they did not take in; what reads bytes alone says so of the row."""
    column = pa.array([{"bytes": encoded(), "path": "a.png"}, {"bytes": None, "path": "b.png"}, None])
    assert images.encoded(column) == [encoded(), "b.png", None]
    assert images.encoded(pa.array(["a.png", None])) == ["a.png", None]


class Scored:
    """What a scorer makes of pictures, in one process."""

    def __init__(self, files: list[bytes | None], monkeypatch: pytest.MonkeyPatch) -> None:
        self.together: list[tuple[int, ...]] = []
        real = Scorer._score
        monkeypatch.setattr(Scorer, "_score", lambda *a: (self.together.append(tuple(i for i, *_ in a[1])), real(*a)))
        scorer = Scorer(
            Output("unused"),
            rewards({"blue": "colour"}),
            None,
            Columns(prompt=None),
            "unused",
            4,
            256,
            Contents({}).dump(),
            "cpu",
        )
        table = pa.table({"image": pa.array(files, pa.binary())})
        data, self.bad = scorer.make(0, table, {"start": 0, "file": "x", "row": 0})
        self.rows = pq.read_table(io.BytesIO(data))


def sized(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), (30, 60, 230)).save(file, "PNG")
    return file.getvalue()


def test_a_batch_has_no_more_pixels_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few large pictures are scored together, and the rewards are those of one by one; what is too large alone is a bad row."""
    files = [sized(side) for side in (64, 64, 64, 64, 100, 64, 10, 10, 10, 10, 10)]
    alone = Scored(files, monkeypatch)
    assert alone.together == [(0, 1, 2, 3), (4,), (5,), (6, 7), (8, 9, 10)]  # of one size, of four rows
    monkeypatch.setattr(pictures, "MOST_PIXELS", 2 * 64 * 64)
    few = Scored(files, monkeypatch)
    assert few.together == [(0, 1), (2, 3), (5,), (6, 7, 8), (9, 10)]
    assert [(row.row, "100 × 100 = 10,000 pixels" in row.reason) for row in few.bad] == [(4, True)]
    expected = alone.rows["reward_blue"].to_pylist()
    assert few.rows["reward_blue"].to_pylist() == pytest.approx(expected[:4] + expected[5:], abs=1e-6)


def test_what_is_scored_is_upright_and_on_white(monkeypatch: pytest.MonkeyPatch) -> None:
    blue = Image.new("RGBA", (8, 8), (0, 0, 255, 0))
    file = io.BytesIO()
    Image.fromarray(np.dstack([np.asarray(blue)[..., :3], np.eye(8, dtype=np.uint8) * 255])).save(file, "PNG")
    shown = np.where(np.eye(8)[..., None] > 0, (0, 0, 255), (255, 255, 255)).astype(np.uint8)
    white = io.BytesIO()
    Image.fromarray(shown).save(white, "PNG")
    found = Scored([file.getvalue(), white.getvalue(), None], monkeypatch)
    first, second = found.rows["reward_blue"].to_pylist()
    assert first == second and [(row.row, row.reason) for row in found.bad] == [(2, "no image")]
