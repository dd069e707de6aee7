"""What stands in a run's way before anything starts: missing files, unusable prompts, a method and a sampling grid that do not
go together, a storage that cannot be written."""

from __future__ import annotations

import os
import re
from pathlib import Path

from raydiff.config import QUOTED, WHERE_PATHS_ARE, Run
from raydiff.data.preferences import overview
from raydiff.data.prompts import read_both
from raydiff.data.verdicts import Verdicts


def faults(run: Run, *, hub: bool = True) -> list[str]:
    """One line per fault, each with its dotted path and the way out; [] when there is none. Loads no weights.

    Without `hub`, it is no fault that the hub does not answer: what is not here may be where the run will be.
    """
    parts = {"model": run.model, "method": run.method}
    parts |= {f"rewards.{name}": r for name, r in run.rewards.named.items()}
    parts |= {f"evaluate.rewards.{name}": r for name, r in run.evaluate.rewards.items()}
    found = []
    for path, part in parts.items():
        if getattr(part, "runtime_env", None):
            continue  # its packages are not here
        try:
            part.preflight()
        except (ValueError, OSError, ImportError) as error:
            if isinstance(error, ConnectionError) and not hub:
                continue
            found.append(_line(path, error))
    found += _misfits(run) if not any(line.startswith("model") for line in found) else []
    if run.evaluate.clip is not None:
        from raydiff.rewards.clip import check_clip

        try:
            check_clip(run.evaluate.clip, text=False)
        except (ValueError, OSError) as error:
            found.append(_line("evaluate.clip", error))
    try:
        read_both(run.prompts, run.model.tokenizers())
    except (ValueError, OSError) as error:
        found.append(_line("prompts", error))
    if run.method.labelled or run.method.judged:
        try:
            (Verdicts.read if run.method.judged else overview)(str(run.pairs.path), split=run.pairs.split)
        except (ValueError, OSError) as error:
            found.append(_line("pairs.path", error))
    if "://" not in run.storage and not _can_write(Path(run.storage)):
        found.append(f"storage = {run.storage!r}: cannot write there; give another folder")
    return found


def _misfits(run: Run) -> list[str]:
    """Why the model, without its weights, the sampler's grid and the method do not go together."""
    if (folder := run.model.config_folder()) is None:
        return []
    path, sampler = "model", run.sampler
    try:
        skeleton = run.model.skeleton(folder, reference=run.method.needs_reference)
        path = "sampler"
        grid = skeleton.schedule(sampler.steps, sampler.spacing, sampler.final_alpha)
        path = "method"
        run.method.check_grid(grid, sampler.eta)
    except (ValueError, OSError) as error:
        return [_line(path, error)]
    return []


def _line(path: str, error: Exception) -> str:
    """An error with its field in front, and, where something is missing, with the rule by which it was looked for."""
    line = str(error) if str(error).startswith(path.partition(".")[0]) else f"{path}: {error}"
    return f"{line}; {WHERE_PATHS_ARE}" if isinstance(error, FileNotFoundError) else line


def metrics_fault(run: Run) -> str | None:
    """Why MLflow would keep its file or artifacts elsewhere than in the storage folder, None when it would not."""
    if run.tracking.served or "://" in run.storage:
        return None
    return unquotable(Path(run.storage).expanduser().resolve(), f"storage = {run.storage!r}")


def unquotable(folder: Path, field: str) -> str | None:
    """Why a folder of this path cannot hold an SQLite file of MLflow, None when it can."""
    if found := re.search(rf"\?|{QUOTED}", str(folder)):
        return f"{field}: MLflow would take {found[0]!r} in the path {str(folder)!r} for something else; give another folder"
    return None


def _can_write(folder: Path) -> bool:
    """Whether the folder, or the nearest one above that exists, can be written to."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)
