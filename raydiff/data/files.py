"""Files by path or URI, on any filesystem that pyarrow knows: a local or shared disk, S3, GCS, HDFS."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any


def locate(uri: str | Path) -> tuple[str, Any, str]:
    """(the URI or absolute path, its pyarrow filesystem, the path inside it)."""
    from pyarrow import fs

    if isinstance(uri, str) and "://" in uri:
        return (uri, *fs.FileSystem.from_uri(uri))
    path = str(Path(uri).expanduser().resolve())
    return path, fs.LocalFileSystem(), path


def parquet_files(uri: str | Path, field: str) -> tuple[Any, list[Any]]:
    """(filesystem, its FileInfos by name) of a Parquet file, or of all below a folder but those that "_" or "." hides.

    Raises FileNotFoundError, naming `field`, when there is none.
    """
    from pyarrow import fs

    _, system, root = locate(uri)
    info = system.get_file_info(root)
    if info.is_file:
        return system, [info]
    found = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = [f for f in found if f.is_file and f.extension == "parquet" and not _hidden(f.path[len(root) :])]
    if not files:
        raise FileNotFoundError(f"{field} = {str(uri)!r}: there is no Parquet file; give one, or a folder of them")
    return system, sorted(files, key=lambda f: f.path)


def _hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in PurePosixPath(path).parts)
