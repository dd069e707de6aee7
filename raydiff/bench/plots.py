"""Figures of the comparison.

Legend: E evaluations, C compared curves, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raydiff.bench import curves
from raydiff.bench.curves import Curve
from raydiff.bench.settings import Settings

_SHOWN = "reward_queries", "images", "denoiser_forward"
_LABEL = {
    "reward_queries": "reward queries", "images": "pictures sampled", "denoiser_forward": "denoiser forward passes",
    "denoiser_backward": "denoiser backward passes", "seconds": "seconds of training",
}  # fmt: skip
_POINTS = 200  # of a curve


def learning_curves(settings: Settings, folder: Path, name: str = "curves.png") -> Path:
    """Held-out reward against each cost, a row for each task, with a last column of alignment against reward."""
    from matplotlib.figure import Figure

    tasks = list(settings.tasks)
    columns = len(_SHOWN) + 1
    figure = Figure(figsize=(4.2 * columns, 3.6 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), columns, squeeze=False)
    for row, task in zip(axes, tasks, strict=True):
        for number, method in enumerate(settings.methods):
            found = curves.read(folder, task, method, settings)
            if not found:
                continue
            for axis, cost in zip(row, _SHOWN, strict=False):
                band(axis, found, cost, f"C{number}", method)
            trade(row[-1], found, settings.alignment[0], f"C{number}")
        for axis, cost in zip(row, _SHOWN, strict=False):
            axis.set(xscale="log", xlabel=_LABEL[cost], ylabel=f"held-out reward: {settings.tasks[task].title}")
            for threshold in settings.tasks[task].thresholds:
                axis.axhline(threshold, color="0.8", linewidth=0.8, zorder=0)
        row[-1].set(xlabel="held-out reward", ylabel=f"held-out {settings.alignment[0]}")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels) or 1, frameon=False)
    figure.savefig(folder / name, dpi=110)
    return folder / name


def band(axis: Any, found: Sequence[Curve], cost: str, colour: str, label: str) -> None:
    """Mean over seeds, and the range of the seeds."""
    first = max(c.costs[cost][1] for c in found)
    last = min(c.costs[cost][-1] for c in found)
    x = np.geomspace(first, max(last, first), _POINTS)
    y = np.stack([np.interp(x, c.costs[cost], c.mean()) for c in found])
    axis.plot(x, y.mean(0), color=colour, label=label)
    axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.15, linewidth=0)


def trade(axis: Any, found: Sequence[Curve], name: str, colour: str) -> None:
    """What the reward costs in alignment: each seed's evaluations, in order."""
    for curve in found:
        axis.plot(curve.mean(), curve.mean(name), color=colour, linewidth=0.8, alpha=0.7)


def strip(settings: Settings, folder: Path, task: str) -> Path | None:
    """The same prompts and seeds along the training of each method, with the reward queries so far under each picture."""
    import torch

    from raydiff import pictures

    rows, captions, labels = [], [], []
    for method in settings.methods:
        file = curves.record_file(folder, task, method, settings.seeds[0])
        frames = file.with_suffix(".npz")
        if not (file.is_file() and frames.is_file()):
            continue
        curve = curves.read(folder, task, method, settings)[0]
        data = np.load(frames)
        at = [int(np.flatnonzero(curve.steps == step)[0]) for step in data["steps"]]
        for i in range(data["frames"].shape[1]):
            rows.append([torch.from_numpy(frame) for frame in data["frames"][:, i]])  # (3,H,W) uint8 each
            captions.append([f"{curve.costs['reward_queries'][e]:.0f} queries: {curve.rewards['total'][e, i]:.2f}" for e in at])
            labels.append("\n".join([*method.split("_"), *curve.prompts[i].split()[1:]]))
    if not rows:
        return None
    width = max(len(row) for row in rows)
    rows = [row + [row[-1]] * (width - len(row)) for row in rows]
    captions = [row + [row[-1]] * (width - len(row)) for row in captions]
    return pictures.save(pictures.grid(rows, captions, labels), folder / f"strip_{task}.png")
