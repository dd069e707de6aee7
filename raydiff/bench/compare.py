"""The whole comparison: make the records that are missing, then tables and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raydiff.bench import curves, report
from raydiff.bench.gradient_norm import ddim, gradient_norms
from raydiff.bench.measure import Job, work_all
from raydiff.bench.renoising import renoising
from raydiff.bench.settings import Settings
from raydiff.config import Run, override


def compare(settings: Settings, folder: Path, processes: int, say: Callable[[str], Any] = print) -> list[Path]:
    """Run what is missing in `folder`, and write the report: its files. The same call goes on after an interruption."""
    folder.mkdir(parents=True, exist_ok=True)
    work_all(jobs(settings, folder), processes, say)
    for name, rows in ((report.GRADIENT_NORM, _norms), (report.RENOISING, _renoising)):
        if not (folder / name).is_file():
            say(name)
            (folder / name).write_text(json.dumps(rows(settings), indent=1))
    return report.write(settings, folder)


def _norms(settings: Settings) -> list[dict[str, float]]:
    return gradient_norms(_any_run(settings, settings.tuning.task), settings.gradient_norm)


def _renoising(settings: Settings) -> list[dict[str, Any]]:
    """Of each task, with the comparison's sampler and with the paper's."""
    rows = []
    for task, run in ((task, _any_run(settings, task)) for task in settings.tasks):
        for name, sampler in (("of the comparison", run), ("DDIM", override(run, ddim(settings.gradient_norm.steps)))):
            rows.append({"task": task, "sampler": name, **renoising(sampler, settings.gradient_norm.prompts)})
    return rows


def _any_run(settings: Settings, task: str) -> Run:
    return settings.run(task, settings.reference, settings.seeds[0])


def jobs(settings: Settings, folder: Path) -> Iterator[Job]:
    """Seed by seed, so that an interrupted comparison has whole ones."""
    for seed in settings.seeds:
        for task in settings.tasks:
            for method in settings.methods:
                file = curves.record_file(folder, task, method, seed)
                yield Job(settings.run(task, method, seed), file, strip=seed == settings.seeds[0])
