"""Prompt sets: embedded, from a text or Parquet file, or from the run file itself."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from raydiff import assets
from raydiff.config import Prompts, Run
from raydiff.core.denoise import mix


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
