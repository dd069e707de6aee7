"""Pick-a-Pic (Kirstain et al. 2023, arXiv 2305.01569) as pairs: its own Parquet shards, read as they are published.

Its columns, of which only the first five must be there: jpg_0, jpg_1 (image files), caption, label_0, label_1 (1 the winner, 0
the loser, 0.5 both), are_different, has_label, model_0, model_1, image_0_uid, image_1_uid, user_id, created_at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from raydiff.data import images, pictures, pieces, preferences
from raydiff.data.pieces import BadRow, PairsError, Part, Summary
from raydiff.data.preferences import FIRST, SECOND, TIE

NEEDED = ("jpg_0", "jpg_1", "caption", "label_0", "label_1")
# Column of the schema: column there.
TAKEN = {
    "image_0": "jpg_0", "image_1": "jpg_1", "prompt": "caption", "annotator": "user_id", "model_0": "model_0",
    "model_1": "model_1", "uid_0": "image_0_uid", "uid_1": "image_1_uid", "created": "created_at",
}  # fmt: skip
_FLAGS = {"has_label": "no label", "are_different": "the same picture twice"}  # why a row without the flag is dropped


def convert(
    shards: Sequence[str | Path],
    to: str | Path,
    *,
    ties: Literal["drop", "keep"] = "drop",
    rows_per_file: int = 2048,
    max_bad_rows: int = 100,
    source: str = "pickapic",
    split: str | None = None,
) -> Summary:
    """Write the pairs of Pick-a-Pic's shards, files or folders of them, to the folder `to`.

    Shards of several splits, as the published folder has them, are refused unless `split` names one, or is "all".

    Pictures are copied as the JPEGs that they are, a few rows at a time; whether one can be decoded is seen when its header is
    read here, and in full when it is encoded. Interrupted, the same call goes on after the files that are finished.
    Raises FileNotFoundError or PairsError before anything is written when a shard is not as published, and as
    `pieces.write` does.
    """
    files = preferences.files_of_all(shards, "SHARDS", split, "--split")
    starts, total = [], 0
    for file in files:
        parquet = preferences.opened(file)
        if missing := [name for name in NEEDED if name not in parquet.schema_arrow.names]:
            there = ", ".join(parquet.schema_arrow.names)
            raise PairsError(f"{file}: there is no column {missing[0]!r}, which Pick-a-Pic's shards have; there are {there}")
        starts.append((total, file))
        total += parquet.metadata.num_rows
    if not total:
        raise PairsError(f"SHARDS = {', '.join(map(str, shards))}: there are no rows")
    stops = [start for start, _ in starts[1:]] + [total]
    where = {
        piece: (file, start)
        for (start, file), stop in zip(starts, stops, strict=True)
        for piece in pieces.split(start, stop, rows_per_file)
    }

    def make(start: int, stop: int) -> Iterator[Part]:
        file, first = where[start, stop]
        return _parts(file, start - first, stop - first, ties == "keep", source)

    made_from = {"shards": pieces.listing(files), "ties": ties, "rows_per_file": rows_per_file, "source": source}
    return pieces.write(to, preferences.schema(), made_from, list(where), make, max_bad_rows)


def _parts(file: Path, start: int, stop: int, keep_ties: bool, source: str) -> Iterator[Part]:
    """A range of a shard's rows, a few at a time."""
    import pyarrow as pa

    names = preferences.opened(file).schema_arrow.names
    columns = [name for name in (*NEEDED, *TAKEN.values(), *_FLAGS) if name in names]
    for row, batch in preferences.batches(file, list(dict.fromkeys(columns)), start, stop):
        cells: dict[str, list[Any]] = {
            name: images.encoded(batch.column(name)) if name.startswith("jpg") else batch.column(name).to_pylist()
            for name in batch.schema.names
        }
        dropped, bad, kept, labels = Counter[str](), list[BadRow](), list[int](), list[float]()
        for i in range(len(batch)):
            at = {name: values[i] for name, values in cells.items()}
            label, dropping, fault = _label(at, keep_ties)
            if dropping:
                dropped[dropping] += 1
            elif fault := fault or _fault(at):
                bad.append(BadRow(str(file), row + i, fault))
            else:
                kept.append(i)
                labels.append(label)
        taken = {ours: [cells[theirs][i] for i in kept] for ours, theirs in TAKEN.items() if theirs in cells}
        for name in ("annotator", "uid_0", "uid_1"):  # user_id is a number in some releases
            taken |= {name: [None if v is None else str(v) for v in taken[name]]} if name in taken else {}
        if "created" in taken:
            taken["created"] = _utc(batch.column("created_at").take(pa.array(kept, pa.int64())))
        same = {"label": labels, "source": [source] * len(kept)}
        yield Part(preferences.table(taken | same, len(kept)), dropped, bad)


def _label(row: dict[str, Any], keep_ties: bool) -> tuple[float, str, str]:
    """(label, why the row is dropped, what is wrong with it)."""
    for flag, reason in _FLAGS.items():
        if row.get(flag) is False:
            return TIE, reason, ""
    first, second = row["label_0"], row["label_1"]
    if first is None or second is None:
        return TIE, "no label", ""
    if (first, second) not in ((FIRST, SECOND), (SECOND, FIRST), (TIE, TIE)):
        return (
            TIE,
            "",
            f"columns 'label_0' and 'label_1': {first} and {second} are no label; 1 and 0, 0 and 1, or 0.5 twice are",
        )
    return first, "tie" if first == TIE and not keep_ties else "", ""


def _fault(row: dict[str, Any]) -> str:
    """Why a labelled row cannot be used, as far as it can be told without decoding pictures; "" when it can."""
    if reason := images.bad_prompt(row["caption"]):
        return f"column 'caption': {reason}"
    for name in ("jpg_0", "jpg_1"):
        if reason := pictures.fault(row[name]):
            return f"column {name!r}: {reason}"
    return ""


def _utc(column: Any) -> Any:
    """Times, of any type that Arrow reads as one, in microseconds; those without a zone are UTC."""
    import pyarrow as pa
    import pyarrow.compute as pc

    times = column if pa.types.is_timestamp(column.type) else column.cast(pa.timestamp("us"))
    times = times if times.type.tz else pc.assume_timezone(times, "UTC")
    return times.cast(pa.timestamp("us", "UTC"), safe=False)  # the source counts nanoseconds
