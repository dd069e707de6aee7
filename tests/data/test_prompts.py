"""Prompts files: one reader for every command, what it makes of other tools' files, and what the model sees as one prompt."""

import gzip
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydiff import assets
from raydiff.config import Prompts, Run, override
from raydiff.data import prompts
from raydiff.data.prompts import read, read_both
from raydiff.preflight import faults


def streamed(path: Path | str) -> list[str | None]:
    return list(chain.from_iterable(prompts.stream(str(path), "--prompts-file")))


def test_prompts_stream_from_text_and_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_SOME", 2)
    text, table, other = (str(tmp_path / name) for name in ("p.txt", "p.parquet", "other.parquet"))
    Path(text).write_text("a\n\n  ü b \nc", encoding="utf-8")
    assert list(prompts.stream(text, "x")) == [["a", "ü b"], ["c"]]
    pq.write_table(pa.table({"n": [1, 2, 3], "prompt": ["a", "", None]}), table)
    assert list(prompts.stream(table, "x")) == [["a", ""], [None]]
    pq.write_table(pa.table({"caption": ["a"]}), other)
    with pytest.raises(ValueError, match=r"--prompts-file: .*other\.parquet has no column 'prompt'; there are caption"):
        prompts.stream(other, "--prompts-file")
    for missing in ("/nowhere.txt", "/nowhere.parquet"):
        with pytest.raises(FileNotFoundError, match="--prompts-file = '/nowhere"):
            prompts.stream(missing, "--prompts-file")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("\ufeffa cat\na dog\n".encode(), ["a cat", "a dog"]),
        ("\ufeffa cat\n\ufeffa dog\n".encode(), ["a cat", "a dog"]),  # two files, one after the other
        (b"a cat\r\na dog\r\n", ["a cat", "a dog"]),
        (b"a cat\ra dog", ["a cat", "a dog"]),
        ("a cat\u2028asleep\na\x85dog".encode(), ["a cat\u2028asleep", "a\x85dog"]),
        (b"a cat\x0casleep\na\x1cdog\x0b!\n", ["a cat\x0casleep", "a\x1cdog\x0b!"]),
        ("\u3000一匹の猫\u3000\n\xa0\n\ufeff\n".encode(), ["一匹の猫"]),
        ("a cat 🐈\u200d⬛".encode(), ["a cat 🐈\u200d⬛"]),
    ],
    ids=["BOM", "two BOMs", "CRLF", "CR", "U+2028 and NEL", "form feed", "wide spaces", "joined emoji"],
)
def test_every_reader_finds_the_same_prompts(tmp_path: Path, data: bytes, expected: list[str]) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    assert streamed(tmp_path / "p.txt") == expected
    assert read(str(tmp_path / "p.txt"), "prompts.train") == tuple(expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a cat\na dög".encode("utf-16"), "line 1: byte 0xff is not UTF-8, as in UTF-16 or Latin-1; save it as UTF-8"),
        ("a cat\na dog".encode("utf-16-be"), "line 1: there is a NUL byte, as in UTF-16"),
        (b"\xfe\xff" + "a cat".encode("utf-16-be"), "line 1: byte 0xfe is not UTF-8"),
        ("a cat\na dog".encode("utf-32"), "line 1: byte 0xff is not UTF-8"),
        ("a cat\nun cafe\u0301\nun café".encode("utf-8").replace(b"\xc3\xa9", b"\xe9"), "line 3: byte 0xe9 is not UTF-8"),
        (("a cat\n" * 5000 + "naïve").encode("cp1252"), "line 5001: byte 0xef is not UTF-8"),
        ("猫\n".encode("shift_jis"), "line 1: byte 0x94 is not UTF-8"),
        (b"a cat\n\xed\xa0\xbd\n", "line 2: byte 0xed is not UTF-8"),  # half of a surrogate pair
        (b"a cat\na\0dog\n", "line 2: there is a NUL byte"),
        (gzip.compress(b"a cat\n"), "is not UTF-8"),
    ],
    ids=[
        "UTF-16",
        "UTF-16 without mark",
        "UTF-16 BE",
        "UTF-32",
        "Latin-1",
        "late cp1252",
        "Shift JIS",
        "surrogate",
        "NUL",
        "gzip",
    ],
)
def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "p.txt").write_bytes(data)
    for reader in (lambda p: prompts.stream(p, "x"), lambda p: read(p, "x")):
        with pytest.raises(ValueError, match=f"^x: .*p.txt, {message}|^x: .*{message}"):
            reader(str(tmp_path / "p.txt"))


@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.json", "p.jsonl", "p.txt.gz", "p", "p.md", "p.arrow"])
def test_files_of_other_tools_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"prompt": "a cat"}\n')
    for reader in (lambda p: prompts.stream(p, "x"), lambda p: read(p, "x")):
        with pytest.raises(
            ValueError, match=r"x = .*: only .txt, one prompt a line, and .parquet with a column 'prompt' are read"
        ):
            reader(str(tmp_path / name))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([None, None]), "column 'prompt' is null, and should be text"),
        (pa.array([1, 2]), "column 'prompt' is int64, and should be text"),
        (pa.array([["a"], ["b"]]), r"column 'prompt' is list<.*string>, and should be text"),
        (pa.array([{"text": "a"}, {"text": "b"}]), r"column 'prompt' is struct<text: string>, and should be text"),
        (pa.array([b"a", b"b"]), "column 'prompt' is binary, and should be text"),
    ],
)
def test_a_column_of_no_text_is_refused_before_anything_starts(
    tmp_path: Path, tiny_run: Callable[..., Run], column: pa.Array, message: str
) -> None:
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=message):
        prompts.stream(str(tmp_path / "p.parquet"), "--prompts-file")
    (found,) = faults(tiny_run(changes={"prompts.train": str(tmp_path / "p.parquet")}))
    assert found.startswith("prompts.train: ") and "column 'prompt' is" in found


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_every_type_of_text_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    column = (
        pa.array(["a cat", "a dog"]).cast(kind) if not pa.types.is_string_view(kind) else pa.array(["a cat", "a dog"], kind)
    )
    pq.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    assert read(str(tmp_path / "p.parquet"), "x") == ("a cat", "a dog") == tuple(streamed(tmp_path / "p.parquet"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [(["a", None], "row 1: no prompt"), ([" ", "a"], "row 0: empty prompt"), (["a", "b", "c\0d"], "row 2: a NUL byte in")],
)
def test_rows_without_a_prompt_are_told_with_their_place(tmp_path: Path, rows: list[Any], message: str) -> None:
    pq.write_table(pa.table({"prompt": rows}), tmp_path / "p.parquet")
    with pytest.raises(ValueError, match=rf"prompts.train: .*p.parquet, {message}"):
        read(str(tmp_path / "p.parquet"), "prompts.train")
    assert streamed(tmp_path / "p.parquet") == rows  # `generate` lists them as bad rows
    if None not in rows:
        with pytest.raises(ValueError, match=f"prompts.train: {message}"):
            read(tuple(rows), "prompts.train")


def test_parquet_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    two = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pq.write_table(two, tmp_path / "two.parquet")
    (tmp_path / "text.parquet").write_text("a cat\n" * 9)
    bad = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 2], np.int32)), pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"prompt": bad}), tmp_path / "bytes.parquet")
    for name, message in (("two", "several columns 'prompt'"), ("text", "is no Parquet file"), ("bytes", "are not UTF-8")):
        with pytest.raises(ValueError, match=rf"^x: .*{name}\.parquet.*{message}"):
            read(str(tmp_path / f"{name}.parquet"), "x")


def test_a_folder_of_prompts_is_read_by_every_reader(tmp_path: Path) -> None:
    (tmp_path / "drawn.parquet" / "_raydiff").mkdir(parents=True)
    for n, name in enumerate(("rows-0.parquet", "rows-1.parquet", "_raydiff/prompts.parquet")):
        pq.write_table(pa.table({"prompt": [f"a cat {n}"]}), tmp_path / "drawn.parquet" / name)
    assert read(str(tmp_path / "drawn.parquet"), "x") == ("a cat 0", "a cat 1") == tuple(streamed(tmp_path / "drawn.parquet"))
    for name in ("train-00000-of-00001.parquet", "test-00000-of-00001.parquet"):
        pq.write_table(pa.table({"prompt": [name]}), tmp_path / name)
    (tmp_path / "drawn.parquet").rename(tmp_path / "_drawn")
    with pytest.raises(
        ValueError, match=r"prompts.train = .* \(test 1 rows, train 1 rows\): give one split's files in a folder"
    ):
        read(str(tmp_path), "prompts.train")
    with pytest.raises(ValueError, match=r"--prompts-file = .*: --split NAME takes one"):
        prompts.stream(str(tmp_path), "--prompts-file", None, "--split")
    assert list(prompts.stream(str(tmp_path), "--prompts-file", "test", "--split")) == [["test-00000-of-00001.parquet"]]


SAME = [  # two spellings, and whether CLIP's tokenizer sees one
    ("a cat", "A CAT", True),
    ("a cat", "  a \t cat ", True),
    ("a cat", "a\xa0cat", True),
    ("a café", "a cafe\u0301", True),
    ("ein Fluß", "ein Fluss", False),
    ("a cat", "a cats", False),
]


@pytest.mark.parametrize(("one", "other", "same"), [*SAME, ("a cat, a dog", "a cat , a dog", True),
                                                    ("red " * 30 + "cat", "red " * 30 + "dog", True)])  # fmt: skip
def test_held_out_prompts_are_compared_as_the_tokenizer_sees_them(
    tiny_run: Callable[..., Run], one: str, other: str, same: bool
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.path("pipeline") / "tokenizer")
    assert (tokenizer(one, truncation=True).input_ids == tokenizer(other, truncation=True).input_ids) == same
    changes = {"prompts.train": ["a fox", one], "prompts.held_out": [other, "a newt"], "model": {"kind": "stable_diffusion"}}
    found = faults(override(tiny_run(), changes))
    assert bool(found) == same
    if same:
        assert found[0].startswith(f"prompts.held_out: {other!r} is in prompts.train too, as {one!r}: the model sees the same")


@pytest.mark.parametrize(("one", "other", "same"), SAME)
def test_without_a_tokenizer_they_are_compared_by_its_first_step(one: str, other: str, same: bool) -> None:
    config = Prompts(train=(one, "a fox"), held_out=("a newt", other))
    if not same:
        assert read_both(config) == (config.train, config.held_out)
        return
    with pytest.raises(ValueError, match="is in prompts.train too, as"):
        read_both(config)


def test_equal_prompts_are_told_once(tiny_run: Callable[..., Run]) -> None:
    with pytest.raises(ValueError, match=r"^prompts.held_out: 'a cat' is in prompts.train too \(2 such\); take it out of one$"):
        read_both(Prompts(train=("a dog", "a cat"), held_out=("a newt", "a dog", "a cat")))
    assert read_both(tiny_run().prompts) == (tiny_run().prompts.train, tiny_run().prompts.held_out)
