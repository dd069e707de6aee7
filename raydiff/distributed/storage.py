"""A run's folder on any filesystem that pyarrow writes to: a local or shared disk, S3, GCS, HDFS."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path, PurePosixPath
from typing import Any, Concatenate, ParamSpec, TypeVar

from pyarrow import fs as pafs
from tenacity import Retrying, before_sleep_log, retry_if_exception, stop_after_delay, wait_random_exponential

from raydiff import drafts
from raydiff.data.files import locate

P = ParamSpec("P")
T = TypeVar("T")
PATIENCE = 600.0  # seconds that a run waits for a storage that is away
_log = logging.getLogger(__name__)

_PART = 2**22  # bytes read at once for a digest
# Object stores show an object when it is whole; to move one would copy it.
_ALL_AT_ONCE = tuple(
    getattr(pafs, name) for name in ("S3FileSystem", "GcsFileSystem", "AzureFileSystem") if hasattr(pafs, name)
)


class StorageError(OSError):
    """The storage cannot be written; names the folder and, on a disk, the free space."""


# What may pass: how a shared disk, and the clients of S3, GCS and Azure inside pyarrow, say that nobody answered.
_AWAY_CODES = {
    errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.EPIPE,
}  # fmt: skip
_AWAY_WORDS = re.compile(
    r"NETWORK_CONNECTION|SERVICE_UNAVAILABLE|SLOW_DOWN|THROTTLING|INTERNAL_FAILURE|REQUEST_TIMEOUT|curlCode|HTTP status 5\d\d"
    r"|UNAVAILABLE|DEADLINE_EXCEEDED|ServerBusy|OperationTimedOut"
)
_REFUSED = re.compile(r"ACCESS_DENIED|PERMISSION_DENIED|UNAUTHENTICATED|NO_CREDENTIALS|HTTP status 40[13]")


def away(error: BaseException) -> bool:
    """Whether the storage did not answer, which may pass; a full disk, a missing bucket and a refusal do not."""
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
        return False
    return error.errno in _AWAY_CODES or (error.errno is None and bool(_AWAY_WORDS.search(str(error))))


def _patiently(operation: Callable[Concatenate[Folder, P], T]) -> Callable[Concatenate[Folder, P], T]:
    """A method that is tried again, ever more rarely, while the storage is away; all of them may be done twice."""

    @wraps(operation)
    def tried(self: Folder, *args: P.args, **kwargs: P.kwargs) -> T:
        for attempt in Retrying(
            retry=retry_if_exception(away),
            stop=stop_after_delay(self.patience),
            wait=wait_random_exponential(multiplier=1, max=30),
            before_sleep=before_sleep_log(_log, logging.WARNING),
            reraise=True,
        ):
            with attempt:
                return operation(self, *args, **kwargs)
        raise AssertionError("unreachable")

    return tried


class Folder:
    """A folder by path or URI. Paths inside are relative, with slashes; writing makes what is missing above.

    `patience`: seconds that an operation waits for a storage that is away.
    """

    def __init__(self, uri: str | Path, patience: float = 0.0) -> None:
        self.patience = patience
        self.uri, self.fs, self.root = locate(uri)

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.uri.rstrip('/')}/{name}", self.patience)

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        return PurePosixPath(self.root).name

    @property
    def local(self) -> Path | None:
        """The folder as a path of this machine's filesystem, if it is one."""
        return Path(self.root) if isinstance(self.fs, pafs.LocalFileSystem) else None

    @contextmanager
    def open(self, path: str) -> Iterator[Any]:
        """A stream to write a file to. The file is never seen half: it is there when the block has ended without a fault."""
        final = PurePosixPath(f"{self.root}/{path}")
        written = final if isinstance(self.fs, _ALL_AT_ONCE) else final.with_name(drafts.name(final.name))
        try:
            self.fs.create_dir(str(final.parent), recursive=True)
            with self.fs.open_output_stream(str(written)) as stream:
                yield stream
            if written != final:
                self.fs.move(str(written), str(final))
        except BaseException:
            if written != final:
                with suppress(OSError):
                    self.fs.delete_file(str(written))
            raise

    @_patiently
    def write(self, path: str, data: bytes) -> None:
        """Write a file that is never seen half, even by who dies over it.

        Raises StorageError when the disk is full or the folder cannot be written; what was there is then still there.
        """
        try:
            with self.open(path) as stream:
                stream.write(data)
        except OSError as error:
            raise self._failed(path, len(data), error) from error

    def write_json(self, path: str, value: Any) -> None:
        self.write(path, json.dumps(value, indent=1).encode())

    @_patiently
    def upload(self, folder: Path, path: str, last: str = "") -> None:
        """Make `path` hold the files of a local folder; `last`, where it is named, vouches for the others.

        A local folder is replaced as a whole. Elsewhere each file is, and `last` is gone before them and comes after them.
        Raises StorageError.
        """
        files = [file for file in folder.rglob("*") if file.is_file()]
        if self.local is not None:
            try:
                with drafts.replacing_folder(self.local / path, last) as draft:
                    for file in files:
                        copy = draft / file.relative_to(folder)
                        copy.parent.mkdir(parents=True, exist_ok=True)
                        shutil.copyfile(file, copy)
            except OSError as error:
                raise self._failed(path, sum(file.stat().st_size for file in files), error) from error
            return
        if last:
            self.remove(f"{path}/{last}")
        for file in sorted(files, key=lambda file: (file == folder / last, file)):
            self.write(f"{path}/{file.relative_to(folder).as_posix()}", file.read_bytes())

    @_patiently
    def read(self, path: str) -> bytes:
        """Raises FileNotFoundError."""
        with self.fs.open_input_stream(f"{self.root}/{path}") as stream:
            return bytes(stream.read())

    def read_json(self, path: str) -> Any:
        return json.loads(self.read(path))

    def json_or_none(self, path: str) -> Any:
        """What a JSON file says; None when there is none, or it is broken."""
        try:
            return self.read_json(path)
        except (FileNotFoundError, ValueError):
            return None

    @_patiently
    def sha256(self, path: str) -> str:
        """Of a file's bytes, which are not held at once. Raises FileNotFoundError."""
        with self.fs.open_input_stream(f"{self.root}/{path}") as stream:
            digest = hashlib.sha256()
            while part := stream.read(_PART):
                digest.update(part)
        return digest.hexdigest()

    @_patiently
    def size(self, path: str) -> int | None:
        """Bytes of a file, None when there is no such file."""
        info = self.fs.get_file_info(f"{self.root}/{path}")
        return info.size if info.is_file else None

    @_patiently
    def files(self, path: str = "") -> list[str]:
        """Names of the files right below `path`, sorted; [] when there is no such folder."""
        found = self.fs.get_file_info(pafs.FileSelector(f"{self.root}/{path}".rstrip("/"), allow_not_found=True))
        return sorted(info.base_name for info in found if info.is_file)

    @_patiently
    def folders(self) -> list[str]:
        """Names of the folders right below, sorted."""
        found = self.fs.get_file_info(pafs.FileSelector(self.root, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == pafs.FileType.Directory)

    @_patiently
    def exists(self) -> bool:
        return self.fs.get_file_info(self.root).type == pafs.FileType.Directory

    def is_file(self) -> bool:
        return bool(self.fs.get_file_info(self.root).is_file)

    @_patiently
    def clear_drafts(self, path: str = "") -> None:
        """Delete what writers that are gone left right below `path`."""
        found = self.fs.get_file_info(pafs.FileSelector(f"{self.root}/{path}".rstrip("/"), allow_not_found=True))
        for info in found:
            if drafts.is_left(info.base_name, (info.mtime_ns or 0) / 1e9):
                with suppress(FileNotFoundError):
                    self.fs.delete_file(info.path) if info.is_file else self.fs.delete_dir(info.path)

    @_patiently
    def remove(self, path: str) -> None:
        """Delete a file, if it is there."""
        with suppress(FileNotFoundError):
            self.fs.delete_file(f"{self.root}/{path}")

    @_patiently
    def delete(self, name: str) -> None:
        """Delete a folder below, if it is there."""
        if (self / name).exists():
            self.fs.delete_dir(f"{self.root}/{name}")

    def check_writable(self) -> None:
        """Raises StorageError."""
        probe = f".writable_{secrets.token_hex(8)}"  # others may ask at the same moment
        self.write(probe, b"?")
        try:
            self.fs.delete_file(f"{self.root}/{probe}")
        except OSError as error:
            raise self._failed(probe, 0, error) from error

    def _failed(self, path: str, size: int, error: OSError) -> StorageError:
        free = "; credentials come from the environment alone, see docs/clusters.md" if _REFUSED.search(str(error)) else ""
        if self.local is not None:
            above = next(folder for folder in (self.local, *self.local.parents) if folder.exists())
            free = f"; {_mib(shutil.disk_usage(above).free)} are free there"
        # With its number, by which `away` knows it
        return StorageError(error.errno, f"cannot write {path} ({_mib(size)}) in {self.uri}: {error}{free}")


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
