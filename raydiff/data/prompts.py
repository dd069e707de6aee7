"""Prompt sets: embedded, from a text or Parquet file, or from the run file itself."""

from __future__ import annotations

import io
import unicodedata
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from raydiff import assets
from raydiff.config import Prompts, Run
from raydiff.core.denoise import mix
from raydiff.data.files import is_text, locate, opened, parquet_files
from raydiff.data.images import PROMPT, bad_prompt

_SOME = 4096  # prompts read at a time


def read(source: str | tuple[str, ...], field: str, split: str | None = None, option: str | None = None) -> tuple[str, ...]:
    """Prompts of a source, one or more: a list, "embedded", or what `stream` reads. `field` is its dotted path, for errors.

    Raises ValueError as `stream` does, and for a prompt that is none, with its place; FileNotFoundError.
    """
    if source == "embedded":
        return tuple(assets.prompts("held_out" if field.endswith("held_out") else "train"))
    prompts = tuple(chain.from_iterable(stream(source, field, split, option)) if isinstance(source, str) else source)
    if not prompts:
        raise ValueError(f"{field} = {source!r} holds no prompt")
    for row, prompt in enumerate(prompts):
        if reason := bad_prompt(prompt):
            where = f"{source}, " if isinstance(source, str) else ""
            raise ValueError(f"{field}: {where}row {row}: {reason}; take the row out")
    return tuple(str(prompt) for prompt in prompts)


def stream(source: str, field: str, split: str | None = None, option: str | None = None) -> Iterator[list[str | None]]:
    """Prompts of a .txt or .parquet file, or of a folder of Parquet files, by path or URI, some thousands at a time.

    Empty ones of a Parquet file are kept, as rows are counted; blank lines of a text file are none. `option` is what asks for
    `split`. Raises FileNotFoundError; ValueError for text that is not UTF-8, for a Parquet file without a column `prompt` of
    text, and for several splits of which none is asked for, all of it before the first prompt.
    """
    _, system, path = locate(source, field)
    info = system.get_file_info(path)
    if info.is_file and info.extension == "txt":
        if split is not None:
            raise ValueError(f"{option} {split}: {source!r} is a text, and has no splits")
        deque(_lines(system, path, field), maxlen=0)
        return _some(_lines(system, path, field))
    if info.is_file and info.extension != "parquet":
        raise ValueError(f"{field} = {source!r}: only .txt, one prompt a line, and .parquet with a column {PROMPT!r} are read")
    if not info.is_file and info.type.name != "Directory":
        raise FileNotFoundError(f'{field} = {source!r} is not a file; give a .txt, a .parquet, a list, or "embedded"')
    system, files = parquet_files(source, field, split, option)
    for file in files:
        _check_column(system, file.path, field)
    return _columns(system, files, field)


def _some(lines: Iterator[str]) -> Iterator[list[str | None]]:
    while some := list(islice(lines, _SOME)):
        yield list(some)


def _lines(system: Any, path: str, field: str) -> Iterator[str]:
    """The prompts of a text. Newlines alone end a line, where str.splitlines knows more; byte order marks are no text."""
    number = 0
    with io.TextIOWrapper(system.open_input_stream(path), encoding="utf-8-sig") as text:
        try:
            for number, line in enumerate(text, 1):
                if "\0" in line:
                    raise ValueError(f"{field}: {path}, line {number}: there is a NUL byte, as in UTF-16; save it as UTF-8")
                if prompt := line.removeprefix("\ufeff").strip():
                    yield prompt
        except UnicodeDecodeError as error:
            number += 1 + error.object[: error.start].count(b"\n")
            raise ValueError(
                f"{field}: {path}, line {number}: byte {error.object[error.start]:#04x} is not UTF-8, as in UTF-16 or Latin-1;"
                " save it as UTF-8"
            ) from None


def _check_column(system: Any, path: str, field: str) -> None:
    with system.open_input_file(path) as stream:
        schema = opened(stream, f"{field}: {path}").schema_arrow
    if schema.names.count(PROMPT) != 1:
        what = "several columns" if PROMPT in schema.names else "no column"
        raise ValueError(f"{field}: {path} has {what} {PROMPT!r}; there are {', '.join(schema.names)}; rename yours")
    if not is_text(kind := schema.field(PROMPT).type):
        raise ValueError(f"{field}: {path}: column {PROMPT!r} is {kind}, and should be text")


def _columns(system: Any, files: Sequence[Any], field: str) -> Iterator[list[str | None]]:
    """The column `prompt` of Parquet files."""
    for file in files:
        with system.open_input_file(file.path) as stream:
            try:
                for batch in opened(stream, f"{field}: {file.path}").iter_batches(_SOME, columns=[PROMPT]):
                    yield batch.column(0).to_pylist()
            except UnicodeDecodeError:
                raise ValueError(f"{field}: {file.path}: column {PROMPT!r} holds bytes that are not UTF-8") from None


def read_both(config: Prompts, tokenizers: Sequence[Any] = ()) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, held out). Raises ValueError when a held-out prompt is trained on, in whatever spelling the model sees as one.

    `tokenizers` are the model's, and tell that; without any CLIP's first step does, which every CLIP tokenizer has.
    """
    train, held_out = read(config.train, "prompts.train"), read(config.held_out, "prompts.held_out")
    seen = dict(zip(_seen(train, tokenizers), train, strict=True))
    both = {prompt: seen[key] for prompt, key in zip(held_out, _seen(held_out, tokenizers), strict=True) if key in seen}
    if both:
        ours, theirs = min(both.items())
        same = "" if ours == theirs else f", as {theirs!r}: the model sees the same tokens"
        raise ValueError(f"prompts.held_out: {ours!r} is in prompts.train too{same} ({len(both)} such); take it out of one")
    return train, held_out


def _seen(prompts: Sequence[str], tokenizers: Sequence[Any]) -> list[Any]:
    """What is the same of two prompts where a model cannot tell them apart."""
    if not tokenizers:
        return [" ".join(unicodedata.normalize("NFC", prompt).lower().split()) for prompt in prompts]
    each = (tokenizer(list(prompts), truncation=True)["input_ids"] for tokenizer in tokenizers)
    return [tuple(map(tuple, ids)) for ids in zip(*each, strict=True)]


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
