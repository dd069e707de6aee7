"""Two processes and one folder: one works on it, the other is refused by name, or takes over from one that is gone."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from raydiff.config import ConfigError, Run
from raydiff.distributed import launch, lease
from raydiff.distributed.learn import Worker
from raydiff.distributed.lease import FILE, Lease
from raydiff.distributed.ranks import Ranks, Refused
from raydiff.distributed.storage import Folder
from tests.distributed.test_whole import elsewhere

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])
BEAT, EXPIRY = 0.2, 2.0


def hold(folder: Callable[[str], Folder], where: str, at: float, told: Any) -> None:
    time.sleep(max(0.0, at - time.monotonic()))
    with Lease(folder(where), beat=BEAT, expiry=EXPIRY) as mine:
        try:
            mine.take()
        except ConfigError as error:
            told.send(str(error))
            return
        told.send(mine.token)
        told.recv()


Start = Callable[..., tuple[Any, Any]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that takes the lease of a folder: (process, connection)."""
    started = []

    def make(folder: Callable[[str], Folder] = Folder, at: float = 0.0) -> tuple[Any, Any]:
        ours, theirs = CONTEXT.Pipe()
        process = CONTEXT.Process(target=hold, args=(folder, str(tmp_path / "run"), at, theirs))
        process.start()
        started.append(process)
        return process, ours

    yield make
    for process in started:
        process.kill()
        process.join()


def take(where: Path, **fields: float) -> float:
    """Seconds until the lease was taken."""
    begun = time.monotonic()
    with Lease(Folder(where / "run"), **{"beat": BEAT, "expiry": EXPIRY} | fields) as mine:
        mine.take()
        mine.take()  # nothing more
        assert lease.holds(mine.folder, mine.token)
        lease.require(mine.folder, mine.token)
        return time.monotonic() - begun


def test_a_second_driver_is_refused_by_name_until_the_first_has_ended(start: Start, tmp_path: Path) -> None:
    process, told = start()
    told.recv()
    expected = rf"process {process.pid} on .* works on this folder.*free after 2 seconds, and at once when you delete .*{FILE}"
    with pytest.raises(ConfigError, match=expected):
        take(tmp_path)
    assert json.loads((tmp_path / "run" / FILE).read_text())["pid"] == process.pid
    told.send(None)
    process.join()
    assert not (tmp_path / "run" / FILE).exists()
    assert take(tmp_path) < 1
    assert os.listdir(tmp_path / "run") == [f".{FILE}.lock"]


def test_a_driver_that_was_killed_on_this_host_is_seen_at_once(start: Start, tmp_path: Path) -> None:
    process, told = start()
    told.recv()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert take(tmp_path, expiry=600.0) < 5


def test_a_number_that_another_process_has_now_is_not_the_holder(start: Start, tmp_path: Path) -> None:
    _, told = start()
    told.recv()
    file = tmp_path / "run" / FILE
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "pid": os.getpid(), "token": "old"}))
    assert take(tmp_path, expiry=600.0) < 5


def test_a_driver_that_hangs_is_waited_for_and_finds_out_when_it_wakes(start: Start, tmp_path: Path) -> None:
    process, told = start()
    token = told.recv()
    os.kill(process.pid, signal.SIGSTOP)
    assert take(tmp_path) > EXPIRY
    with Lease(Folder(tmp_path / "run")) as mine:
        mine.take()
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(3 * BEAT)
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* has taken this run over, and it ends here"):
            lease.require(mine.folder, token, 0.0)
        told.send(None)
        process.join()
        lease.require(mine.folder, mine.token)  # it has not taken it back, or removed it


def work(rank: int, where: str, store: str, token: str, told: Any) -> None:
    """One of two workers that look whether their driver still holds the folder, each time they are asked."""
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    worker = Worker.__new__(Worker)  # of which only these are looked at
    worker.ranks, worker.folder, worker.token = Ranks(60), Folder(where), token
    while told.recv():
        try:
            worker.require_folder()
            told.send("")
        except Refused as refused:
            told.send((refused.kind, refused.message))


def test_all_workers_end_when_another_driver_has_taken_their_run_over(tmp_path: Path) -> None:
    """Rank 0 looks, and the other must not wait for it for ever."""
    ends = []
    with Lease(Folder(tmp_path / "run")) as mine:
        mine.take()
        for rank in range(2):
            ours, theirs = CONTEXT.Pipe()
            arguments = (rank, str(tmp_path / "run"), f"file://{tmp_path}/store", mine.token, theirs)
            CONTEXT.Process(target=work, args=arguments, daemon=True).start()
            ends.append(ours)

        def asked() -> list[Any]:
            for end in ends:
                end.send(True)
            return [end.recv() for end in ends]

        assert asked() == ["", ""]
        record = json.loads((tmp_path / "run" / FILE).read_text())
        (tmp_path / "run" / FILE).write_text(json.dumps(record | {"token": "another", "pid": 4321}))
        first, second = asked()
    assert first == second
    assert (
        first[0] == "ConfigError" and "process 4321 on" in first[1] and "has taken this run over, and it ends here" in first[1]
    )
    assert isinstance(Refused(*first).error(), ConfigError)
    for end in ends:
        end.send(False)


def test_a_host_that_cannot_be_seen_is_waited_for(tmp_path: Path) -> None:
    """Its clock says nothing: only that the file does not change."""
    (tmp_path / "run").mkdir()
    file = tmp_path / "run" / FILE
    file.write_text(json.dumps({"token": "x", "host": "far", "machine": "far", "pid": 1, "started": 5, "beat": 9}))
    os.utime(file, (0, 0))
    assert take(tmp_path) > EXPIRY
    file.write_text("half of a")
    assert take(tmp_path) > EXPIRY


@pytest.mark.parametrize("folder", [Folder, elsewhere], ids=["disk", "store"])
@pytest.mark.parametrize("left", [False, True], ids=["new", "left by a dead one"])
def test_of_many_at_the_same_moment_one_gets_it(
    start: Start, tmp_path: Path, folder: Callable[[str], Folder], left: bool
) -> None:
    if left:
        process, told = start(folder)
        told.recv()
        process.kill()
        process.join()
    at = time.monotonic() + 1.5
    ends = [start(folder, at)[1] for _ in range(4)]  # kept: one that is closed ends its process
    answers = [told.recv() for told in ends]
    refused = [text for text in answers if "works on this folder" in text]
    assert len(refused) == 3, answers
    token = next(text for text in answers if text not in refused)
    time.sleep(2 * BEAT)
    assert lease.holds(Folder(tmp_path / "run"), token)


def test_a_run_that_is_at_work_is_not_resumed(start: Start, tmp_path: Path, tiny_run: Callable[..., Run]) -> None:
    """Before Ray starts, and nothing in its folder changes."""
    run = tiny_run(changes={"storage": str(tmp_path)})
    Folder(tmp_path / "run").write("run.json", run.model_dump_json().encode())
    process, told = start()
    told.recv()
    with pytest.raises(ConfigError, match=rf"process {process.pid} on .* works on this folder"):
        launch.train(run, resume="run")
    assert sorted(os.listdir(tmp_path / "run")) == [f".{FILE}.lock", FILE, "run.json"]
    import ray

    assert not ray.is_initialized()


def test_a_full_or_vanished_storage_does_not_end_the_holder(start: Start, tmp_path: Path) -> None:
    """A beat that cannot be written is followed by another."""
    process, told = start()
    token = told.recv()
    (tmp_path / "run").rename(tmp_path / "away")
    time.sleep(3 * BEAT)
    assert process.is_alive() and not (tmp_path / "run").exists()
    told.send(None)
    process.join()
    assert process.exitcode == 0 and lease.holds(Folder(tmp_path / "away"), token)
