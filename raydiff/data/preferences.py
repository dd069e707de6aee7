"""The one Parquet schema of labelled pairs, how it is read with plain faults, and how a dataset of it is written.

    image_0, image_1        binary     an image file each; or a string: the file's path, from the Parquet file's folder if it is
                                       relative
    prompt                  string     of both
    label                   double     1: the first wins; 0: the second; 0.5: a tie
    annotator               string     who said so: a person's id, or the rewards and the rule
    source                  string     the dataset that the pair was made from
    model_0, model_1        string     what drew it: folder, hub id or a name
    adapters_0, adapters_1  list<struct<folder: string, weight: double, sha256: string>>    on that model, as in a dataset of
                                       pictures
    seed_0, seed_1          int64      that it was drawn with
    uid_0, uid_1            string     its name in the source
    score_0, score_1        double     what the annotator gave it, where that is a reward
    created                 timestamp[us, UTC]    when the label was given

Read are image_0, image_1, prompt (or prompt_0 and prompt_1, which then must agree) and label; the others say where a pair comes
from, and may be absent or null. A dataset is one Parquet file, or a folder of them in which "_" and "." hide names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydiff import credentials
from raydiff.data.files import count, is_bytes, is_text, listed, of_split
from raydiff.data.files import opened as opened_as
from raydiff.data.images import bad_prompt, encoded
from raydiff.data.pictures import decode
from raydiff.data.pieces import BadRow, PairsError

IMAGES, PROMPT, PROMPTS, LABEL = ("image_0", "image_1"), "prompt", ("prompt_0", "prompt_1"), "label"
FIRST, SECOND, TIE = 1.0, 0.0, 0.5
ROWS = 64  # read, and written as a row group, at a time: two pictures of 512 pixels each are about 25 MB
_BUFFER = 8 << 20  # bytes of a file read at a time: a large row group is not read whole


@dataclass(frozen=True)
class Pair:
    """A usable row."""

    file: str
    row: int
    images: tuple[Any, Any]  # RGB PIL
    prompt: str
    label: float


@dataclass(frozen=True)
class Overview:
    """What is in a dataset, by its footers and labels alone."""

    files: tuple[tuple[Path, tuple[int, ...]], ...]  # each with the rows of its row groups
    rows: int
    decided: int  # rows that one side wins


def schema() -> Any:
    import pyarrow as pa

    adapter = pa.struct([("folder", pa.string()), ("weight", pa.float64()), ("sha256", pa.string())])

    def both(name: str, kind: Any) -> list[tuple[str, Any]]:
        return [(f"{name}_{side}", kind) for side in (0, 1)]

    return pa.schema(
        [
            *both("image", pa.binary()),
            (PROMPT, pa.string()),
            (LABEL, pa.float64()),
            ("annotator", pa.string()),
            ("source", pa.string()),
            *both("model", pa.string()),
            *both("adapters", pa.list_(adapter)),
            *both("seed", pa.int64()),
            *both("uid", pa.string()),
            *both("score", pa.float64()),
            ("created", pa.timestamp("us", "UTC")),
        ]
    )


def table(columns: Mapping[str, Any], rows: int) -> Any:
    """Rows of the schema; what `columns` lacks is null. Raises ValueError, naming the column, for values of another type."""
    import pyarrow as pa

    arrays = []
    for column in schema():
        values = columns.get(column.name, [None] * rows)
        try:
            arrays.append(values.cast(column.type) if isinstance(values, pa.Array) else pa.array(values, column.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise PairsError(f"column {column.name!r}: {error}") from None
    return pa.table(arrays, schema=schema())


def files(path: str | Path, name: str = "pairs.path", split: str | None = None, option: str = "--split") -> list[Path]:
    """The Parquet files of a dataset. Raises FileNotFoundError, naming the field, when there is none; PairsError, with the rows
    of each, when they are of several splits and `split`, which `option` sets, is none of them."""
    return files_of_all([path], name, split, option)


def files_of_all(paths: Sequence[str | Path], name: str, split: str | None, option: str) -> list[Path]:
    """The Parquet files of several datasets, as `files` tells them of one."""
    where = f"{name} = {', '.join(map(str, paths))!r}"
    try:
        return of_split([file for path in paths for file in _listed(path, name)], split, where, option, _rows)
    except FileNotFoundError:
        raise
    except ValueError as error:
        raise PairsError(str(error)) from None


def rows_by_split(paths: Sequence[str | Path], name: str) -> dict[str, int]:
    """Rows of each split that is named; {} when none is."""
    found = [file for path in paths for file in _listed(path, name)]
    return count(found, _rows) if any(split for _, split in found) else {}


def _listed(path: str | Path, name: str) -> list[tuple[Path, str]]:
    credentials.refuse(path, name)
    if "://" in str(path):
        raise PairsError(f"{name} = {str(path)!r}: pairs are read from a disk; give a folder that every node sees")
    root = Path(path).expanduser()
    try:  # as the path names them, links and all: pictures lie beside the name
        return [(root / Path(info.path).relative_to(root.resolve()), split) for info, split in listed(path, name)[1]]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{str(error).partition(';')[0]}; `raydiff pairs --help` tells how to make one") from None


def _rows(file: Path) -> int:
    return int(opened(file).metadata.num_rows)


def overview(path: str | Path, name: str = "pairs.path", split: str | None = None, option: str = "pairs.split") -> Overview:
    """Look at a dataset without its pictures.

    Raises FileNotFoundError, or PairsError for a file that is no Parquet, a missing column, no row, or nothing but ties.
    """
    import pyarrow.compute as pc

    found, rows, decided, ties = [], 0, 0, 0
    for file in files(path, name, split, option):
        parquet = opened(file)
        _check(parquet.schema_arrow, file)
        groups = tuple(parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups))
        labels = parquet.read([LABEL]).column(0)
        decided += pc.sum(pc.or_(pc.equal(labels, FIRST), pc.equal(labels, SECOND))).as_py() or 0
        ties += pc.sum(pc.equal(labels, TIE)).as_py() or 0
        rows += sum(groups)
        found.append((file, groups))
    if not rows:
        raise PairsError(f"{name} = {str(path)!r} has no rows")
    if not decided:
        what = "every row is a tie" if ties == rows else f"no row of {rows} has a winner ({ties} ties)"
        raise PairsError(
            f"{name} = {str(path)!r}: {what} in column {LABEL!r}: there is nothing to prefer; 1 or 0 names a winner"
        )
    return Overview(tuple(found), rows, decided)


def opened(file: Path) -> Any:
    """A pyarrow ParquetFile. Raises PairsError when it is none."""
    try:
        return opened_as(file, str(file), buffer_size=_BUFFER)
    except ValueError as error:
        raise PairsError(str(error)) from None


def batches(file: Path, columns: Sequence[str], start: int = 0, stop: int | None = None) -> Iterator[tuple[int, Any]]:
    """(first row, at most ROWS rows) of a range of a file's rows, streaming."""
    parquet, row = opened(file), 0
    stop = parquet.metadata.num_rows if stop is None else stop
    groups, before = [], 0
    for g in range(parquet.num_row_groups):
        n = parquet.metadata.row_group(g).num_rows
        if before < stop and before + n > start:
            groups.append(g)
            row = before if len(groups) == 1 else row
        before += n
    if not groups:
        return
    for batch in parquet.iter_batches(ROWS, row_groups=groups, columns=list(columns)):
        a, b = max(start - row, 0), min(stop - row, len(batch))
        if a < b:
            yield row + a, batch.slice(a, b - a)
        row += len(batch)
        if row >= stop:
            return


def read(file: Path, start: int = 0, stop: int | None = None, within: Path | None = None) -> Iterator[Pair | BadRow]:
    """The rows of a range of a file, in order, decoded; ties are left out before their pictures are looked at.

    Pictures by path must lie below `within`; None: anywhere.
    """
    names = opened(file).schema_arrow.names
    prompts = PROMPTS if set(PROMPTS) <= set(names) else (PROMPT,)
    for row, batch in batches(file, (*IMAGES, *prompts, LABEL), start, stop):
        sides = [encoded(batch.column(name)) for name in IMAGES]
        texts = [batch.column(name).to_pylist() for name in prompts]
        for i, label in enumerate(batch.column(LABEL).to_pylist()):
            if label != TIE:
                images, said = [side[i] for side in sides], [text[i] for text in texts]
                yield _pair(file, row + i, images, said, label, within)


def pictures_digest(files: Sequence[Path]) -> str:
    """SHA-256 over size and time of change of all pictures that the files name by path; what lies in a file is not told."""
    total = hashlib.sha256()
    for file in files:
        for name in [column for image in IMAGES if (column := _path_column(opened(file).schema_arrow, image))]:
            for _, batch in batches(file, [name]):
                for cell in batch.column(0).to_pylist():
                    path = cell["path"] if isinstance(cell, dict) else cell
                    total.update(json.dumps([path, _state(file.parent, path)]).encode())
    return total.hexdigest()


def _path_column(there: Any, name: str) -> str | None:
    """The column of an image column's paths, None when it has none."""
    kind = there.field(name).type
    if is_text(kind):
        return name
    return f"{name}.path" if is_bytes(kind) and hasattr(kind, "get_field_index") and kind.get_field_index("path") >= 0 else None


def _state(folder: Path, path: str | None) -> list[int] | None:
    """Size and time of change of a picture, None when it is not there."""
    try:
        found = (folder / path).stat() if path else None
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_mtime_ns] if found else None


def _pair(
    file: Path, row: int, images: Sequence[Any], prompts: Sequence[str | None], label: float | None, within: Path | None
) -> Pair | BadRow:
    def bad(reason: str) -> BadRow:
        return BadRow(str(file), row, reason)

    if label not in (FIRST, SECOND):
        return bad(f"column {LABEL!r}: " + ("no label" if label is None else f"{label} is none of 1, 0.5 and 0"))
    if reason := bad_prompt(prompts[0]) or bad_prompt(prompts[-1]):
        return bad(f"column {PROMPT!r}: {reason}")
    if prompts[0] != prompts[-1]:
        return bad(f"columns {PROMPTS[0]!r} and {PROMPTS[1]!r} differ: {prompts[0]!r} and {prompts[1]!r} are no pair")
    decoded = [decode(image, file.parent, within) for image in images]
    for name, (_, reason) in zip(IMAGES, decoded, strict=True):
        if reason:
            return bad(f"column {name!r}: {reason}")
    return Pair(str(file), row, (decoded[0][0], decoded[1][0]), str(prompts[0]), float(label or 0))


def _check(there: Any, file: Path) -> None:
    """Raise PairsError, naming the file, the column and what is there, when a file cannot be read as pairs."""
    import pyarrow.types as types

    def image(kind: Any) -> bool:
        return is_bytes(kind) or is_text(kind)

    def number(kind: Any) -> bool:
        return types.is_floating(kind) or types.is_integer(kind)

    prompts = PROMPTS if set(PROMPTS) <= set(there.names) else (PROMPT,)
    wanted = [(name, image, "the bytes of an image file, or its path") for name in IMAGES]
    wanted += [(name, is_text, "text") for name in prompts]
    wanted += [(LABEL, number, "a number: 1 the first wins, 0 the second, 0.5 a tie")]
    for name, fits, what in wanted:
        if there.names.count(name) != 1:
            raise PairsError(
                f"{file}: there is no column {name!r}; there are {', '.join(there.names)}."
                " `raydiff pairs from-pickapic` converts Pick-a-Pic's own files; raydiff.data.preferences has the schema"
            )
        if not fits(kind := there.field(name).type):
            raise PairsError(f"{file}: column {name!r} is {kind}, and should be {what}")
