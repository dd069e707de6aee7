"""Latents of labelled pairs, encoded once: the posterior's mean AND standard deviation, so that training still samples it.

A cache lies in PAIRS.latents/DIGEST/ beside the pairs, under a digest of the pairs' files, the files of pictures that
they name, the encoder's weights and the size:

    rows-000000000000-000000000256.f32    (n,2,F,2,C,h,w) fp32: of each usable pair both sides, as it is and, with `pairs.flip`,
                                          mirrored, mean and std
    rows-000000000000-000000000256.json   which rows those are, their prompts, labels, digests, and the bad rows; written last
    index.parquet                         all usable pairs, in order, with the SHA-256 of each one's record
    index.json                            that file's SHA-256; the cache is whole when it is there
    bad_rows.jsonl                        file, row and reason of what is not in it

A record is read from its place in its file: no process ever holds more than its micro-batch, or maps the files, whose pages
would count as its own. It is compared with its digest at each read: what has changed on the disk reaches no weight.

Prompt embeddings are not cached. Of a pair's update on SD 1.5 (two forward and two backward passes of the policy, two forward
passes of the reference: 6400 GFLOP) the text encoder's four passes are 53, or 0.8 %, and 77·768 numbers a prompt would make the
cache half as large again. Which captions are dropped is decided in training anyway.

Legend: P pairs, F 1 or 2 orientations, C h w latent, H W pixels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydiff import drafts, sealed
from raydiff.config import Pairs
from raydiff.core.denoise import mix
from raydiff.data import pictures, pieces, preferences
from raydiff.data.pieces import BadRow, PairsError
from raydiff.data.preferences import Pair
from raydiff.models.base import Model
from raydiff.rewards._images import centre_crop, resized  # the one resize and crop of this package

_INDEX, _WHOLE, _FORMAT = "index.parquet", "index.json", 2
_POSTERIOR, _FLIP = 0x905, 0xF11  # keep what is drawn here apart from a loss's draws
_ROWS = 256  # of a piece, less where row groups are larger


@dataclass(frozen=True)
class Piece:
    """Rows of one file that are encoded, and finished, together."""

    file: str
    start: int  # in that file
    stop: int
    first: int  # of `start`, in the dataset

    @property
    def name(self) -> str:
        return f"rows-{self.first:012d}-{self.first + self.stop - self.start:012d}"


class Cache:
    """The cache of a dataset under an encoder: which pieces it should have, and how one is made."""

    def __init__(self, pairs: Pairs, model: Model, batch: int) -> None:
        """`batch`: pictures encoded at once. Raises as `preferences.overview` does."""
        assert pairs.path is not None
        self.pairs, self.model, self.batch = pairs, model, max(1, batch // 2)
        there = preferences.overview(pairs.path, split=pairs.split)
        self.files = [file for file, _ in there.files]
        self.pieces = list(_pieces(there))
        self.shape = (2, 1 + pairs.flip, 2, *model.latent_shape)
        about = {
            "what is read": self._source(),
            "format": _FORMAT,
            "decoder": pictures.VERSION,
            "outside": pairs.outside,
            "encoder": model.encoder_digest(),
            "pixels": model.picture_size,
            "enlarge": pairs.enlarge,
            "shape of a record": self.shape,
        }
        self.source = about["what is read"]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        self.folder = Path(pairs.cache or f"{str(pairs.path).rstrip('/')}.latents") / digest

    def _source(self) -> list[Any]:
        """The files of pairs by name, size and time, and so the pictures that they name by path."""
        return [pieces.listing(self.files), preferences.pictures_digest(self.files)]

    def missing(self) -> list[Piece]:
        """The pieces that are not finished; [] when the cache is whole, or needs no more than `finish`."""
        if self.whole():
            return []
        return [piece for piece in self.pieces if self._kept(piece) is None]

    def whole(self) -> bool:
        return (self.folder / _WHOLE).is_file()

    def make(self, piece: Piece) -> list[BadRow]:
        """Encode a piece. Returns the rows that it leaves out."""
        self.folder.mkdir(parents=True, exist_ok=True)
        bad: list[BadRow] = []
        kept: dict[str, list[Any]] = {"row": [], "prompt": [], "label": []}
        digests: list[str] = []
        with drafts.replacing(self._data(piece)) as draft, draft.open("wb") as out:
            for chunk in _ahead(self._chunks(piece, bad)):
                for record in self._records(torch.stack([image for _, sides in chunk for image in sides])):
                    data = record.tobytes()
                    out.write(data)
                    digests.append(hashlib.sha256(data).hexdigest())
                for pair, _ in chunk:
                    for name, values in kept.items():
                        values.append(getattr(pair, name))
        with drafts.replacing(self._side(piece)) as draft:
            draft.write_bytes(sealed.dump(kept | {"digest": digests, "bad": [asdict(row) for row in bad]}))
        return bad

    def bad(self) -> list[BadRow]:
        """Of the finished pieces."""
        found = (kept["bad"] for piece in self.pieces if (kept := self._kept(piece)) is not None)
        return [BadRow(**row) for row in chain.from_iterable(found)]

    def within(self, bad: Sequence[BadRow]) -> None:
        """Raise PairsError when more rows than `pairs.max_bad_rows` are bad; list them beside the latents."""
        pieces.within(bad, self.pairs.max_bad_rows, self.folder, "pairs.max_bad_rows")

    def finish(self) -> None:
        """Write the index: the cache is whole. Raises PairsError when it would be empty or too much is bad."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.within(self.bad())
        if self._source() != self.source:
            raise PairsError(f"pairs.path = {self.pairs.path!r}: files of it changed while they were encoded; start again")
        tables = []
        for n, piece in enumerate(self.pieces):
            if (kept := self._kept(piece)) is None:
                raise PairsError(f"pairs.cache: {self._side(piece)} has changed since it was written; start again")
            rows = len(kept["row"])
            columns = {
                "piece": pa.array([n] * rows, pa.int32()),
                "place": pa.array(range(rows), pa.int32()),
                "label": pa.array(kept["label"], pa.float64()),
                "prompt": pa.array(kept["prompt"], pa.string()),
                "digest": pa.array(map(bytes.fromhex, kept["digest"]), pa.binary(32)),
            }
            tables.append(pa.table(columns))
        whole = pa.concat_tables(tables)
        if not len(whole):
            raise PairsError(
                f"pairs.path = {self.pairs.path!r}: no pair can be used; {self.folder / 'bad_rows.jsonl'} says why"
            )
        with drafts.replacing(self.folder / _INDEX) as draft:
            pq.write_table(whole, draft)
            digest = pieces.sha256(draft)
        with drafts.replacing(self.folder / _WHOLE) as draft:
            draft.write_bytes(sealed.dump({_INDEX: digest}))

    def open(self) -> Latents:
        return Latents(self.folder, [self._data(piece) for piece in self.pieces], self.shape)

    def _data(self, piece: Piece) -> Path:
        return self.folder / f"{piece.name}.f32"

    def _side(self, piece: Piece) -> Path:
        return self.folder / f"{piece.name}.json"

    def _kept(self, piece: Piece) -> dict[str, Any] | None:
        """What a piece's side file says; None when the piece is not finished, or that file has changed."""
        try:
            return sealed.load(self._side(piece).read_bytes())
        except (FileNotFoundError, sealed.BrokenSeal):
            return None

    def _chunks(self, piece: Piece, bad: list[BadRow]) -> Iterator[list[tuple[Pair, tuple[Tensor, Tensor]]]]:
        """Usable pairs with their fitted pictures, (3,H,W) each; what is not usable goes to `bad`."""

        def usable() -> Iterator[tuple[Pair, tuple[Tensor, Tensor]]]:
            path = Path(str(self.pairs.path))
            within = None if self.pairs.outside else path if path.is_dir() else path.parent
            for row in preferences.read(Path(piece.file), piece.start, piece.stop, within):
                if isinstance(row, Pair):
                    try:
                        first, second = (fitted(image, self.model.picture_size, self.pairs.enlarge) for image in row.images)
                    except ValueError as error:
                        bad.append(BadRow(row.file, row.row, str(error)))
                        continue
                    yield row, (first, second)
                else:
                    bad.append(row)

        rows = usable()
        while chunk := list(islice(rows, self.batch)):
            yield chunk

    @torch.no_grad()
    def _records(self, images: Tensor) -> np.ndarray:
        """Moments of (2n,3,H,W) pictures, two for a pair: (n,2,F,2,C,h,w) fp32."""
        both = [images, images.flip(-1)] if self.pairs.flip else [images]
        moments = [torch.stack(self.model.posterior(x.to(self.model.device)), 1) for x in both]  # (2n,2,C,h,w) each
        return torch.stack(moments, 1).float().cpu().numpy().reshape(-1, *self.shape)


class Latents:
    """A whole cache, read record by record."""

    def __init__(self, folder: Path, data: Sequence[Path], shape: Sequence[int]) -> None:
        """Raises PairsError when the cache is not there, not whole, or its index has changed since it was written."""
        import pyarrow.parquet as pq

        if not (folder / _WHOLE).is_file():
            raise PairsError(f"pairs.cache: {folder} has no {_INDEX} here; give a folder on a disk that every worker sees")
        self.folder = folder
        if not _unchanged(folder):
            raise self._changed(folder / _INDEX)
        index = pq.read_table(folder / _INDEX)
        self.data, self.shape, self.size = data, tuple(shape), 4 * int(np.prod(shape))  # bytes of a record
        self.prompts = index["prompt"].combine_chunks()  # stays Arrow's: a million Python strings would weigh 100 MB
        self.digests = index["digest"].combine_chunks()
        self.labels, self.piece, self.place = (index[name].to_numpy() for name in ("label", "piece", "place"))

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: Sequence[int], seeds: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Clean latents of both sides (B,2,C,h,w), each drawn from its posterior by its seed of (B,2); rewards (B,2) that are
        the label and its complement; prompts. Which orientation is taken is drawn once for both sides."""
        latents = torch.stack([self._draw(self._record(row), *pair) for row, pair in zip(rows, seeds.tolist(), strict=True)])
        labels = torch.tensor(self.labels[list(rows)], dtype=torch.float32)
        return latents, torch.stack([labels, 1 - labels], 1), tuple(self.prompts[row].as_py() for row in rows)

    def _record(self, row: int) -> Tensor:
        path = self.data[self.piece[row]]
        try:
            with path.open("rb", buffering=0) as file:
                file.seek(int(self.place[row]) * self.size)
                read = file.read(self.size)
        except FileNotFoundError:
            raise PairsError(f"pairs.cache: {path} is gone; delete its folder, and it is made anew") from None
        if len(read) < self.size:
            raise PairsError(f"pairs.cache: {path} is cut short; delete its folder, and it is made anew")
        if hashlib.sha256(read).digest() != self.digests[row].as_py():
            raise self._changed(path)
        return torch.from_numpy(np.frombuffer(bytearray(read), np.float32).reshape(self.shape))

    def _changed(self, file: Path) -> PairsError:
        return PairsError(
            f"pairs.cache: {file} holds something else than was encoded; delete {self.folder}, and it is made anew"
        )

    def _draw(self, record: Tensor, first: int, second: int) -> Tensor:
        """(2,C,h,w) of (2,F,2,C,h,w)."""
        mean, std = record[:, mix(first, _FLIP) % self.shape[1]].unbind(1)
        noise = [
            torch.randn(mean.shape[1:], generator=torch.Generator().manual_seed(mix(s, _POSTERIOR))) for s in (first, second)
        ]
        return mean + std * torch.stack(noise)


def prepare(
    pairs: Pairs,
    model: Model,
    batch: int,
    *,
    rank: int = 0,
    workers: int = 1,
    gather: Callable[[Any], list[Any]] = lambda value: [value],
    told: Callable[[int, int], None] = lambda done, pieces: None,
) -> Latents:
    """The latents of a dataset of pairs, encoded where they are not yet: collective, each worker its share of the pieces.

    `told` hears how many of the missing pieces are done. Interrupted, it goes on after those that are finished. What one worker
    raises is raised on all: PairsError, OSError.
    """

    def agreed(work: Callable[[], Any]) -> list[Any]:
        try:
            mine = work()
        except (ValueError, OSError) as error:
            mine = error
        answers = gather(mine)
        if failed := [answer for answer in answers if isinstance(answer, Exception)]:
            raise failed[0]
        return answers

    def made(share: Sequence[Piece]) -> list[BadRow]:
        return [row for piece in share for row in cache.make(piece)]

    def counted(bad: Sequence[BadRow]) -> None:
        if rank == 0:
            cache.within(bad)

    cache = Cache(pairs, model, batch)
    if rank == 0:
        drafts.clear(cache.folder)
    missing = gather(cache.missing())[0]
    bad = cache.bad() if missing else []
    for start in range(0, len(missing), workers):
        told(start, len(missing))
        mine = missing[start + rank : start + rank + 1]
        bad += chain.from_iterable(agreed(partial(made, mine)))
        agreed(partial(counted, bad))
    agreed(lambda: cache.finish() if rank == 0 and not cache.whole() else None)
    return cache.open()


def fitted(image: Any, side: int, enlarge: bool) -> Tensor:
    """An RGB PIL image as (3,side,side) in [0,1]: shorter side to `side`, bilinear and antialiased, then cut from the centre.

    Raises ValueError when it is smaller and may not be enlarged.
    """
    width, height = image.size
    if min(width, height) < side and not enlarge:
        raise ValueError(
            f"a picture of {width} × {height} pixels is smaller than the model's {side} × {side}: pairs.enlarge = true scales"
            " it up, which teaches the model its blur"
        )
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    size = resized((height, width), side)
    if size != (height, width):
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
    return centre_crop(pixels, (side, side))[0]


def _unchanged(folder: Path) -> bool:
    """Whether a whole cache's index is the one that was written."""
    try:
        return bool(sealed.load((folder / _WHOLE).read_bytes())[_INDEX] == pieces.sha256(folder / _INDEX))
    except (FileNotFoundError, sealed.BrokenSeal):
        return False


def _pieces(there: preferences.Overview) -> Iterator[Piece]:
    """Whole row groups, as many as make _ROWS rows, or a single larger one."""
    before = 0
    for file, groups in there.files:
        start = stop = 0
        for rows in groups:
            if stop > start and stop + rows - start > _ROWS:
                yield Piece(str(file), start, stop, before + start)
                start = stop
            stop += rows
        if stop > start:
            yield Piece(str(file), start, stop, before + start)
        before += stop


def _ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The items, each made in a thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, items, None)
        while (item := waiting.result()) is not None:
            waiting = thread.submit(next, items, None)
            yield item
