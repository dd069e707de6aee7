"""Latents of a whole dataset of pairs on a pool of actors: the cache that a run's trainers otherwise fill when it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from raydiff.config import Run
from raydiff.data.latents import Cache, Latents, Piece
from raydiff.distributed import batch
from raydiff.distributed.batch import BatchError, Output, Worker


def encode(run: Run) -> Latents:
    """Make what is missing of the cache of `run.pairs` on the pool `run.pools.generate`.

    The cache must lie on a disk that every node sees. An interrupted call is gone on with by the same call. Raises ConfigError
    before any actor starts when the pool has no room, PairsError as `Cache.finish` does, and BatchError.
    """
    cache = Cache(run.pairs, run.model.build(), run.evaluate.batch)
    if missing := cache.missing():
        job = batch.Job(
            what="encode",
            output=Output(str(cache.folder)),
            made_from={},
            tickets=[asdict(piece) for piece in missing],
            rows_per_file=0,  # a ticket is a file
            worker=Encoder,
            arguments=(run,),
            pool=run.pools.generate,
            max_bad_rows=run.pairs.max_bad_rows,
        )
        try:
            batch.work(job, job.tickets, len(cache.bad()))
        except BatchError:
            cache.within(cache.bad())  # says it by the rows, where that is why
            raise
    if not cache.whole():
        cache.finish()
    return cache.open()


class Encoder(Worker):
    """Encodes pieces. The model is built once."""

    def __init__(self, run: Run, device: str) -> None:
        self.cache = Cache(run.pairs, run.model.build(device), run.evaluate.batch)

    def answer(self, ticket: Mapping[str, Any]) -> int:
        piece = Piece(str(ticket["file"]), int(ticket["start"]), int(ticket["stop"]), int(ticket["first"]))
        return len(self.cache.make(piece))
