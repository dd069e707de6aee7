"""The Parquet schema of pictures: what is written reads back, and what cannot be used says why."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from raydiff.data import files, images, prompts
from raydiff.data.images import Columns

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


def test_what_cannot_be_used_says_why() -> None:
    assert images.decode(None) == (None, "no image")
    assert images.decode(b"") == (None, "no image")
    assert images.decode(b"not a picture") == (None, "undecodable image: its bytes are no image file")
    image, reason = images.decode(encoded()[:-30])
    assert image is None
    assert reason.startswith("undecodable image: ")
    assert [images.bad_prompt(p) for p in (None, "", " \n", "a")] == ["no prompt", "empty prompt", "empty prompt", ""]


@pytest.mark.parametrize(("mode", "kind"), [("RGB", "PNG"), ("L", "PNG"), ("RGBA", "PNG"), ("P", "GIF"), ("CMYK", "JPEG")])
def test_every_kind_of_picture_becomes_rgb(mode: str, kind: str) -> None:
    image, reason = images.decode(encoded(mode, kind))
    assert (image.mode, image.size, reason) == ("RGB", (4, 6), "")


def test_prompts_stream_from_text_and_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_SOME", 2)
    text, table, other = (str(tmp_path / name) for name in ("p.txt", "p.parquet", "other.parquet"))
    Path(text).write_text("a\n\n  ü b \nc", encoding="utf-8")
    assert list(prompts.stream(text, "x")) == [["a", "ü b"], ["c"]]
    pq.write_table(pa.table({"n": [1, 2, 3], "prompt": ["a", "", None]}), table)
    assert list(prompts.stream(table, "x")) == [["a", ""], [None]]
    pq.write_table(pa.table({"caption": ["a"]}), other)
    with pytest.raises(ValueError, match=r"--prompts-file: .*other\.parquet has no column 'prompt'; there are caption"):
        list(prompts.stream(other, "--prompts-file"))
    for missing in ("/nowhere.txt", "/nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match="--prompts-file = '/nowhere"):
            list(prompts.stream(missing, "--prompts-file"))
