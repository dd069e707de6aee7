"""Who writes to a folder: one process at a time, by a file in it that only the living keep fresh.

The holder counts up `beat` in the file every few seconds. Who comes later and finds the count unchanged for `EXPIRY` seconds of
its own clock takes the folder over; clocks of two hosts are never compared. On the same host a process that is gone is seen at
once. A holder that was stopped or cut off, and comes back, finds another's token in the file: `require` tells its workers so.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from raydiff import drafts
from raydiff.config import ConfigError

if TYPE_CHECKING:
    from raydiff.distributed.storage import Folder

FILE = "lease.json"
DATASET = "_raydiff"  # where a dataset says what it is, and pictures say who draws them
BEAT, EXPIRY = 10.0, 60.0  # seconds
_SETTLE = 3.0  # seconds after which a claim is read back where nothing can be locked
_LOCK = 5.0  # seconds that a lock is waited for: its holder may have been stopped


class Lease:
    """A folder's lease, held between `take` and the end of the `with` block."""

    def __init__(self, folder: Folder | Disk, path: str = FILE, *, beat: float = BEAT, expiry: float = EXPIRY) -> None:
        self.folder, self.path, self.beat, self.expiry = copy(folder), path, beat, expiry
        self.folder.patience = 0.0  # a beat that fails is followed by another
        self.token = secrets.token_hex(16)
        self._over, self._thread = threading.Event(), threading.Thread(target=self._keep, daemon=True, name="raydiff-lease")

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._thread.is_alive():
            return
        self._over.set()
        self._thread.join()
        with suppress(OSError), self._locked():  # else it expires
            if holds(self.folder, self.token, self.path):
                self.folder.remove(self.path)

    def take(self) -> None:
        """Hold the folder from now on; nothing happens when that is so. Raises ConfigError, naming who holds it."""
        if self._thread.is_alive():
            return
        before = _read(self.folder, self.path)
        if before is not None:
            self._wait_until_dead(before)
        if self.folder.local is not None:
            (self.folder.local / self.path).parent.mkdir(parents=True, exist_ok=True)
        with self._locked() as sure:
            if (now := _read(self.folder, self.path)) not in (None, before):
                raise self._refused(now)
            self.folder.write_json(self.path, self._record(0))
        if not sure:
            time.sleep(_SETTLE)  # another may have seen the same, and have written after us
        if not holds(self.folder, self.token, self.path):
            raise self._refused(_read(self.folder, self.path))
        self._thread.start()

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        """Inside, no other process looks at the file and changes it. Yields whether that is sure: only disks lock."""
        if self.folder.local is None:
            yield False
            return
        file = self.folder.local / self.path
        with file.with_name(f".{file.name}.lock").open("w") as lock:
            yield _flock(lock)

    def _record(self, beat: int) -> dict[str, Any]:
        pid, host = os.getpid(), socket.gethostname()
        return {
            "token": self.token, "host": host, "machine": _machine(), "pid": pid, "started": _started(pid), "beat": beat,
        }  # fmt: skip

    def _keep(self) -> None:
        beat = 0
        while not self._over.wait(self.beat):
            beat += 1
            with suppress(OSError), self._locked():  # the storage is away, or full: the next beat tries again
                if not holds(self.folder, self.token, self.path):
                    return  # taken over
                self.folder.write_json(self.path, self._record(beat))

    def _wait_until_dead(self, before: dict[str, Any]) -> None:
        """Return when the holder is gone, or has not moved for `expiry` seconds. Raises ConfigError when it moves."""
        end = time.monotonic() + self.expiry
        if not _gone(before):
            print(f"{self.folder}: looking whether {_named(before)} still works on it, up to {self.expiry:g} seconds")
        while not _gone(before) and time.monotonic() < end:
            time.sleep(min(1.0, self.beat / 4))
            now = _read(self.folder, self.path)
            if now is None:
                return  # released
            if now != before:
                raise self._refused(now)

    def _refused(self, holder: dict[str, Any] | None) -> ConfigError:
        return ConfigError(
            f"{self.folder}: {_named(holder)} works on this folder, and a second run would damage it. Stop that run first. If"
            f" it is gone or hangs, the folder is free after {self.expiry:g} seconds, and at once when you delete"
            f" {self.folder}/{self.path}"
        )


class Disk:
    """A folder of this machine as a lease needs it, for those who have no pyarrow."""

    def __init__(self, local: Path) -> None:
        self.local, self.patience = local, 0.0

    def __str__(self) -> str:
        return str(self.local)

    def read(self, path: str) -> bytes:
        return (self.local / path).read_bytes()

    def write_json(self, path: str, value: Any) -> None:
        with drafts.replacing(self.local / path) as draft:
            draft.write_text(json.dumps(value, indent=1))

    def remove(self, path: str) -> None:
        (self.local / path).unlink(missing_ok=True)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside, this process alone writes to a folder that is no dataset of a batch tool: against each of these too.

    Raises ConfigError, naming who holds it, and for a dataset.
    """
    if (folder / DATASET / "dataset.json").exists():
        raise ConfigError(f"--to {folder}: holds a dataset that was made on Ray; give another folder")
    with Lease(Disk(folder), f"{DATASET}/{FILE}") as mine:
        mine.take()
        yield


def holds(folder: Folder | Disk, token: str, path: str = FILE) -> bool:
    """Whether the lease of a folder is still this token's."""
    found = _read(folder, path)
    return found is not None and found.get("token") == token


def abandoned(folders: Sequence[Folder], patience: float = EXPIRY) -> list[Folder]:
    """Those that nobody works on: without a lease, or with that of a process of this machine that has ended; and after
    `patience` seconds, if need be, those whose lease is of another machine and has not moved meanwhile."""
    before = [(folder, _read(folder, FILE)) for folder in folders]
    found = [folder for folder, record in before if record is None or _gone(record)]
    others = [(f, record) for f, record in before if record is not None and record.get("machine") != _machine()]
    if others:
        time.sleep(patience)
    return found + [folder for folder, record in others if _read(folder, FILE) in (None, record)]


def require(folder: Folder, token: str, patience: float = 2 * BEAT) -> None:
    """Raise ConfigError when another process has taken a run's folder over, and that is still seen `patience` seconds later: a
    shared disk may show another host an old file for a while."""
    end = time.monotonic() + patience
    while not holds(folder, token):
        if time.monotonic() >= end:
            raise ConfigError(f"{folder}: {_named(_read(folder, FILE))} has taken this run over, and it ends here")
        time.sleep(1)


def _flock(file: IO[str]) -> bool:
    """Lock a file until it is closed, or its process is gone. Returns False where that cannot be."""
    end = time.monotonic() + _LOCK
    while time.monotonic() < end:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            return False
    return False


def _read(folder: Folder | Disk, path: str) -> dict[str, Any] | None:
    """None when there is no lease; a broken one is somebody's."""
    try:
        found = json.loads(folder.read(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _named(holder: dict[str, Any] | None) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder and "pid" in holder else "another process"


def _gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended."""
    return holder.get("machine") == _machine() and _started(int(holder["pid"])) != holder["started"]


def _machine() -> str:
    """This machine since it was booted, and the set of processes in which a number is unique."""
    try:
        booted = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {booted} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {secrets.token_hex(8)}"  # not Linux: no other process is known, and all wait


def _started(pid: int) -> int | None:
    """When a process started, in ticks since the boot; None when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
