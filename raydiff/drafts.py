"""Files and folders of a local or shared disk that are never seen half: written as a draft beside, then renamed.

A draft's name starts with "." and says which process writes it, so that no two share one, and what dead ones left is known.
"""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ENDING = ".draft"
# Containers of one host name may number their processes apart
_HOST = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname() + os.path.realpath("/proc/self/ns/pid").rpartition("pid:")[2])
_WRITER = re.compile(rf"\..+\.(?P<host>[A-Za-z0-9-]+)_(?P<pid>\d+)_[0-9a-f]+{re.escape(ENDING)}")
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of renameat2(2)
_OLD = 24 * 3600.0  # seconds after which a draft of another host, whose processes cannot be seen, is taken for left


def name(of: str) -> str:
    """The name of a draft that no other writer has."""
    return f".{of}.{_HOST}_{os.getpid()}_{secrets.token_hex(8)}{ENDING}"


def is_left(draft: str, changed: float) -> bool:
    """Whether a file or folder, `changed` at this Unix time, is a draft whose writer is gone."""
    if not draft.endswith(ENDING):
        return False
    writer = _WRITER.fullmatch(draft)
    if writer and writer["host"] == _HOST:
        return not alive(int(writer["pid"]))
    return time.time() - changed > _OLD


def alive(pid: int) -> bool:
    """Whether this host has a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` at the end, and is gone after a fault."""
    draft = file.with_name(name(file.name))
    try:
        yield draft
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def create(file: Path, data: bytes) -> bool:
    """Write a new file, whole from its first moment. Returns False, and writes nothing, when there is one already."""
    draft = file.with_name(name(file.name))
    try:
        draft.write_bytes(data)
        try:
            os.link(draft, file)
        except PermissionError:  # a filesystem without links
            with file.open("xb") as stream:
                stream.write(data)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


@contextmanager
def replacing_folder(folder: Path, last: str) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of `folder` at the end, and is gone after a fault.

    Who dies over it leaves the old folder or the new one; where two cannot be exchanged, between two renames, none. A folder
    that holds other files beside keeps them, and one that is mounted, or the working directory, stays itself: then each file is
    replaced by itself, the file `last`, which vouches for the others, being gone before and coming after them.
    """
    folder = folder.resolve()
    beside = not folder.exists() or _may_move(folder)
    draft, old = ((folder.parent if beside else folder) / name(folder.name) for _ in range(2))
    draft.mkdir(parents=True)
    try:
        yield draft
        if beside and not (folder.is_dir() and _names(folder) - _names(draft)):
            _swap(draft, folder, old)
        else:
            _replace_each(draft, folder, last)
    finally:
        for left in (draft, old):
            shutil.rmtree(left, ignore_errors=True)


def _may_move(folder: Path) -> bool:
    return not folder.is_mount() and folder != Path.cwd() and os.access(folder.parent, os.W_OK)


def _swap(draft: Path, folder: Path, old: Path) -> None:
    if folder.is_dir() and _exchanged(draft, folder):
        return
    if folder.is_dir():
        os.rename(folder, old)
    try:
        os.rename(draft, folder)
    except OSError:
        if old.is_dir():
            os.rename(old, folder)
        raise


def _exchanged(a: Path, b: Path) -> bool:
    """Give each of two paths what the other names, in one step. Returns False where that cannot be: only Linux can, on most of
    its filesystems."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    return call is not None and call(_HERE, os.fsencode(a), _HERE, os.fsencode(b), _EXCHANGE) == 0


def _replace_each(draft: Path, folder: Path, last: str) -> None:
    (folder / last).unlink(missing_ok=True)
    files = [file.relative_to(draft) for file in draft.rglob("*") if file.is_file()]
    for file in sorted(files, key=lambda file: (str(file) == last, file)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft / file, folder / file)


def clear(folder: Path) -> None:
    """Delete the drafts right below a folder whose writers are gone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.endswith(ENDING) and is_left(path.name, path.lstat().st_mtime):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
