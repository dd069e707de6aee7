"""Rewards of a whole Parquet dataset of pictures on a pool of actors."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from raydiff.config import ConfigError, Pool, Run
from raydiff.contents import Contents, of_locations, of_parts
from raydiff.core.reward_vjp import RewardError, weighted_sum
from raydiff.data import images, pictures
from raydiff.data.files import locate, parquet_files
from raydiff.data.files import opened as open_parquet
from raydiff.data.images import Columns
from raydiff.distributed import batch
from raydiff.distributed.batch import BadRow, Output, Summary, Worker
from raydiff.distributed.storage import Folder
from raydiff.rewards.base import RewardConfig
from raydiff.session import weights

_THREADS = 4  # of an actor, that decode the next pictures while these are scored
_BUFFER = 8 << 20  # bytes of a file read at a time: a large row group is not read whole

Row = tuple[int, Any, str]  # place in its file, RGB PIL image, prompt


def score(
    dataset: str,
    to: str,
    rewards: Run | Mapping[str, RewardConfig],
    *,
    columns: Columns | None = None,
    batch_size: int = 16,
    pool: Pool | None = None,
    rows_per_file: int = 256,
    max_bad_rows: int = 100,
    split: str | None = None,
) -> Summary:
    """Write the dataset anew to `to` with a column for each reward: of a run, those held out and the total too.

    Other columns stay. A ticket is a whole row group, or several small ones of a file: more actors than tickets find no work.
    A folder of several splits is refused unless `split` names one, or is "all". An interrupted call is gone on with by the same
    call. Raises ConfigError, ValueError or OSError before anything starts when something is missing, and BatchError.
    """
    columns = columns or Columns()
    named, factors = _rewards(rewards)
    output = Output(Folder(to).uri)
    if output.uri == Folder(dataset).uri:
        raise ConfigError(f"--to {to}: is the dataset itself; give another folder")
    for name, reward in named.items():
        if not reward.runtime_env:
            _checked(f"rewards.{name}", reward)
    held = Contents.with_seen(_loaded({name: reward for name, reward in named.items() if not reward.runtime_env}))
    tickets, files = _tickets(dataset, columns, rows_per_file, split)
    made_from = {
        "dataset": Folder(dataset).uri,
        "files by name, size and time": files,
        "columns": {"image": columns.image, "prompt": columns.prompt},
        "rewards": {name: reward.model_dump(mode="json") for name, reward in named.items()},
        batch.CONTENTS: held.digests,
        "total": factors,
        "batch": batch_size,
        "rows_per_file": rows_per_file,
    }
    return batch.run(
        batch.Job(
            what="score",
            output=output,
            made_from=made_from,
            tickets=tickets,
            rows_per_file=rows_per_file,
            worker=Scorer,
            arguments=(output, named, factors, columns, dataset, batch_size, rows_per_file, held.dump()),
            pool=pool or Pool(),
            max_bad_rows=max_bad_rows,
            runtime_env=next((r.runtime_env for r in named.values()), {}),
        )
    )


class Scorer(Worker):
    """Scores the row groups of a ticket. The rewards are built once."""

    def __init__(
        self,
        output: Output,
        rewards: Mapping[str, RewardConfig],
        factors: Mapping[str, float] | None,
        columns: Columns,
        dataset: str,
        batch_size: int,
        rows_per_file: int,
        held: str,
        device: str,
    ) -> None:
        self.output, self.columns, self.batch_size, self.rows_per_file = output, columns, batch_size, rows_per_file
        self.device = device
        self.names = [*rewards, *([] if factors is None else ["total"])]
        built = {name: reward.build(device) for name, reward in rewards.items()}
        Contents.load(held).compare(_loaded(rewards))
        self.score = weighted_sum(built, factors or dict.fromkeys(built, 0.0))
        self.fs = locate(dataset)[1]
        self.threads = ThreadPoolExecutor(_THREADS)

    def pieces(self, ticket: Mapping[str, Any]) -> Iterator[tuple[int, int, Any]]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        start, file = int(ticket["start"]), str(ticket["file"])
        if _stamp(self.fs.get_file_info(file)) != ticket["stamp"]:
            raise ConfigError(f"{file} has changed since the call began; start a fresh one, to another folder")
        with self.fs.open_input_file(file) as opened:
            parquet = pq.ParquetFile(opened, buffer_size=_BUFFER)
            groups = range(int(ticket["first"]), int(ticket["last"]))
            for rows in parquet.iter_batches(self.rows_per_file, row_groups=list(groups)):
                yield start, start + len(rows), pa.Table.from_batches([rows])
                start += len(rows)

    def make(self, start: int, rows: Any, ticket: Mapping[str, Any]) -> tuple[bytes, list[BadRow]]:
        cells = images.cells(rows, self.columns)
        reasons = [images.bad_prompt(prompt) if self.columns.prompt else "" for _, prompt in cells]
        parts = {name: np.full(len(rows), np.nan, np.float32) for name in self.names}
        wanted = [i for i, reason in enumerate(reasons) if not reason]
        sizes = [pictures.pixels(cells[i][0]) for i in wanted]
        chunks = _chunks(wanted, sizes, self.batch_size, pictures.MOST_PIXELS)
        for chunk, decoded in _ahead(self.threads, chunks, lambda i: pictures.decode(cells[i][0])):
            found: list[Row] = []
            for i, (image, reason) in zip(chunk, decoded, strict=True):
                reasons[i] = reason
                if image is not None:
                    found.append((i, image, cells[i][1] or ""))
            for same in _by_size(found):
                self._score(same, parts, reasons)
        kept = np.array([i for i, reason in enumerate(reasons) if not reason], np.int64)
        scored = images.with_rewards(rows.take(kept), {name: values[kept] for name, values in parts.items()})
        offset = start - int(ticket["start"]) + int(ticket["row"])
        bad = [BadRow(str(ticket["file"]), offset + i, reason) for i, reason in enumerate(reasons) if reason]
        return images.to_bytes(scored), bad

    @torch.no_grad()
    def _score(self, rows: Sequence[Row], parts: dict[str, Any], reasons: list[str]) -> None:
        """Rewards of pictures of one size, into `parts`; a row without a finite one, or that makes one raise, gets a reason.

        Raises RewardError when it is not one row's fault.
        """
        if not rows:
            return
        pixels = np.stack([np.asarray(image) for _, image, _ in rows])  # (B,H,W,3) uint8
        tensor = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2).float() / 255
        try:
            total, named = self.score(tensor, [prompt for _, _, prompt in rows])
        except RewardError as error:
            if error.row is None:
                raise
            reasons[rows[error.row][0]] = str(error)
            return self._score([row for i, row in enumerate(rows) if i != error.row], parts, reasons)
        for name in self.names:
            values = ({"total": total} | named)[name].float().tolist()
            for (i, _, _), value in zip(rows, values, strict=True):
                parts[name][i] = value
                if not math.isfinite(value):
                    reasons[i] = reasons[i] or f"reward {name} is {value}"


def _rewards(rewards: Run | Mapping[str, RewardConfig]) -> tuple[dict[str, RewardConfig], dict[str, float] | None]:
    """(rewards by name, their factors in the total, None when there is no total)."""
    run = rewards if isinstance(rewards, Run) else None
    named = {**run.rewards.named, **run.evaluate.rewards} if run else dict(rewards)
    if not named:
        raise ConfigError("--reward: there is none; give --reward NAME=KIND, or a run file by --recipe")
    if len({repr(reward.runtime_env) for reward in named.values()}) > 1:
        raise ConfigError(
            "rewards need different runtime environments: score them one call after the other, each on the last one's result"
        )
    return named, weights(run) if run else None


def _checked(path: str, reward: RewardConfig) -> None:
    try:
        reward.preflight()
    except (ValueError, OSError, ImportError) as error:
        raise ConfigError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None


def _tickets(dataset: str, columns: Columns, size: int, split: str | None) -> tuple[list[dict[str, Any]], str]:
    """(tickets, SHA-256 over the files' names, sizes and times of change).

    Raises ValueError for a file that is not as `columns` say, FileNotFoundError when there is none.
    """
    system, files = parquet_files(dataset, "DATASET", split)

    def footer(file: Any) -> list[int]:
        with system.open_input_file(file.path) as stream:
            parquet = open_parquet(stream, file.path)
            images.check(parquet.schema_arrow, file.path, columns)
            return [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]

    with ThreadPoolExecutor(16) as threads:
        groups = list(threads.map(footer, files))
    tickets, start = [], 0
    for file, rows in zip(files, groups, strict=True):
        row = 0
        for first, last in _runs(rows, size):
            count = sum(rows[first:last])
            place = {"file": file.path, "stamp": _stamp(file), "first": first, "last": last, "row": row}
            tickets.append({"start": start, "stop": start + count, **place})
            start, row = start + count, row + count
    if not tickets:
        raise ConfigError(f"DATASET = {dataset!r} has no rows")
    listing = json.dumps([[file.path, file.size, file.mtime_ns] for file in files])
    return tickets, hashlib.sha256(listing.encode()).hexdigest()


def _stamp(file: Any) -> str:
    return f"{file.size} {file.mtime_ns}"


def _loaded(rewards: Mapping[str, RewardConfig]) -> dict[str, str]:
    """Digests of the rewards' files."""
    return of_locations(of_parts({f"rewards.{name}": reward for name, reward in rewards.items()}))


def _runs(rows: Sequence[int], size: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of row groups that together make a file, or of one that makes several."""
    first = count = 0
    for i, n in enumerate(rows):
        if count and count + n > size:
            yield first, i
            first = i
            count = 0
        count += n
    if count:
        yield first, len(rows)


def _chunks(rows: Sequence[int], pixels: Sequence[int], most: int, most_pixels: int) -> Iterator[list[int]]:
    """Rows in order, at most `most` together, and of no more pixels in all than `most_pixels`; one alone may have more."""
    chunk, total = list[int](), 0
    for row, size in zip(rows, pixels, strict=True):
        if chunk and (len(chunk) == most or total + size > most_pixels):
            yield chunk
            chunk, total = [], 0
        chunk.append(row)
        total += size
    if chunk:
        yield chunk


def _by_size(rows: Iterable[Row]) -> Iterable[list[Row]]:
    sizes: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        sizes.setdefault(row[1].size, []).append(row)
    return sizes.values()


def _ahead(
    threads: ThreadPoolExecutor, chunks: Iterable[list[int]], work: Callable[[int], Any]
) -> Iterator[tuple[list[int], list[Any]]]:
    """Each chunk with its results, while the next one is worked on."""
    waiting: deque[tuple[list[int], list[Future[Any]]]] = deque()
    for chunk in chunks:
        waiting.append((chunk, [threads.submit(work, i) for i in chunk]))
        if len(waiting) > 1:
            ready = waiting.popleft()
            yield ready[0], [future.result() for future in ready[1]]
    for last, futures in waiting:
        yield last, [future.result() for future in futures]
