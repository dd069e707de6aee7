"""A cache of latents whose bytes have changed since they were written is named and not used."""

import errno
import multiprocessing
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raydiff.config import Pairs, Run
from raydiff.data.latents import Cache, prepare
from raydiff.data.pieces import PairsError
from raydiff.data.prompts import slots
from raydiff.distributed.ranks import Ranks, Refused
from raydiff.session import Session
from tests.data import shards
from tests.data.test_latents import Shrinking

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


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


def reads(text: str, rank: int, store: str, broken: str, told: Any) -> None:
    """One of two workers that read their shares of the first update; what it raises."""
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    run, ranks = Run.model_validate_json(text), Ranks(60)
    session = Session(run, rank=rank, workers=2, gather=ranks.gather, agreed=ranks.agreed)
    session.prepare()
    assert session.pairs is not None
    row = slots(run, len(session.pairs), 0)[-1][0]  # of the last worker
    (data,) = session.pairs.folder.glob("*.f32")
    ranks.gather(None)
    if rank == 1 and broken == "gone":
        data.unlink()
    if rank == 1 and broken == "changed":
        whole = bytearray(data.read_bytes())
        whole[int(session.pairs.place[row]) * session.pairs.size] ^= 1
        data.write_bytes(whole)
    if rank == 1 and broken == "away":
        session.pairs.data = [Path("/proc/self/mem")]  # which answers EIO
    ranks.gather(None)
    try:
        told.send(len(list(session.batches(0))))
    except Exception as error:
        told.send((type(error), str(error), getattr(error, "errno", None)))
    told.recv()  # the other may still answer


@pytest.mark.parametrize("broken", ["changed", "gone", "away"])
def test_a_broken_record_ends_the_run_on_all_workers(tiny_run: Callable[..., Run], tmp_path: Path, broken: str) -> None:
    """That of one worker's share, as Ray would start an exception's workers again. A disk that is away is no such thing."""
    run = tiny_run(
        "sft",
        {"method.source": "dataset", "pairs.path": str(shards.pairs(tmp_path / "p.parquet", 6)), "pools.train.replicas": 2},
    )
    ends, workers = [], []
    for rank in range(2):
        ours, theirs = CONTEXT.Pipe()
        arguments = (run.model_dump_json(), rank, f"file://{tmp_path}/store", broken, theirs)
        workers.append(CONTEXT.Process(target=reads, args=arguments, daemon=True))
        workers[-1].start()
        ends.append(ours)
    answers = [end.recv() for end in ends]
    for end in ends:
        end.send(None)
    for worker in workers:
        worker.join()
    if broken == "away":
        assert answers[0] == 1 and answers[1][::2] == (OSError, errno.EIO)
    elif broken == "gone":
        assert all(kind is Refused and "is gone; delete its folder" in text for kind, text, _ in answers)
    else:
        assert all(kind is Refused and "holds something else than was encoded" in text for kind, text, _ in answers)
    assert broken == "away" or "PairsError" in answers[0][1]
    assert isinstance(Refused("PairsError", "p").error(), PairsError)
