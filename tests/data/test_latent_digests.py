"""A cache of latents whose bytes have changed since they were written is named and not used."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from raydiff.config import Pairs
from raydiff.data.latents import Cache, prepare
from raydiff.data.pieces import PairsError
from tests.data import shards
from tests.data.test_latents import Shrinking


def prepared(file: Path) -> Any:
    return prepare(Pairs(path=str(file)), Shrinking(), 8)  # type: ignore[arg-type]


def drawn(cached: Any) -> torch.Tensor:
    return cached.read(range(len(cached)), torch.arange(2 * len(cached)).view(-1, 2))[0]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """A byte at 20 random places of each file that a whole cache is read from, and at each end."""
    file = shards.pairs(tmp_path / "p.parquet", 3, size=(48, 48))
    folder, draw = prepared(file).folder, random.Random(0)
    read = [path for path in sorted(folder.iterdir()) if not (path.suffix == ".json" and path.name.startswith("rows-"))]
    assert [path.name.partition("-")[0] for path in read] == ["index.json", "index.parquet", "rows"]
    for path in read:
        whole = path.read_bytes()
        for place in [0, len(whole) - 1, *draw.sample(range(len(whole)), 20)]:
            if path.suffix == ".json" and whole[place : place + 1].isspace():
                continue
            flipped = bytearray(whole)
            flipped[place] ^= 1 << draw.randrange(8)
            path.write_bytes(flipped)
            named = "index.parquet" if path.name.startswith("index") else path.name
            with pytest.raises(PairsError, match=rf"{named} holds something else than was encoded; delete {folder}, and it is"):
                drawn(prepared(file))
        path.write_bytes(whole)
    before = drawn(prepared(file))
    shutil.rmtree(folder)
    assert torch.equal(drawn(prepared(file)), before)


def test_records_that_have_changed_places_are_noticed(tmp_path: Path) -> None:
    file = shards.pairs(tmp_path / "p.parquet", 2, size=(48, 48))
    (data,) = prepared(file).folder.glob("*.f32")
    whole = data.read_bytes()
    data.write_bytes(whole[len(whole) // 2 :] + whole[: len(whole) // 2])
    with pytest.raises(PairsError, match="holds something else than was encoded"):
        drawn(prepared(file))


def test_a_piece_whose_labels_have_changed_is_encoded_again(tmp_path: Path) -> None:
    """Between an encoding that was interrupted and the one that goes on."""
    file = shards.pairs(tmp_path / "p.parquet", 3, size=(48, 48), label=[1.0, 0.0, 1.0])
    cache = Cache(Pairs(path=str(file)), Shrinking(), 8)  # type: ignore[arg-type]
    (piece,) = cache.missing()
    cache.make(piece)
    assert cache.missing() == []
    (side,) = cache.folder.glob("rows-*.json")
    side.write_text(side.read_text().replace("[1.0, 0.0, 1.0]", "[1.0, 1.0, 1.0]"))
    assert cache.missing() == [piece]
    cache.make(piece)
    assert cache.missing() == []  # and no index: it ends between the two
    assert prepared(file).labels.tolist() == [1.0, 0.0, 1.0]
