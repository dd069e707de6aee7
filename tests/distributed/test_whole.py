"""Whatever a kill or a full disk interrupts, the files that are there are whole and belong together."""

import json
import multiprocessing
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import fs

from raydiff import drafts
from raydiff.config import ConfigError, Run
from raydiff.core.policy import Calls
from raydiff.distributed import checkpoint, run_folder
from raydiff.distributed.storage import Folder, StorageError

MakeRun = Callable[..., Run]
WEIGHTS, BEST = ("unet/1.bin", "unet/2.bin"), "best.json"
SIZE = 200_000


def elsewhere(path: str) -> Folder:
    """A folder that is not of this machine to raydiff: files are replaced one by one."""
    folder = Folder(path)
    folder.fs = fs.SubTreeFileSystem("/", fs.LocalFileSystem())
    return folder


def fill(folder: Path, n: int) -> None:
    (folder / "unet").mkdir(exist_ok=True)
    for name in WEIGHTS:
        (folder / name).write_bytes(bytes([n % 256]) * SIZE)
    (folder / BEST).write_text(json.dumps({"step": n % 256}))


def write_json(where: str, n: int) -> None:
    Folder(where).write_json("run.json", {"step": n, "text": "x" * SIZE})


def upload(where: str, n: int) -> None:
    Folder(where).upload(Path(where) / "scratch", "adapter_best", BEST)


def upload_elsewhere(where: str, n: int) -> None:
    elsewhere(where).upload(Path(where) / "scratch", "adapter_best", BEST)


def export(where: str, n: int) -> None:
    """As `fit` without Ray does."""
    with drafts.replacing_folder(Path(where) / "adapter_best", BEST) as draft:
        fill(draft, n)


def loop(write: Callable[[str, int], None], where: str, started: Any) -> None:
    started.send(None)
    n = 0
    while True:
        n += 1
        fill(Path(where) / "scratch", n)
        write(where, n)


def check_json(where: Path) -> bool:
    file = where / "run.json"
    if file.exists():
        assert len(json.loads(file.read_text())["text"]) == SIZE
    return file.exists()


def check_adapter(where: Path) -> bool:
    """Weights that best.json vouches for are its own; each file is whole."""
    found = [(where / "adapter_best" / name).read_bytes() for name in WEIGHTS if (where / "adapter_best" / name).exists()]
    assert all(data == data[:1] * SIZE for data in found)
    best = where / "adapter_best" / BEST
    if best.exists():
        assert [data[0] for data in found] == [json.loads(best.read_text())["step"]] * 2
    return best.exists()


def killed(write: Callable[[str, int], None], where: Path, times: int) -> Iterator[None]:
    """After each of so many kills of a process that writes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    draw = random.Random(write.__name__)
    (where / "scratch").mkdir()
    for _ in range(times):
        listener, started = context.Pipe(duplex=False)
        process = context.Process(target=loop, args=(write, str(where), started))
        process.start()
        listener.recv()
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.join()
        yield
        for part in ("", "adapter_best", "adapter_best/unet"):
            Folder(where).clear_drafts(part)
        assert not list(where.rglob("*.draft"))


@pytest.mark.parametrize("write", [write_json, upload, upload_elsewhere, export])
def test_a_kill_at_any_instant_leaves_what_is_whole(tmp_path: Path, write: Callable[[str, int], None]) -> None:
    check = check_json if write is write_json else check_adapter
    there = 0
    for _ in killed(write, tmp_path, 60):
        there += check(tmp_path)
        if write in (upload, export) and (tmp_path / "adapter_best").exists():
            assert (tmp_path / "adapter_best" / BEST).exists()  # a folder that is replaced as a whole is never in between
    assert there > 5


def test_a_folder_that_holds_more_keeps_it(tmp_path: Path) -> None:
    """As when `fit` without Ray is given a folder of the user's."""
    (tmp_path / "adapter_best").mkdir()
    (tmp_path / "adapter_best" / "notes.txt").write_text("mine")
    there = sum(check_adapter(tmp_path) for _ in killed(export, tmp_path, 20))
    assert there and (tmp_path / "adapter_best" / "notes.txt").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two folders")
@pytest.mark.parametrize("write", [upload, export])
def test_a_folder_that_is_replaced_is_never_missing(tmp_path: Path, write: Callable[[str, int], None]) -> None:
    """Watched all the time, by its name, while it is replaced again and again."""
    (tmp_path / "scratch").mkdir()
    fill(tmp_path / "scratch", 0)
    write(str(tmp_path), 0)
    context = multiprocessing.get_context("forkserver")
    listener, started = context.Pipe(duplex=False)
    process = context.Process(target=loop, args=(write, str(tmp_path), started))
    process.start()
    listener.recv()
    folder, seen, missing, end = str(tmp_path / "adapter_best"), set(), 0, time.monotonic() + 3
    while time.monotonic() < end:
        try:
            seen.add(os.stat(folder).st_mtime_ns)
        except FileNotFoundError:
            missing += 1
    process.kill()
    process.join()
    assert missing == 0 and len(seen) > 10


@pytest.mark.parametrize("write", [write_json, upload, upload_elsewhere, export])
def test_a_full_disk_leaves_what_was_there_and_no_draft(tmp_path: Path, write: Callable[[str, int], None]) -> None:
    """A limit on the size of a file answers as a full disk does, by another number."""
    (tmp_path / "scratch").mkdir()
    fill(tmp_path / "scratch", 1)
    write(str(tmp_path), 1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "scratch" not in path.parts}
    fill(tmp_path / "scratch", 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write(str(tmp_path), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert write is export or isinstance(caught.value, StorageError)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and "scratch" not in path.parts}
    if write is upload_elsewhere:  # its weights are whole, but nothing vouches for them
        before = {path: data for path, data in before.items() if path.name != BEST}
    assert after == before


@pytest.mark.parametrize("kind", ["link", "working directory"])
def test_a_folder_that_cannot_be_moved_stays_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    if kind == "working directory":
        monkeypatch.chdir(real)
    for n in (1, 2):
        with drafts.replacing_folder(tmp_path / "link" if kind == "link" else Path("."), BEST) as draft:
            fill(draft, n)
        assert (tmp_path / "link").is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "real"]
        assert sorted(os.listdir(real if kind == "link" else ".")) == [BEST, "unet"]
        assert json.loads((real / BEST).read_text()) == {"step": n}


def test_drafts_of_the_living_and_of_others_are_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / drafts.name("run.json")
    dead = tmp_path / mine.name.replace(f"_{os.getpid()}_", f"_{2**22 + 1}_")  # above the kernel's highest number
    other, old = (tmp_path / f".x.elsewhere_{pid}_0123456789abcdef.draft" for pid in (1, 2))
    folder = tmp_path / dead.name.replace("run.json", "adapter")
    folder.mkdir()
    (folder / "weights").write_text("")
    for path in (mine, dead, other, old, tmp_path / "not.a.draft"):
        path.write_text("")
    os.utime(old, (0, 0))
    Folder(tmp_path).clear_drafts()
    assert sorted(tmp_path.iterdir()) == sorted([mine, other, tmp_path / "not.a.draft"])
    assert drafts.name("x") != drafts.name("x")


@pytest.mark.parametrize("text", ["", '{"model": {', None], ids=["empty", "half", "missing"])
def test_a_broken_run_json_is_read_from_the_newest_checkpoint(tiny_run: MakeRun, tmp_path: Path, text: str | None) -> None:
    run = tiny_run(changes={"storage": str(tmp_path)})
    folder = Folder(tmp_path / "started")
    tensors = [(kind, {"w": torch.ones(2)}) for kind in ("parameters", "exp_avg", "exp_avg_sq")]
    checkpoint.save(folder, tensors, run=run, next_step=1, calls=Calls(), seconds=1.0, history=[{"step": 1.0}])
    if text is not None:
        (tmp_path / "started" / "run.json").write_text(text)
        (tmp_path / "started" / "finished.json").write_text(text)  # was not finished, then
        (tmp_path / "started" / "contents.json").write_text(text)
    assert run_folder.resumed(run, "started").uri == folder.uri
    assert run_folder.recorded(folder) is None
    with pytest.raises(ConfigError, match="seed: 0 then, 1 now"):
        run_folder.resumed(tiny_run(changes={"storage": str(tmp_path), "seed": 1}), "started")
    folder.delete("checkpoint_000001")
    with pytest.raises(ConfigError, match="no run was started"):
        run_folder.resumed(run, "started")
