"""What the files behind a run's fields hold: a SHA-256 for each, by the field's dotted path.

A run names its files by path, and reads them again whenever a process starts. So a run that starts writes down what they hold,
in contents.json beside run.json; whoever goes on with it, and each process that has loaded its share, compares.
Standard library and the config only, until a prompts file or a dataset of pairs is read.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from raydiff import __version__
from raydiff.config import ConfigError, PluginConfig, Run

if TYPE_CHECKING:
    from raydiff.session import Session

FILE, MISSING = "contents.json", "missing"
Location = Path | str
"""A file or a folder; or, as a string, a hub id: "owner/name" or "owner/name@revision"."""

_OTHER_WEIGHTS = {".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx"}  # not read where there are safetensors
_SETTLED = 2.0  # seconds after a change until a file's times tell the next one apart
_INSTALLED = ("site-packages", "dist-packages")

_seen: dict[str, tuple[str, str]] = {}
"""Of a file, by its absolute path: its stamp, and the digest that it had then. Gigabytes are read once."""


@dataclass(frozen=True)
class Contents:
    """What the files of a run held, and the version of raydiff that said so."""

    digests: dict[str, str]
    raydiff: str = __version__
    seen: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, run: Run) -> Contents:
        """As the files are now, as far as a process that loads nothing can tell.

        Left to who loads them are hub ids, of which another node may hold another snapshot, files that are not on this machine,
        and plugins with a runtime_env.
        """
        return cls.with_seen(digests(run, loaded=False))

    @classmethod
    def with_seen(cls, digests: dict[str, str]) -> Contents:
        """With what this process has read, so that another one need not."""
        return cls(digests, seen=dict(_seen))

    def dump(self) -> str:
        return json.dumps({"raydiff": self.raydiff, "digests": self.digests, "seen": self.seen}, indent=1)

    @classmethod
    def load(cls, text: str | bytes) -> Contents:
        """What `dump` gave. A file that has not changed since need not be read again here."""
        tree = json.loads(text)
        seen = {path: (str(stamp), str(digest)) for path, (stamp, digest) in tree["seen"].items()}
        _seen.update(seen)
        return cls(tree["digests"], tree["raydiff"], seen)

    def joined(self, found: Mapping[str, str]) -> Contents:
        """With what others found behind fields that are unknown here."""
        return Contents({**found, **{k: d for k, d in self.digests.items() if d != MISSING}}, self.raydiff, self.seen)

    def compare(self, now: Mapping[str, str], may_change: Sequence[str] = ()) -> None:
        """Raise ConfigError, with each field and both digests, when a field that both know holds something else now; what was
        missing here was not known."""
        differ = [
            f"{name}: {before[:12]} then, {now[name][:12]} now"
            for name, before in sorted(self.digests.items())
            if now.get(name, before) != before != MISSING and not within(name, may_change)
        ]
        if differ:
            raise ConfigError(
                "files hold something else than when this was started; put them back, or start afresh:\n  "
                + "\n  ".join(differ)
            )

    def check(self, run: Run, fields: Sequence[str], prompts: Mapping[str, Sequence[str]] | None = None) -> dict[str, str]:
        """Compare what a process has just loaded: the files behind `fields`, and the prompts that it has read.

        Returns their digests. Raises ConfigError as `compare` does. After loading, what was replaced before it is seen.
        """
        now = digests(run, fields, prompts)
        self.compare(now)
        return now

    def check_session(self, session: Session, *more: str) -> dict[str, str]:
        """`check` of all that a session has loaded; `more` fields are what it has loaded since."""
        rewards = ("rewards", "evaluate.rewards") if session.scores is None else ()
        prompts = {"prompts.train": session.train_prompts, "prompts.held_out": session.held_out_prompts}
        return self.check(session.run, ("model", "method", "prompts", *rewards, *more), prompts)

    def by_place(self, run: Run) -> dict[str, str]:
        """{"FIELD = PLACE": digest}: runs that name different files in one field can share this."""
        return {
            _placed(name, where): self.digests[name]
            for name, where in located(run, loaded=False).items()
            if name in self.digests
        }

    def at_place(self, run: Run) -> Contents:
        """The run's fields, of the digests of `by_place`."""
        known = {name: self.digests.get(_placed(name, where)) for name, where in located(run, loaded=False).items()}
        return Contents({name: digest for name, digest in known.items() if digest}, self.raydiff, self.seen)


def located(run: Run, *, loaded: bool = True) -> dict[str, Location]:
    """Where what decides a run's results lies, by the field's dotted path; some folders by their parts: model.path/PART."""
    from raydiff.rewards._pretrained import located as pretrained

    rewards = {f"rewards.{name}": r for name, r in run.rewards.named.items()}
    measured = {f"evaluate.rewards.{name}": r for name, r in run.evaluate.rewards.items()}
    parts: dict[str, PluginConfig] = {"model": run.model, "method": run.method, **rewards, **measured}
    found = of_parts({path: part for path, part in parts.items() if loaded or not getattr(part, "runtime_env", None)})
    if run.evaluate.clip is not None:
        found["evaluate.clip"] = pretrained(run.evaluate.clip, embedded="clip")
    sources = {"prompts.train": run.prompts.train, "prompts.held_out": run.prompts.held_out}
    found |= {name: source for name, source in sources.items() if isinstance(source, str)}  # a list stands in the run itself
    if run.method.labelled or run.method.judged:
        found["pairs.path"] = Path(str(run.pairs.path))
    return found


def of_parts(parts: Mapping[str, PluginConfig]) -> dict[str, Location]:
    """The files of plugins, by their dotted paths."""
    return {f"{path}.{name}": where for path, part in parts.items() for name, where in part.files().items()}


def digests(
    run: Run, fields: Sequence[str] = (), prompts: Mapping[str, Sequence[str]] | None = None, *, loaded: bool = True
) -> dict[str, str]:
    """Digest of what lies behind each field, or each in the tables `fields`; `prompts` were read already, by their fields.

    A hub id has its cached snapshot's commit, and none when it is not cached. `loaded`: this process has loaded them, and can
    answer for all. Raises OSError or ValueError for what cannot be read.
    """
    from raydiff.data.prompts import read_both

    wanted = {name: where for name, where in located(run, loaded=loaded).items() if not fields or within(name, fields)}
    found: dict[str, str] = {}
    if of_prompts := [name for name in wanted if name.startswith("prompts.")]:
        prompts = prompts or dict(zip(("prompts.train", "prompts.held_out"), read_both(run.prompts), strict=True))
        for name in of_prompts:
            del wanted[name]
            found[name] = hashlib.sha256(json.dumps(list(prompts[name])).encode()).hexdigest()
    if (path := wanted.pop("pairs.path", None)) is not None:
        found["pairs.path"] = of_pairs(path, pictures=run.method.labelled)
    files = of_locations(wanted)
    if not loaded:
        files = {name: digest for name, digest in files.items() if isinstance(wanted[name], Path) and digest != MISSING}
    return found | files


def of_locations(locations: Mapping[str, Location]) -> dict[str, str]:
    """Digest of each, MISSING where there is nothing: who loads it says so better. Raises OSError for what is unreadable."""
    found = {name: of_path(where) if isinstance(where, Path) else commit(where) for name, where in locations.items()}
    return {name: digest for name, digest in found.items() if digest}


def of_path(path: Path) -> str:
    """SHA-256 of a file; of a folder, over the names and digests of its files, but for weights beside safetensors."""
    if not path.is_dir():
        return _of_file(path) if path.is_file() else MISSING
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and not _hidden(f.relative_to(path))]
    safe = {f.parent for f in files if f.suffix == ".safetensors"}
    total = hashlib.sha256()
    for file in files:
        if file.suffix not in _OTHER_WEIGHTS or file.parent not in safe:
            total.update(f"{file.relative_to(path).as_posix()} {_of_file(file)}\n".encode())
    return total.hexdigest()


def of_pairs(path: Location, *, pictures: bool = True) -> str:
    """SHA-256 of a dataset of labelled pairs: of its Parquet files, and of the `pictures` whose paths stand in them."""
    from raydiff.data.preferences import files

    total = hashlib.sha256()
    for file in files(path):
        total.update(f"{file.name} {_of_file(file)}\n".encode())
        if pictures and (named := _pictures(file)):
            total.update(_of_pictures(named, f"pictures of {file.absolute()}").encode())
    return total.hexdigest()


def _pictures(file: Path) -> list[Path]:
    """The picture files that a file of pairs names, each once, in order."""
    import pyarrow.types as types

    from raydiff.data import preferences

    there = preferences.opened(file).schema_arrow
    columns = [column.name for column in there if column.name in preferences.IMAGES]
    columns = [n for n in columns if types.is_string(kind := there.field(n).type) or types.is_large_string(kind)]
    batches = preferences.batches(file, columns) if columns else ()
    cells = (cell for _, batch in batches for name in columns for cell in batch.column(name).to_pylist() if cell)
    return list(dict.fromkeys(file.parent / cell for cell in cells))


def _of_pictures(files: Sequence[Path], name: str) -> str:
    """One digest of many files, remembered as one. A file that is missing is left out by whoever reads the pairs."""
    states = [file.stat() if file.is_file() else None for file in files]
    stamp = hashlib.sha256("\n".join(f"{f} {s and _stamp(s)}" for f, s in zip(files, states, strict=True)).encode())
    newest = max((max(s.st_mtime, s.st_ctime) for s in states if s), default=0.0)

    def each() -> str:
        lines = (_sha(file) if file.is_file() else MISSING for file in files)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    return _remembered(name, stamp.hexdigest(), newest, each)


def commit(hub_id: str) -> str | None:
    """The commit that the hub's cache here holds of "owner/name" or "owner/name@revision"; None when it holds none."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    name, _, revision = hub_id.partition("@")
    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    with suppress(FileNotFoundError, NotADirectoryError):
        return (folder / "refs" / (revision or "main")).read_text().strip()
    return revision if revision and (folder / "snapshots" / revision).is_dir() else None


def modules(plugin: type) -> dict[str, Location]:
    """The source of a plugin that is not raydiff's: "kind" is its module's file, "kind/MODULE" that of each module of the same
    root folder that it imports, through others too. {} for raydiff's own, which its version tells."""
    name = plugin.__module__
    file = getattr(sys.modules[name], "__file__", None)
    if _is_raydiff(name) or file is None:
        return {}
    root = Path(file).parents[name.count(".") + (Path(file).name == "__init__.py")]
    package = name.partition(".")[0] if root.name in _INSTALLED else None  # others there are installed, as raydiff is
    found: dict[str, Path] = {name: Path(file)}
    waiting = [*_above(name), *_imported(name, Path(file))]
    while waiting:
        one = waiting.pop()
        elsewhere = package is not None and one.partition(".")[0] != package
        if one not in found and not elsewhere and not _is_raydiff(one) and (source := _source(root, one)):
            found[one] = source
            waiting += [*_above(one), *_imported(one, source)]
    return {"kind" if one == name else f"kind/{one}": source for one, source in sorted(found.items())}


def _is_raydiff(module: str) -> bool:
    return module.partition(".")[0] == "raydiff"


def _above(module: str) -> list[str]:
    """The packages that a module is in."""
    return [module.rsplit(".", i)[0] for i in range(1, module.count(".") + 1)]


def _source(root: Path, module: str) -> Path | None:
    path = root / module.replace(".", "/")
    return next((f for f in (root / f"{path}.py", path / "__init__.py") if f.is_file()), None)


def _imported(module: str, source: Path) -> list[str]:
    """Names of all that a module's text imports, wherever in it; of `from a import b` both a and a.b, as either may be one; []
    of a text that is no Python, as a file that is being edited may be."""
    package = module if source.name == "__init__.py" else module.rpartition(".")[0]
    names: list[str] = []
    tree = ast.Module([], [])
    with suppress(SyntaxError, ValueError):
        tree = ast.parse(source.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                with suppress(ImportError):  # beyond the root
                    base = importlib.util.resolve_name("." * node.level + base, package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return [name for name in names if name.strip(".")]


def within(path: str, tables: Sequence[str]) -> bool:
    """Whether a dotted path is one of these fields, or in one of these tables."""
    return any(path == table or path.startswith((f"{table}.", f"{table}/")) for table in tables)


def _hidden(inside: Path) -> bool:
    return any(part.startswith((".", "__pycache__")) for part in inside.parts)


def _placed(name: str, where: Location) -> str:
    return f"{name} = {where}"


def _of_file(path: Path) -> str:
    with path.open("rb") as stream:  # opened, as a network's disk then tells its newest state
        state = os.fstat(stream.fileno())
        newest = max(state.st_mtime, state.st_ctime)
        return _remembered(str(path.absolute()), _stamp(state), newest, lambda: _sha(stream))


def _remembered(name: str, stamp: str, newest: float, compute: Callable[[], str]) -> str:
    """The digest that `name` had under this stamp. A file that has just changed may change again within a tick of the clock:
    it is read again."""
    if name in _seen and _seen[name][0] == stamp:
        return _seen[name][1]
    settled = newest < time.time() - _SETTLED
    digest = compute()
    if settled:
        _seen[name] = stamp, digest
    return digest


def _stamp(state: os.stat_result) -> str:
    """What changes with a file. Its time of change, unlike that of modification, cannot be set back."""
    return f"{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns} {state.st_ino}"


def _sha(file: Path | BufferedReader) -> str:
    if isinstance(file, Path):
        with file.open("rb") as stream:
            return _sha(stream)
    return hashlib.file_digest(file, "sha256").hexdigest()
