"""Tables and figures from records alone: results.json, report.md and PNGs.

Legend: E evaluations, P pictures.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raydiff.bench import curves
from raydiff.bench.curves import Curve, Price, draws, median, number
from raydiff.bench.measure import COSTS
from raydiff.bench.settings import Settings

GRADIENT_NORM, RENOISING = "gradient_norm.json", "renoising.json"


def results(settings: Settings, folder: Path) -> dict[str, Any]:
    """All figures of the tables, from the records that are there."""
    gradients = {name: folder / name for name in (GRADIENT_NORM, RENOISING)}
    return {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
        "seeds": list(settings.seeds),
        "tasks": {task: _task(settings, folder, task) for task in settings.tasks},
        **{Path(name).stem: json.loads(file.read_text()) if file.is_file() else [] for name, file in gradients.items()},
    }


def write(settings: Settings, folder: Path) -> list[Path]:
    """Write results.json, report.md and the figures. Returns their paths."""
    from raydiff.bench import plots

    found = results(settings, folder)
    (folder / "results.json").write_text(json.dumps(found, indent=1))
    (folder / "report.md").write_text(markdown(settings, found))
    files = [folder / "results.json", folder / "report.md", plots.learning_curves(settings, folder)]
    files += [sheet for task in settings.tasks if (sheet := plots.strip(settings, folder, task))]
    return files


def _task(settings: Settings, folder: Path, task: str) -> dict[str, Any]:
    runs = {m: found for m in settings.methods if (found := curves.read(folder, task, m, settings))}
    reference = runs.get(settings.reference)
    return {
        method: {
            "seeds": len(found),
            "before": _held_out(found, 0),
            "after": _held_out(found, -1),
            "spent": {cost: median([c.costs[cost][-1] for c in found]) for cost in COSTS},
            "prices": [_price(settings, found, reference, t) for t in settings.tasks[task].thresholds],
        }
        for method, found in runs.items()
    }


def _held_out(found: Sequence[Curve], place: int) -> dict[str, float]:
    """Mean over seeds and pictures of each reward at an evaluation."""
    return {name: float(np.mean([c.mean(name)[place] for c in found])) for name in found[0].rewards}


def _price(settings: Settings, found: Sequence[Curve], reference: Sequence[Curve] | None, threshold: float) -> dict[str, Any]:
    """What a threshold cost, and what was left of the held-out rewards when it was reached."""
    chosen = draws(found[0].prompts)
    price = Price(found, threshold, chosen)
    ratio = None
    if reference and len(reference) == len(found) and reference is not found:
        ratio = price.ratio(Price(reference, threshold, chosen))
    return {
        "threshold": threshold,
        "reached": sum(bool(np.isfinite(c.paid(c.costs["images"], threshold))) for c in found),
        "queries": _finite(vars(price.queries())),
        "ratio": ratio and _finite(vars(ratio)),
        **_finite({cost: price.point(cost) for cost in COSTS[1:]}),
        "alignment": _finite({name: _when_reached(found, threshold, name) for name in settings.alignment}),
    }


def _when_reached(found: Sequence[Curve], threshold: float, name: str) -> float:
    """Mean over the seeds that got there of a held-out reward at the threshold's crossing; NaN where none did."""
    steps = [c.paid(c.steps.astype(float), threshold) for c in found]
    there = [np.interp(s, c.steps, c.mean(name)) for c, s in zip(found, steps, strict=True) if np.isfinite(s)]
    return float(np.mean(there)) if there else float("nan")


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no inf and no NaN: null."""
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def estimate(found: Mapping[str, float | None] | None) -> str:
    """An estimate of results.json as text."""
    if found is None:
        return "–"
    inf = float("inf")
    value, low, high, least = (inf if found[k] is None else found[k] for k in ("value", "low", "high", "least"))
    return str(curves.Estimate(value, low, high, least))  # type: ignore[arg-type]


def markdown(settings: Settings, found: Mapping[str, Any]) -> str:
    """The report."""
    lines = [
        "# Sample efficiency", "",
        f"{found['date']}, {found['machine']}; seeds {', '.join(map(str, found['seeds']))}. Where a monotone fit"
        " of the learning curve reaches the threshold: median over seeds, with 95 % intervals for other seeds and other"
        " held-out prompts; `>` where no more were spent and the"
        f" threshold was not reached with a held-out {settings.keep.reward} of at least {settings.keep.least:g}.", "",
    ]  # fmt: skip
    for task, methods in found["tasks"].items():
        lines += [f"## {settings.tasks[task].title}", "", *_queries_table(settings, task, methods), ""]
        lines += [*_costs_table(settings, task, methods), "", *_ends_table(settings, methods), ""]
    if found["gradient_norm"]:
        lines += ["## Norm of the DRaFT-K gradient", "", *_norms_table(found["gradient_norm"]), ""]
    if found["renoising"]:
        lines += ["## What re-noising can average out", "", *_renoising_table(settings, found["renoising"]), ""]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def _queries_table(settings: Settings, task: str, methods: Mapping[str, Any]) -> list[str]:
    thresholds = settings.tasks[task].thresholds
    header = ["method", *(f"queries to {t:g}" for t in thresholds), *(f"× {settings.reference}, {t:g}" for t in thresholds)]
    return _table(
        header,
        [
            [m, *(estimate(p["queries"]) for p in r["prices"]), *(estimate(p["ratio"]) for p in r["prices"])]
            for m, r in methods.items()
        ],
    )


def _costs_table(settings: Settings, task: str, methods: Mapping[str, Any]) -> list[str]:
    first = settings.tasks[task].thresholds[0]
    names = ("images", "denoiser_forward", "denoiser_backward", "seconds")
    header = [f"to {first:g}", "pictures", "denoiser forward", "denoiser backward", "seconds"]
    return _table(header, [[m, *(_text(r["prices"][0][name]) for name in names)] for m, r in methods.items()])


def _ends_table(settings: Settings, methods: Mapping[str, Any]) -> list[str]:
    best = next(iter(methods.values()))["prices"][-1]["threshold"] if methods else 0
    header = ["method", "queries", "held-out reward, before → after"]
    header += [f"{name}, before → after" for name in settings.alignment] + [
        f"{name} at {best:g}" for name in settings.alignment
    ]
    rows = []
    for method, r in methods.items():
        cells = [method, number(r["spent"]["reward_queries"])]
        cells += [f"{r['before'][name]:.3f} → {r['after'][name]:.3f}" for name in ("total", *settings.alignment)]
        rows.append(cells + [_text(r["prices"][-1]["alignment"][name]) for name in settings.alignment])
    return _table(header, rows)


def _norms_table(rows: Sequence[Mapping[str, float]]) -> list[str]:
    names = ("mean", "median", "largest", "of_mean")
    header = ["K", "mean over prompts", "median", "largest", "norm of the mean gradient"]
    return _table(header, [[f"{row['k']:g}", *(f"{row[name]:.3g}" for name in names)] for row in rows])


def _renoising_table(settings: Settings, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    header = ["reward", "sampler", "steps", "variance between pictures", "within a picture", "share of the latter"]
    cells = [(settings.tasks[r["task"]].title, r["sampler"], str(r["steps"])) for r in rows]
    names = ("between", "within", "share")
    return _table(header, [[*cell, *(f"{row[name]:.3g}" for name in names)] for cell, row in zip(cells, rows, strict=True)])


def _text(value: float | None) -> str:
    return "–" if value is None else number(value)


def machine() -> str:
    """What this runs on, in words."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        name = next((line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name)
    return f"{os.cpu_count()} cores of {name}, Python {platform.python_version()}"
