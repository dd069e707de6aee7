"""Pictures of very many prompts on a pool of actors: a dataset of Parquet files, or a folder of PNGs.

The prompts are copied into the dataset first, a row group for each file to come: that is what actors on any node can read, and
what says later what the dataset was made from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from raydiff import generate as drawing
from raydiff.config import ConfigError, Pool, Sampler
from raydiff.contents import Contents
from raydiff.data import images
from raydiff.data import prompts as prompt_files
from raydiff.distributed import batch
from raydiff.distributed.batch import HIDDEN, BadRow, Output, Summary, Worker
from raydiff.distributed.storage import Folder
from raydiff.generate import Adapter, Sample
from raydiff.models.base import ModelConfig

PROMPTS = f"{HIDDEN}/prompts.parquet"
_THREADS = 4  # of an actor, that encode and write pictures while the next ones are sampled


@dataclass(frozen=True)
class Recipe:
    """What each picture is made with."""

    model: ModelConfig
    sampler: Sampler
    adapters: tuple[Adapter, ...]
    seeds: tuple[int, ...]
    batch: int
    origin: dict[str, Any]
    model_digest: str | None

    def columns(self) -> dict[str, Any]:
        """The columns of the schema that are the same in each row."""
        text = {"sampler": json.dumps(self.origin["sampler"]), "dtype": self.model.dtype}
        return {**self.origin, **text, "model_digest": self.model_digest}


def generate(
    to: str,
    *,
    model: ModelConfig,
    sampler: Sampler,
    prompts: Sequence[str] = (),
    prompts_file: str | None = None,
    adapters: Sequence[Adapter] = (),
    seeds: Sequence[int] = (0,),
    batch_size: int = 8,
    pool: Pool | None = None,
    rows_per_file: int = 256,
    max_bad_rows: int = 100,
    split: str | None = None,
) -> Summary:
    """Draw every prompt with every seed; `to` ends in .parquet for a dataset, else it is a folder of PNGs.

    The pictures are those of `raydiff.generate`, whatever the size of the pool. `rows_per_file` counts pictures, and `split` is
    one of those that a folder of prompts has. An interrupted call is gone on with by the same call. Raises ConfigError,
    ValueError or OSError before anything starts when something is missing, and BatchError.
    """
    drawing.check(model, adapters)
    model.preflight()
    model.grid(sampler.steps, sampler.spacing, sampler.final_alpha)  # refuses what it cannot be
    png = not to.rstrip("/").endswith(".parquet")
    output = Output(Folder(to).uri, HIDDEN if png else "", ".jsonl" if png else ".parquet")
    held = Contents.with_seen(drawing.files(model, adapters))  # before what rows say of them
    origin = drawing.origin(model, sampler, adapters)
    recipe = Recipe(model, sampler, tuple(adapters), tuple(seeds), batch_size, origin, drawing.model_digest(model))
    per_file = max(1, rows_per_file // len(seeds))

    def every_prompt() -> Iterator[str | None]:
        source = prompt_files.stream(prompts_file, "--prompts-file", split, "--split") if prompts_file else ()
        return chain(prompts, chain.from_iterable(source))

    batch.check_own(output)
    count, digest = _counted(every_prompt(), per_file)
    if not count:
        raise ConfigError(f"--prompts-file {prompts_file}: there is no prompt in it")
    made_from = {k: v for k, v in recipe.columns().items() if k != "raydiff"} | {
        "adapters": [{k: a[k] for k in ("weight", "sha256")} for a in origin["adapters"]],
        "sampler": origin["sampler"],
        "prompts": digest,
        "seeds": list(seeds),
        batch.CONTENTS: {name: digest for name, digest in held.digests.items() if name.startswith("model.")},
        "batch": batch_size,
        "rows_per_file": rows_per_file,
    }
    job = batch.Job(
        what="generate",
        output=output,
        made_from=made_from,
        tickets=[{"start": a, "stop": b} for a, b in batch.split(0, count, per_file)],
        rows_per_file=per_file,
        worker=Drawer if png else Generator,
        arguments=(output, recipe, per_file, held.dump()),
        pool=pool or Pool(),
        max_bad_rows=max_bad_rows,
    )
    summary = batch.run(job, lambda: _copy(every_prompt(), output, per_file, digest))
    if png:
        _index(output, job, origin)
    return summary


class Generator(Worker):
    """Draws the prompts of a ticket into one Parquet file."""

    def __init__(self, output: Output, recipe: Recipe, per_file: int, held: str, device: str) -> None:
        import pyarrow.parquet as pq

        self.output, self.recipe, self.per_file = output, recipe, per_file
        self.model = drawing.load(recipe.model, recipe.adapters, device)
        Contents.load(held).compare(drawing.files(recipe.model, recipe.adapters))
        folder = output.folder
        self.prompts = pq.ParquetFile(folder.fs.open_input_file(f"{folder.root}/{PROMPTS}"))
        self.threads = ThreadPoolExecutor(_THREADS)

    def pieces(self, ticket: Mapping[str, Any]) -> Iterator[tuple[int, int, list[str | None]]]:
        start, stop = int(ticket["start"]), int(ticket["stop"])
        yield start, stop, self.prompts.read_row_group(start // self.per_file).column(0).to_pylist()

    def make(self, start: int, rows: list[str | None], ticket: Mapping[str, Any]) -> tuple[bytes, list[BadRow]]:
        reasons = [images.bad_prompt(prompt) for prompt in rows]
        bad = [BadRow(PROMPTS, start + i, reason) for i, reason in enumerate(reasons) if reason]
        used = [(start + i, prompt) for i, (prompt, reason) in enumerate(zip(rows, reasons, strict=True)) if not reason]
        recipe = self.recipe
        drawn = drawing.samples(self.model, [p or "" for _, p in used], recipe.seeds, recipe.sampler, recipe.batch)
        numbers = [row * len(recipe.seeds) + s for row, _ in used for s in range(len(recipe.seeds))]
        return self.file(zip(numbers, drawn, strict=True)), bad

    def file(self, drawn: Iterable[tuple[int, Sample]]) -> bytes:
        """The file of (number, picture) pairs, which come one by one."""
        work = [(self.threads.submit(drawing.png, sample), sample.prompt, sample.seed) for _, sample in drawn]
        encoded, prompts, seeds = [w[0].result() for w in work], [w[1] for w in work], [w[2] for w in work]
        return images.to_bytes(images.table(encoded, prompts, seeds, self.recipe.columns()))


class Drawer(Generator):
    """Draws the prompts of a ticket as PNG files, and then the list of them."""

    def file(self, drawn: Iterable[tuple[int, Sample]]) -> bytes:
        def save(number: int, sample: Sample) -> dict[str, Any]:
            name = drawing.file_name(number, sample)
            self.output.folder.write(name, drawing.png(sample, self.recipe.origin))
            return {"file": name, "prompt": sample.prompt, "seed": sample.seed}

        work = [self.threads.submit(save, number, sample) for number, sample in drawn]
        return "".join(json.dumps(future.result(), ensure_ascii=False) + "\n" for future in work).encode()


def _counted(prompts: Iterator[str | None], per_file: int) -> tuple[int, str]:
    """(how many, SHA-256) of the prompts."""
    count, digest = 0, hashlib.sha256()
    while some := list(islice(prompts, per_file)):
        digest.update(json.dumps(some).encode())
        count += len(some)
    return count, digest.hexdigest()


def _copy(prompts: Iterator[str | None], output: Output, per_file: int, expected: str) -> None:
    """Give a dataset its prompts, a row group a file, unless it has them. Raises ConfigError for others than were counted."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if output.folder.size(PROMPTS) is not None:
        return
    schema, digest = pa.schema([(images.PROMPT, pa.string())]), hashlib.sha256()
    with output.folder.open(PROMPTS) as sink, pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        while some := list(islice(prompts, per_file)):
            digest.update(json.dumps(some).encode())
            writer.write_table(pa.table([some], schema=schema), row_group_size=per_file)
    if digest.hexdigest() != expected:
        output.folder.remove(PROMPTS)
        raise ConfigError("--prompts-file has changed since this call began; call again")


def _index(output: Output, job: batch.Job, origin: dict[str, Any]) -> None:
    """images.json of a folder of PNGs, as `raydiff generate` without Ray writes it."""
    files = [output.path(*r) for ticket in job.tickets for r in job.ranges(ticket)]
    listed = [json.loads(line) for file in files for line in output.folder.read(file).splitlines()]
    output.folder.write("images.json", json.dumps({**origin, "images": listed}, indent=1, ensure_ascii=False).encode())
