"""The whole comparison: make the records that are missing, then tables and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raydiff.bench import curves, report
from raydiff.bench.gradient_norm import gradient_norms
from raydiff.bench.measure import Job, work_all
from raydiff.bench.settings import Settings


def compare(settings: Settings, folder: Path, processes: int, say: Callable[[str], Any] = print) -> list[Path]:
    """Run what is missing in `folder`, and write the report: its files. The same call goes on after an interruption."""
    folder.mkdir(parents=True, exist_ok=True)
    work_all(jobs(settings, folder), processes, say)
    norms = folder / report.GRADIENT_NORM
    if not norms.is_file():
        say("gradient norms")
        method = next(iter(settings.methods))
        rows = gradient_norms(settings.run(settings.tuning.task, method, settings.seeds[0]), settings.gradient_norm)
        norms.write_text(json.dumps(rows, indent=1))
    return report.write(settings, folder)


def jobs(settings: Settings, folder: Path) -> Iterator[Job]:
    """Seed by seed, so that an interrupted comparison has whole ones."""
    for seed in settings.seeds:
        for task in settings.tasks:
            for method in settings.methods:
                file = curves.record_file(folder, task, method, seed)
                yield Job(settings.run(task, method, seed), file, strip=seed == settings.seeds[0])
