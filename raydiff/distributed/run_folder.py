"""A run's folder: what was started in it and with which files, and whether it may be gone on with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from raydiff import __version__, contents
from raydiff.config import ConfigError, Run, fresh_name
from raydiff.contents import Contents
from raydiff.distributed import checkpoint, learn
from raydiff.distributed.storage import PATIENCE, Folder

RUN = "run.json"


def recorded_run(folder: Folder) -> Mapping[str, Any] | None:
    """The JSON of a started run: of RUN, and when that is missing or broken of the newest checkpoint, which holds it too."""
    found = folder.json_or_none(RUN)
    try:
        Run.model_validate(found)
    except ValueError:
        newest = checkpoint.latest(folder)
        return found if newest is None else newest.run
    return dict(found)


def recorded(folder: Folder) -> Contents | None:
    """What the files of a started run, or sweep, held; None when that was not written down, or is broken."""
    try:
        return Contents.load(folder.read(contents.FILE))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def same_contents(before: Contents | None, now: Contents, folder: Folder, may_change: Sequence[str] = ()) -> Contents:
    """What a run, or sweep, that is gone on with holds from now on. Raises ConfigError for files that hold something else."""
    if before is None:
        warnings.warn(f"{folder} has no {contents.FILE}: what its files held when it was started is unknown", stacklevel=2)
        return now
    if before.raydiff != __version__:
        warnings.warn(f"{folder} was started by raydiff {before.raydiff}, and this is {__version__}", stacklevel=2)
    before.compare(now.digests, may_change)
    return now.joined({name: d for name, d in before.digests.items() if not contents.within(name, may_change)})


def held(run: Run, folder: Folder) -> Contents:
    """What the run's files hold. Raises ConfigError when a run that was started had others."""
    before = recorded(folder)  # first: what it has read need not be read again
    now = Contents.of(run)
    return now if recorded_run(folder) is None else same_contents(before, now, folder, checkpoint.MAY_CHANGE)


def begin(run: Run, folder: Folder, held: Contents) -> None:
    """Write down what is carried out: a run exists when RUN does."""
    folder.write(contents.FILE, held.dump().encode())
    folder.write(RUN, run.model_dump_json(indent=1).encode())


def fresh(run: Run) -> Folder:
    return Folder(run.storage, PATIENCE) / fresh_name(run.name)


def resumed(run: Run, resume: str | Path) -> Folder:
    """The folder of a started run, checked: it exists, is not finished, and was started with this config."""
    text = str(resume)
    folder = Folder(text, PATIENCE) if "/" in text else Folder(run.storage, PATIENCE) / text
    if (before := recorded_run(folder)) is None:
        names = [name for name in Folder(run.storage).folders() if (Folder(run.storage) / name).size(RUN) is not None]
        there = f"; there are {', '.join(names[-5:])}" if names else ""
        raise ConfigError(f"resume = {text!r}: no run was started in {folder}{there}")
    checkpoint.check_same_run(before, run)
    if (finished := folder.json_or_none(checkpoint.FINISHED)) is not None:
        stopped = finished["stopped_by"] if run.train.stop_when == Run.model_validate(before).train.stop_when else None
        if finished["updates"] >= run.train.updates or stopped:
            way_out = f"It was stopped by {stopped}; another train.stop_when" if stopped else "A larger train.updates"
            raise ConfigError(
                f"resume = {text!r}: this run is finished, {finished['updates']} of {run.train.updates} updates; its weights"
                f" are in {folder / learn.ADAPTER}. {way_out} continues it"
            )
    return folder
