"""What a sweep found: table and figures."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raydiff.search import Sweep


@dataclass(frozen=True)
class Point:
    """A trial at one evaluation."""

    update: int
    reward_queries: int
    objective: float
    metric: float


@dataclass(frozen=True)
class Outcome:
    """What became of a trial."""

    trial: str
    status: str  # finished, stopped early, failed
    values: dict[str, Any]
    points: list[Point]
    error: str = ""

    @property
    def best(self) -> Point | None:
        """The first highest objective after an update."""
        return max((p for p in self.points if p.update > 0), key=lambda p: p.objective, default=None)

    @property
    def rank(self) -> tuple[bool, float]:
        """The smallest is the best; a trial that failed is behind those that did not."""
        return self.status == "failed", -self.best.objective if self.best else math.inf


def write(sweep: Sweep, outcomes: Sequence[Outcome]) -> dict[str, bytes]:
    """Files by name: the table, and the figures where there is something to show."""
    files = {"trials.md": ("\n".join(table(sweep, outcomes)) + "\n").encode()}
    shown = [o for o in outcomes if o.best]
    if shown:
        files |= {"learning_curves.png": _curves(sweep, shown), "parallel_coordinates.png": _parallel(sweep, shown)}
    return files


def table(sweep: Sweep, outcomes: Sequence[Outcome]) -> list[str]:
    """Markdown lines, the best trial first."""
    axes = list(sweep.space)
    header = ["trial", *axes, "objective", sweep.metric, "update", "reward queries", "status"]
    rows = []
    for o in outcomes:
        p = o.best
        found = [f"{p.objective:.4f}", f"{p.metric:.4f}", str(p.update), str(p.reward_queries)] if p else ["–"] * 4
        error = f": {o.error}" if o.error else ""
        rows.append([o.trial, *(label(o.values[axis]) for axis in axes), *found, (o.status + error).replace("|", "/")])
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def label(value: Any) -> str:
    """A value of an axis in a few characters."""
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(f"{k} {label(v)}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _curves(sweep: Sweep, outcomes: Sequence[Outcome]) -> bytes:
    """Objective against reward queries."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for o in outcomes:
        name = "; ".join(f"{path.rpartition('.')[2]} {label(value)}" for path, value in o.values.items())
        style = {"finished": "-", "stopped early": "--", "failed": ":"}[o.status]
        axis.plot([p.reward_queries for p in o.points], [p.objective for p in o.points], style, marker=".", label=name)
    axis.set(xlabel="reward queries", ylabel=f"objective: {_objective(sweep)}")
    if len(outcomes) <= 20:
        axis.legend(fontsize=7, frameon=False)
    return _png(figure)


def _parallel(sweep: Sweep, outcomes: Sequence[Outcome]) -> bytes:
    """A line for each trial through its values to its objective, coloured by it."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    names = [*sweep.space, "objective"]
    columns: list[list[Any]] = [[o.values[path] for o in outcomes] for path in sweep.space]
    columns.append([o.best.objective for o in outcomes if o.best])
    places = [_places(column, log=sweep.space[n].kind == "loguniform" if n in sweep.space else False)
              for n, column in zip(names, columns, strict=True)]  # fmt: skip
    figure = Figure(figsize=(2.2 * len(names) + 1, 4.5), layout="constrained")
    axis = figure.subplots()
    for trial in range(len(outcomes)):
        line = [column[trial] for column in places]
        axis.plot(range(len(names)), line, color=colormaps["viridis"](line[-1]), alpha=0.8)
    for x, (column, place) in enumerate(zip(columns, places, strict=True)):
        axis.axvline(x, color="0.8", zorder=0)
        for value, y in {label(v): y for v, y in zip(column, place, strict=True)}.items():
            axis.annotate(value, (x, y), fontsize=7, xytext=(3, 0), textcoords="offset points")
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks([])
    return _png(figure)


def _places(values: Sequence[Any], log: bool) -> list[float]:
    """Each value's height in [0,1]: by size, or in the order of their names where they are no numbers."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        heights = [math.log(v) if log else float(v) for v in values]
    else:
        texts = [json.dumps(v) for v in values]
        heights = [float(sorted(set(texts)).index(text)) for text in texts]
    low, high = min(heights), max(heights)
    return [(h - low) / (high - low) if high > low else 0.5 for h in heights]


def _objective(sweep: Sweep) -> str:
    sign = "" if sweep.mode == "max" else "-"
    return f"{sign}{sweep.metric}" + (f" - {sweep.penalty.weight:g} × {sweep.penalty.metric}" if sweep.penalty else "")


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
