"""Prompt sets: embedded, from a text or Parquet file, or from the run file itself."""

from __future__ import annotations

import io
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from raydiff import assets
from raydiff.config import Prompts, Run
from raydiff.core.denoise import mix

_SOME = 4096  # prompts read at a time


def read(source: str | tuple[str, ...], field: str) -> tuple[str, ...]:
    """Prompts of a source, one or more. `field` is its dotted path, for errors. Raises ValueError or FileNotFoundError."""
    if source == "embedded":
        prompts = tuple(assets.prompts("held_out" if field.endswith("held_out") else "train"))
    elif not isinstance(source, str):
        prompts = tuple(source)
    elif not Path(source).is_file():
        raise FileNotFoundError(f'{field} = {source!r} is not a file; give a .txt, a .parquet, a list, or "embedded"')
    elif source.endswith(".parquet"):
        import pyarrow.parquet

        prompts = tuple(pyarrow.parquet.read_table(source, columns=["prompt"])["prompt"].to_pylist())
    else:
        prompts = tuple(line.strip() for line in Path(source).read_text().splitlines() if line.strip())
    if not prompts:
        raise ValueError(f"{field} = {source!r} holds no prompt")
    return prompts


def stream(source: str, field: str) -> Iterator[list[str | None]]:
    """Prompts of a .txt or .parquet file or URI, some thousands at a time. Empty ones of a Parquet file are kept, as rows are
    counted; blank lines of a text file are none. Raises FileNotFoundError, or ValueError when there is no column `prompt`."""
    from raydiff.data.files import locate, parquet_files

    if source.rstrip("/").endswith(".parquet"):
        import pyarrow.parquet as pq

        from raydiff.data.images import PROMPT

        system, files = parquet_files(source, field)
        for file in files:
            with system.open_input_file(file.path) as opened:
                parquet = pq.ParquetFile(opened)
                if PROMPT not in (names := parquet.schema_arrow.names):
                    raise ValueError(
                        f"{field}: {file.path} has no column {PROMPT!r}; there are {', '.join(names)}; rename yours"
                    )
                for batch in parquet.iter_batches(_SOME, columns=[PROMPT]):
                    yield batch.column(0).to_pylist()
        return
    _, system, path = locate(source)
    if not system.get_file_info(path).is_file:
        raise FileNotFoundError(f"{field} = {source!r} is not a file; give a .txt or a .parquet")
    with io.TextIOWrapper(system.open_input_stream(path), encoding="utf-8") as lines:
        prompts = (line.strip() for line in lines)
        while some := list(islice((p for p in prompts if p), _SOME)):
            yield list(some)


def read_both(config: Prompts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, held out). Raises ValueError when a held-out prompt is trained on."""
    train, held_out = read(config.train, "prompts.train"), read(config.held_out, "prompts.held_out")
    if both := sorted(set(train) & set(held_out)):
        raise ValueError(f"prompts.held_out: {both[0]!r} is in prompts.train too ({len(both)} such); take it out of one")
    return train, held_out


def tickets(run: Run, prompts: tuple[str, ...], step: int) -> list[tuple[str, int]]:
    """(prompt, seed) of each of an update's `batch.size` slots."""
    return [(prompts[row], seed) for row, seed in slots(run, len(prompts), step)]


def slots(run: Run, n: int, step: int) -> list[tuple[int, int]]:
    """(which of n prompts or pairs, seed) of each of an update's `batch.size` slots: a function of run and step alone.

    They come in shuffled passes; the seed belongs to the slot. Workers, pools, restarts and resumption change nothing.
    """

    def one(slot: int) -> tuple[int, int]:
        epoch, place = divmod(slot, n)
        return int(_order(n, mix(run.seed, 1, epoch))[place]), mix(run.seed, 2, slot)

    return [one(slot) for slot in range(step * run.batch.size, (step + 1) * run.batch.size)]


@lru_cache(maxsize=2)
def _order(n: int, seed: int) -> Tensor:
    """One pass over n prompts or pairs."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
