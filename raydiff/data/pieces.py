"""A dataset of pairs being written: whole files under their final names, so that a call can be stopped and gone on with.

    rows-000000000000-000000002048.parquet   what 2048 input rows gave; its metadata says what they did not
    _raydiff/dataset.json                    what it was made from: a second call must say the same
    _raydiff/bad_rows.jsonl                  file, row and reason of each input row that could not be used

Readers of Parquet folders leave out names with "_" in front.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raydiff import __version__, drafts
from raydiff.drafts import replacing

CONTENTS = "contents"  # of `made_from`: digests of the files behind fields
_HIDDEN, _LEFT_OUT = "_raydiff", b"raydiff.left_out"


class PairsError(ValueError):
    """A file of pairs that cannot be used: names the file, the row or the column, and the way out."""


@dataclass(frozen=True)
class BadRow:
    """An input row that cannot be used."""

    file: str
    row: int  # in that file, from 0
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.row}: {self.reason}"


@dataclass
class Part:
    """Some rows of the schema, and what their input rows did not give."""

    table: Any
    dropped: Counter[str] = field(default_factory=Counter)  # by reason, e.g. {"tie": 3}
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class Summary:
    """A finished dataset of pairs."""

    folder: str
    pairs: int
    files: int
    made: int  # files made by this call
    dropped: Mapping[str, int]
    bad: int

    def __str__(self) -> str:
        there = f", {self.files - self.made} of them from an earlier call" if self.made < self.files else ""
        left = "".join(f"; {n} dropped: {reason}" for reason, n in sorted(self.dropped.items()))
        listed = f"; {self.bad} bad rows, see {self.folder}/{_HIDDEN}/bad_rows.jsonl" if self.bad else ""
        return f"{self.folder}: {self.pairs} pairs in {self.files} files{there}{left}{listed}"


def write(
    to: str | Path,
    schema: Any,
    made_from: Mapping[str, Any],
    ranges: Sequence[tuple[int, int]],
    make: Callable[[int, int], Iterable[Part]],
    max_bad_rows: int,
) -> Summary:
    """Make what is missing of the dataset in the folder `to`: a file for each range of input rows, written in one go.

    Raises PairsError when the folder holds something else or was made from other settings, and when more rows than
    `max_bad_rows` are bad; what is finished stays, and the same call goes on from there.
    """
    import pyarrow.parquet as pq

    folder = Path(to)
    _check_own(folder, made_from)
    (folder / _HIDDEN).mkdir(parents=True, exist_ok=True)
    about = json.dumps({"raydiff": __version__, "made_from": made_from}, indent=1).encode()
    if not drafts.create(folder / _HIDDEN / "dataset.json", about):
        _check_own(folder, made_from)  # another call may have begun it since
    for place in (folder, folder / _HIDDEN):
        drafts.clear(place)
    pairs, made, dropped, bad = 0, 0, Counter[str](), list[BadRow]()
    for start, stop in ranges:
        file = folder / f"rows-{start:012d}-{stop:012d}.parquet"
        if not file.exists():
            _write_file(file, schema, make(start, stop))
            made += 1
        footer = pq.read_metadata(file)
        left = json.loads(footer.metadata[_LEFT_OUT])
        pairs += footer.num_rows
        dropped += Counter(left["dropped"])
        bad += [BadRow(**row) for row in left["bad"]]
        within(bad, max_bad_rows, folder / _HIDDEN)
    if not pairs:
        why = ", ".join(f"{n} dropped: {reason}" for reason, n in sorted(dropped.items()))
        raise PairsError(f"--to {folder}: not one pair came of it ({why or 'no rows'}; {len(bad)} bad rows)")
    return Summary(str(folder), pairs, len(ranges), made, dropped, len(bad))


def within(bad: Sequence[BadRow], most: int, folder: Path, option: str = "--max-bad-rows") -> None:
    """List the bad rows in the folder's side file, and raise PairsError when they are more than allowed."""
    if bad:
        with replacing(folder / "bad_rows.jsonl") as draft:
            draft.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad))
    if len(bad) > most:
        raise PairsError(
            f"{option} = {most}: already {len(bad)} rows cannot be used, the first: {bad[0]}.\n{folder / 'bad_rows.jsonl'}"
            " lists them all. Mend the input, or allow more: the same call then goes on from there"
        )


def split(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Ranges of at most `size` rows."""
    return [(a, min(a + size, stop)) for a in range(start, stop, size)]


def listing(paths: Sequence[Path]) -> list[list[Any]]:
    """Name, size and time of change of files: what tells whether they are those of an earlier call."""
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def sha256(file: Path) -> str:
    """Of a file's bytes, which are not held at once."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def differing(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each field in which what a dataset was made from differs from what it would be made from now.

    The digest of a file that only one of them knows, as of a hub id that is not cached here, says nothing.
    """
    old, new = _flat(there), _flat(json.loads(json.dumps(now)))
    unknown = {key for key in old.keys() ^ new.keys() if key.startswith(f"{CONTENTS}.")}
    return [
        f"{key} = {old.get(key)!r} there, {new.get(key)!r} now"
        for key in old | new
        if old.get(key) != new.get(key) and key not in unknown
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()}


def _check_own(folder: Path, made_from: Mapping[str, Any]) -> None:
    about = folder / _HIDDEN / "dataset.json"
    if about.is_file():
        if differ := differing(json.loads(about.read_text())["made_from"], made_from):
            raise PairsError(f"--to {folder}: made from other settings: {'; '.join(differ)}. Give another folder, or these")
    elif folder.is_file():
        raise PairsError(f"--to {folder}: is a file; a dataset of pairs is a folder, give another name")
    elif folder.exists() and (other := [f.name for f in folder.iterdir() if f.name != _HIDDEN]):
        raise PairsError(f"--to {folder}: holds {other[0]!r} and no dataset of pairs; give a folder of its own")


def _write_file(file: Path, schema: Any, parts: Iterable[Part]) -> None:
    import pyarrow.parquet as pq
    import pyarrow.types as types

    # A dictionary of pictures would be given up half way; statistics of them would put pictures into the footer.
    small = [column.name for column in schema if not types.is_binary(column.type)]
    packed = {column.name: "zstd" if column.name in small else "none" for column in schema}
    dropped, bad = Counter[str](), list[BadRow]()
    with (
        replacing(file) as draft,
        pq.ParquetWriter(draft, schema, use_dictionary=small, write_statistics=small, compression=packed) as writer,
    ):
        for part in parts:
            if len(part.table):
                writer.write_table(part.table)
            dropped += part.dropped
            bad += part.bad
        left = {"dropped": dropped, "bad": [asdict(row) for row in bad]}
        writer.add_key_value_metadata({_LEFT_OUT: json.dumps(left)})
