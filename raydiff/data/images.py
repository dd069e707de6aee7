"""The one Parquet schema of pictures, and how a dataset of them is read, by us or from others.

    image         binary    the picture as a PNG file: lossless, so it scores as when it was made
    prompt        string
    seed          int64     of torch.Generator().manual_seed(seed)
    model         string    folder, hub id or "embedded"; with @revision if one was named
    model_digest  string    SHA-256 over the files of a model in a folder; null for a hub id
    dtype         string    of the model's weights
    adapters      list<struct<folder: string, weight: double, sha256: string>>    their weighted sum, by weight
    sampler       string    JSON of raydiff.config.Sampler
    raydiff       string    version that made the picture
    reward_NAME   float     one column for each reward, once scored; reward_total is a run file's weighted sum

These say what it takes to make a row's picture again. A reward is a column, and not an entry of a map: `frame.reward_clip` in
pandas and `avg(reward_clip)` in DuckDB work as they stand, Parquet keeps minimum and maximum of each, and adding one leaves
the others alone. The prefix keeps a reward that is called "image" or "seed" apart.

Other people's datasets need an image column, of encoded bytes or of Hugging Face's struct {bytes, path} with bytes in it, and
one of prompts. raydiff.data.pictures decodes what is in the cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raydiff.data.files import is_bytes, is_text

IMAGE, PROMPT, REWARD = "image", "prompt", "reward_"


@dataclass(frozen=True)
class Columns:
    """Which columns of a dataset hold what."""

    image: str = IMAGE
    prompt: str | None = PROMPT
    """None: there are no prompts, and rewards get the empty one."""


def schema() -> Any:
    """The columns of a picture that was not scored yet."""
    import pyarrow as pa

    adapter = pa.struct([("folder", pa.string()), ("weight", pa.float64()), ("sha256", pa.string())])
    text = ("model", "model_digest", "dtype"), ("sampler", "raydiff")
    return pa.schema(
        [
            (IMAGE, pa.binary()),
            (PROMPT, pa.string()),
            ("seed", pa.int64()),
            *((name, pa.string()) for name in text[0]),
            ("adapters", pa.list_(adapter)),
            *((name, pa.string()) for name in text[1]),
        ]
    )


def table(images: Sequence[bytes], prompts: Sequence[str], seeds: Sequence[int], made_from: Mapping[str, Any]) -> Any:
    """Rows of the schema. `made_from` holds the columns that are the same in each: model to raydiff."""
    import pyarrow as pa

    columns = {IMAGE: images, PROMPT: prompts, "seed": seeds} | {k: [v] * len(images) for k, v in made_from.items()}
    return pa.table([pa.array(columns[field.name], field.type) for field in schema()], schema=schema())


def with_rewards(rows: Any, rewards: Mapping[str, Any]) -> Any:
    """A table with each reward's (rows,) fp32 values as its column, in place of an older one of that name."""
    import pyarrow as pa

    for name, values in rewards.items():
        column, at = pa.array(values, pa.float32()), rows.schema.get_field_index(REWARD + name)
        rows = rows.append_column(REWARD + name, column) if at < 0 else rows.set_column(at, REWARD + name, column)
    return rows


def rewards_in(columns: Any) -> list[str]:
    """Names of the rewards that a schema has columns for."""
    return [name.removeprefix(REWARD) for name in columns.names if name.startswith(REWARD)]


def to_bytes(rows: Any) -> bytes:
    """The table as a Parquet file of one row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    # A dictionary of pictures would be given up half way; statistics of them would put pictures into the footer.
    small = [f.name for f in rows.schema if not (pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type))]
    pq.write_table(
        rows, sink, row_group_size=max(1, len(rows)), use_dictionary=small, write_statistics=small, compression="zstd"
    )
    return bytes(sink.getvalue())


def check(there: Any, file: str, columns: Columns) -> None:
    """Raise ValueError, naming the file, the column and what is there, when a file's schema cannot be read as pictures."""
    wanted = [(columns.image, "--image-column", is_bytes, "the bytes of an image file")]
    if columns.prompt is not None:
        wanted.append((columns.prompt, "--prompt-column", is_text, "text"))
    for name, option, fits, what in wanted:
        if there.names.count(name) != 1:
            raise ValueError(f"{file}: there is no column {name!r}; there are {', '.join(there.names)}; {option} names another")
        if not fits(kind := there.field(name).type):
            raise ValueError(f"{file}: column {name!r} is {kind}, and should be {what}; {option} names another")


def cells(rows: Any, columns: Columns) -> list[tuple[bytes | str | None, str | None]]:
    """(image file, prompt) of each row."""
    prompts = [""] * len(rows) if columns.prompt is None else rows[columns.prompt].to_pylist()
    return list(zip(encoded(rows[columns.image]), prompts, strict=True))


def encoded(column: Any) -> list[bytes | str | None]:
    """An image column's cells: bytes, or paths; of Hugging Face's struct {bytes, path} the bytes, or else the path."""
    import pyarrow.types as types

    if not types.is_struct(column.type):
        return list(column.to_pylist())
    return [cell and (cell["bytes"] or cell.get("path")) for cell in column.to_pylist()]


def bad_prompt(prompt: str | None) -> str:
    """Why a prompt cannot be used; "" when it can."""
    if prompt is None:
        return "no prompt"
    return "a NUL byte in the prompt" if "\0" in prompt else "" if prompt.strip() else "empty prompt"
