"""The one Parquet schema of labelled pairs, how it is read with plain faults, and how a dataset of it is written.

    image_0, image_1        binary     an image file each, in any format that Pillow reads; or a string: the file's path, from
                                       the Parquet file's folder if it is relative
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

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def files(path: str | Path, name: str = "pairs.path") -> list[Path]:
    """The Parquet files of a dataset. Raises FileNotFoundError, naming the field, when there is none."""
    if "://" in str(path):
        raise PairsError(f"{name} = {str(path)!r}: pairs are read from a disk; give a folder that every node sees")
    found = Path(path)
    if found.is_file():
        return [found]
    below = [f for f in sorted(found.rglob("*.parquet")) if f.is_file()]
    below = [f for f in below if not any(part.startswith(("_", ".")) for part in f.relative_to(found).parts)]
    if not below:
        raise FileNotFoundError(
            f"{name} = {str(path)!r}: there is no Parquet file; `raydiff pairs --help` tells how to make one"
        )
    return below


def overview(path: str | Path, name: str = "pairs.path") -> Overview:
    """Look at a dataset without its pictures.

    Raises FileNotFoundError, or PairsError for a file that is no Parquet, a missing column, no row, or nothing but ties.
    """
    import pyarrow.compute as pc

    found, rows, decided, ties = [], 0, 0, 0
    for file in files(path, name):
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, buffer_size=_BUFFER)
    except pa.ArrowInvalid as error:
        raise PairsError(f"{file}: is no Parquet file: {error}") from None


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


def read(file: Path, start: int = 0, stop: int | None = None) -> Iterator[Pair | BadRow]:
    """The rows of a range of a file, in order, decoded; ties are left out before their pictures are looked at."""
    names = opened(file).schema_arrow.names
    prompts = PROMPTS if set(PROMPTS) <= set(names) else (PROMPT,)
    for row, batch in batches(file, (*IMAGES, *prompts, LABEL), start, stop):
        sides = [encoded(batch.column(name)) for name in IMAGES]
        texts = [batch.column(name).to_pylist() for name in prompts]
        for i, label in enumerate(batch.column(LABEL).to_pylist()):
            if label != TIE:
                yield _pair(file, row + i, [side[i] for side in sides], [text[i] for text in texts], label)


def encoded(column: Any) -> list[bytes | str | None]:
    """An image column's cells: bytes, those of Hugging Face's struct {bytes, path}, or paths."""
    import pyarrow.compute as pc
    import pyarrow.types as types

    return (pc.struct_field(column, "bytes") if types.is_struct(column.type) else column).to_pylist()


def decode(image: bytes | str | None, folder: Path) -> tuple[Any, str]:
    """(RGB PIL image, ""), or (None, why there is none). A path is taken from `folder`."""
    from PIL import Image

    if not image:
        return None, "no image"
    try:
        with Image.open(folder / image if isinstance(image, str) else io.BytesIO(image)) as picture:
            return picture.convert("RGB"), ""
    except FileNotFoundError:
        return None, f"there is no image file {image!r}"
    except Exception as error:  # each of Pillow's readers raises its own on broken bytes
        text = "its bytes are no image file" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        return None, f"undecodable image: {text}"


def bad_header(image: bytes | None) -> str:
    """Why bytes are no image file, by their header alone; "" when they seem to be one."""
    from PIL import Image

    if not image:
        return "no image"
    try:
        with Image.open(io.BytesIO(image)):
            return ""
    except Exception:
        return "undecodable image: its bytes are no image file"


def bad_prompt(prompt: str | None) -> str:
    """Why a prompt cannot be used; "" when it can."""
    return "no prompt" if prompt is None else "" if prompt.strip() else "empty prompt"


def _pair(file: Path, row: int, images: Sequence[Any], prompts: Sequence[str | None], label: float | None) -> Pair | BadRow:
    def bad(reason: str) -> BadRow:
        return BadRow(str(file), row, reason)

    if label not in (FIRST, SECOND):
        return bad(f"column {LABEL!r}: " + ("no label" if label is None else f"{label} is none of 1, 0.5 and 0"))
    if reason := bad_prompt(prompts[0]) or bad_prompt(prompts[-1]):
        return bad(f"column {PROMPT!r}: {reason}")
    if prompts[0] != prompts[-1]:
        return bad(f"columns {PROMPTS[0]!r} and {PROMPTS[1]!r} differ: {prompts[0]!r} and {prompts[1]!r} are no pair")
    decoded = [decode(image, file.parent) for image in images]
    for name, (_, reason) in zip(IMAGES, decoded, strict=True):
        if reason:
            return bad(f"column {name!r}: {reason}")
    return Pair(str(file), row, (decoded[0][0], decoded[1][0]), str(prompts[0]), float(label or 0))


def _check(there: Any, file: Path) -> None:
    """Raise PairsError, naming the file, the column and what is there, when a file cannot be read as pairs."""
    import pyarrow.types as types

    def image(kind: Any) -> bool:
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        return types.is_binary(kind) or types.is_large_binary(kind) or text(kind)

    def text(kind: Any) -> bool:
        return types.is_string(kind) or types.is_large_string(kind)

    prompts = PROMPTS if set(PROMPTS) <= set(there.names) else (PROMPT,)
    wanted = [(name, image, "the bytes of an image file, or its path") for name in IMAGES]
    wanted += [(name, text, "text") for name in prompts]
    wanted += [(LABEL, types.is_floating, "a number: 1 the first wins, 0 the second, 0.5 a tie")]
    for name, fits, what in wanted:
        if there.names.count(name) != 1:
            raise PairsError(
                f"{file}: there is no column {name!r}; there are {', '.join(there.names)}."
                " `raydiff pairs from-pickapic` converts Pick-a-Pic's own files; raydiff.data.preferences has the schema"
            )
        if not fits(kind := there.field(name).type):
            raise PairsError(f"{file}: column {name!r} is {kind}, and should be {what}")
