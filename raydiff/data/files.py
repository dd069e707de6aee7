"""Files by path or URI, on any filesystem that pyarrow knows: a local or shared disk, S3, GCS, HDFS; and a dataset's splits.

Hugging Face's data folders hold the splits of a dataset side by side, told by their names alone: default/test/0000.parquet,
data/train-00000-of-00004.parquet, validation.parquet. Read as one they mix what a split keeps apart: that has to be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from raydiff import credentials

File = TypeVar("File")

ALL = "all"  # the split that is every one of them
_NUMBERED = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_WORDS, key=len, reverse=True))})(_unique)?(?![a-z])")


def locate(uri: str | Path, field: str = "a folder") -> tuple[str, Any, str]:
    """(the URI or absolute path, its pyarrow filesystem, the path inside it). Raises ValueError, naming `field`, for a URI with
    credentials."""
    from pyarrow import fs

    credentials.refuse(uri, field)
    if isinstance(uri, str) and "://" in uri:
        return (uri, *fs.FileSystem.from_uri(uri))
    path = str(Path(uri).expanduser().resolve())
    return path, fs.LocalFileSystem(), path


def parquet_files(
    uri: str | Path, field: str, split: str | None = None, option: str | None = "--split"
) -> tuple[Any, list[Any]]:
    """(filesystem, its FileInfos by name) of a Parquet file, or of all below a folder but those that "_" or "." hides.

    Raises FileNotFoundError, naming `field`, when there is none, and as `of_split`.
    """
    system, found = listed(uri, field)
    chosen = of_split(found, split, f"{field} = {str(uri)!r}", option, lambda file: _rows(system, file))
    return system, chosen


def listed(uri: str | Path, field: str) -> tuple[Any, list[tuple[Any, str]]]:
    """(filesystem, its FileInfos, each with its split's name), of all splits. Raises FileNotFoundError when there is none."""
    from pyarrow import fs

    _, system, root = locate(uri, field)
    info = system.get_file_info(root)
    if info.is_file:
        return system, [(info, split_of(info.path, str(PurePosixPath(root).parent)))]
    found = system.get_file_info(fs.FileSelector(root, recursive=True, allow_not_found=True))
    files = [f for f in found if f.is_file and f.extension == "parquet" and not _hidden(f.path[len(root) :])]
    if not files:
        raise FileNotFoundError(f"{field} = {str(uri)!r}: there is no Parquet file; give one, or a folder of them")
    return system, [(file, split_of(file.path, root)) for file in sorted(files, key=lambda f: f.path)]


def split_of(file: str, root: str) -> str:
    """The split that a file's path below `root` names, by the rules of Hugging Face's `datasets`; "" when it names none."""
    path = PurePosixPath(file)
    folders = path.relative_to(root).parent.parts
    if numbered := _NUMBERED.match(path.name):
        return numbered[1]
    if re.fullmatch(r"\d{4}", path.stem):  # CONFIG/SPLIT/0000.parquet, as Hugging Face converts
        if folders:
            return folders[-1].removeprefix("partial-")
        folders = (path.parent.name,)
    for part in reversed((*folders, path.stem)):
        if word := _WORD.search(part.lower()):
            return _WORDS[word[1]] + (word[2] or "")
    return ""


def of_split(
    files: Sequence[tuple[File, str]], split: str | None, where: str, option: str | None, rows: Callable[[File], int]
) -> list[File]:
    """Of (file, its split) those of the split that is asked for, "all" for every one.

    Raises ValueError with the rows of each split, as `rows` counts them, when there are several and none is asked for, and
    when there is no such split. `option` is what asks for it; None: there is nothing that does.
    """
    names = sorted({name for _, name in files})
    if split is None and len(names) > 1:
        way = f"{option} NAME takes one, {option} {ALL} all" if option else "give one split's files in a folder of their own"
        if option and "." in option:
            way = f"{option} = NAME takes one, {ALL!r} all"
        raise ValueError(f"{where} holds several splits of a dataset ({told(count(files, rows))}): {way}")
    if split not in (None, ALL, *names):
        raise ValueError(f"{option} {split}: {where} has no such split; there are {told(count(files, rows))}")
    return [file for file, name in files if split in (None, ALL, name)]


def rows_by_split(uri: str | Path, field: str) -> dict[str, int]:
    """Rows of each split that is named; {} when none is."""
    system, found = listed(uri, field)
    return count(found, lambda file: _rows(system, file)) if any(name for _, name in found) else {}


def count(files: Iterable[tuple[File, str]], rows: Callable[[File], int]) -> dict[str, int]:
    """Rows of each split."""
    found = sorted(files, key=lambda file: file[1])
    with ThreadPoolExecutor(16) as threads:
        numbers = list(threads.map(rows, [file for file, _ in found]))
    total = dict.fromkeys((name for _, name in found), 0)
    for (_, name), number in zip(found, numbers, strict=True):
        total[name] += number
    return total


def told(rows: dict[str, int]) -> str:
    """Rows by split, as a message says them."""
    return ", ".join(f"{name or 'no name'} {number} rows" for name, number in rows.items())


def opened(file: Any, name: str, **options: Any) -> Any:
    """A pyarrow ParquetFile. Raises ValueError, with the name, when it is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file, **options)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{name}: is no Parquet file: {error}") from None


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is text, dictionary-encoded or not."""
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_bytes(kind: Any) -> bool:
    """Whether an Arrow type is bytes, or Hugging Face's struct of an image file, {bytes, path}."""
    import pyarrow.types as types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _rows(system: Any, file: Any) -> int:
    with system.open_input_file(file.path) as stream:
        return int(opened(stream, file.path).metadata.num_rows)


def _hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) for part in PurePosixPath(path).parts)
