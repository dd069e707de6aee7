"""Does an adapter win? It and the base, or another adapter, draw the same held-out prompts with the same seeds, and are scored.

Pictures come from `raydiff.generate`: what a user of the adapter will see, rounded to bytes. Prompts are what varies: pictures
of one prompt count together, and intervals are for other prompts, the same ones for both sides.
Legend: P prompts, K pictures of each, E embedding width.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raydiff import drafts, generate, pictures, statistics
from raydiff.config import Run
from raydiff.core.denoise import mix
from raydiff.core.guard import diversity
from raydiff.core.policy import checked
from raydiff.data.prompts import read_both
from raydiff.generate import Adapter
from raydiff.session import Picture, Scores
from raydiff.statistics import Interval

REWARD = "reward/"
RESULT, GRID = "evaluation.json", "grid.png"
Progress = Callable[[Iterable[Any], int, str], Iterable[Any]]


@dataclass(frozen=True)
class Compared:
    """One measure of both sides."""

    adapter: Interval
    against: Interval
    difference: Interval  # adapter - against
    win_rate: Interval | None  # of the adapter's pictures, ties counted half; None for what no single picture has

    @classmethod
    def of(cls, ours: np.ndarray, theirs: np.ndarray) -> Compared:
        """Values of pictures (P,K) or of prompts (P,), the same prompts and seeds on both sides."""
        pictures = ours.ndim == 2
        won = statistics.rate(wins(ours, theirs), ours.shape[1]) if pictures else None
        a, b = (side.mean(1) if pictures else side for side in (ours, theirs))
        return cls(statistics.mean(a), statistics.mean(b), statistics.mean(a - b), won)


@dataclass(frozen=True)
class Report:
    """What was compared, and how it came out."""

    about: dict[str, Any]
    measures: dict[str, Compared]  # reward/NAME, alignment, diversity
    ours: list[Picture]  # of the first picture of each prompt, then the second of each, ...; rewards by measure
    theirs: list[Picture]

    def metrics(self) -> dict[str, float]:
        """Every number by a flat name: {"reward/total/win_rate": 0.7, "reward/total/win_rate/low": ...}."""
        flat: dict[str, float] = {}
        for measure, compared in self.measures.items():
            for what, interval in vars(compared).items():
                if interval is not None:
                    name = f"{measure}/{what}"
                    flat |= {name: interval.value, f"{name}/low": interval.low, f"{name}/high": interval.high}
        return flat

    def lines(self) -> list[str]:
        """For a person: a line for each measure, and warnings."""
        against = self.about["against"] or "base"
        lines = [f"{self.about['prompts']} prompts, {self.about['per_prompt']} pictures of each; against {against}"]
        for name, m in self.measures.items():
            won = f"  wins {m.win_rate}" if m.win_rate else ""
            lines.append(f"{name:20} {m.adapter.value:.4f} against {m.against.value:.4f}  difference {m.difference}{won}")
        return lines + [f"warning: {text}" for text in self.about["warnings"]]

    def write(self, folder: str | Path, shown: int) -> list[Path]:
        """evaluation.json with every picture's numbers, and grid.png of the first `shown`, if any: the paths are returned."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        each = [
            {"prompt": a.prompt, "seed": a.seed, "adapter": a.rewards, "against": b.rewards}
            for a, b in zip(self.ours, self.theirs, strict=True)
        ]
        measures = {name: asdict(m) for name, m in self.measures.items()}
        text = json.dumps({**self.about, "measures": measures, "pictures": each}, indent=1, ensure_ascii=False)
        with drafts.replacing(folder / RESULT) as draft:
            draft.write_text(text)
        if not shown:
            return [folder / RESULT]
        labels = "against" if self.about["against"] else "base", "adapter"
        sheet = pictures.versus(self.theirs[:shown], self.ours[:shown], labels, caption=caption)
        return [folder / RESULT, pictures.save(sheet, folder / GRID)]


def evaluate(
    run: Run,
    adapter: Adapter,
    against: Adapter | None = None,
    *,
    images: int = 64,
    per_prompt: int = 4,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Report:
    """Compare an adapter with the base model, or with another, on the run's held-out prompts and all of its rewards.

    `images` is the number of pictures of each side. The seeds are not those of training's evaluations, as the best weights were
    chosen by those. Raises ValueError or OSError for fewer than two prompts, and for an adapter that is not there or is another
    base model's.
    """
    adapter, against = in_run(adapter), in_run(against) if against else None
    sides = [[adapter], [against] if against else []]
    for side in sides:
        generate.check(run.model, side)
    pairs, count, each = to_draw(run, read_both(run.prompts)[1], images, per_prompt)
    judge = Judge(run, device)
    ours, theirs = (
        judge.draw(side, pairs, progress or (lambda items, *_: items), name)
        for side, name in zip(sides, ("adapter", "against"), strict=True)
    )
    about = {
        "run": run.name,
        "adapter": str(adapter.folder),
        "against": str(against.folder) if against else None,
        "prompts": count,
        "per_prompt": each,
        "confidence": statistics.CONFIDENCE,
        "warnings": [text for text in [statistics.few(count)] if text],
        "clip": run.evaluate.clip,
        "made_from": judge.made_from,
    }
    return Report(about, compare(ours, theirs, count), ours, theirs)


def to_draw(run: Run, prompts: Sequence[str], images: int, per_prompt: int) -> tuple[list[tuple[str, int]], int, int]:
    """((prompt, seed) of each picture, P, K): the first picture of each prompt, then the second of each, ...

    K is more than `per_prompt` where the prompts run out; P·K is at most `images`. Raises ValueError when P would be below 2.
    """
    count = min(len(prompts), images // per_prompt)
    if count < 2:
        raise ValueError(
            f"{count} prompts make no interval: {len(prompts)} held-out prompts, {images} images, {per_prompt} of each prompt."
            " Two prompts are the least; set --images and --per-prompt, or give a --prompts-file"
        )
    each = images // count
    pairs = [(prompts[p], mix(run.evaluate.seed, p, k)) for k in range(each) for p in range(count)]  # seeds shared by no two
    return pairs, count, each


class Judge:
    """The run's rewards, and the CLIP of `evaluate.clip` for alignment and diversity."""

    def __init__(self, run: Run, device: torch.device | str) -> None:
        self.run, self.device = run, device
        self.made_from: dict[str, Any] = {}  # of each side that was drawn
        self.score = Scores.here(run, device).evaluation
        self.clip: Any = None
        if run.evaluate.clip is not None:
            from raydiff.rewards.clip import Plugin

            self.clip = Plugin(kind="clip", model=run.evaluate.clip).build(device)

    def draw(
        self, adapters: Sequence[Adapter], pairs: Sequence[tuple[str, int]], progress: Progress, name: str
    ) -> list[Picture]:
        """One side's pictures, scored a batch at a time."""
        model, self.made_from[name] = generate.loaded(self.run.model, self.run.sampler, adapters, self.device)
        batch = self.run.evaluate.batch
        drawn = iter(progress(generate.of_pairs(model, pairs, self.run.sampler, batch), len(pairs), name))
        scored: list[Picture] = []
        while part := list(islice(drawn, batch)):
            scored += self.scored(part, len(scored))
        del model
        gc.collect()  # before the other side's is loaded
        return scored

    @torch.no_grad()
    def scored(self, part: Sequence[generate.Sample], first: int) -> list[Picture]:
        prompts, seeds = [s.prompt for s in part], [s.seed for s in part]
        pixels = torch.stack([generate.pixels(s.image) for s in part])
        images = pixels.to(self.device).float() / 255
        total, parts = checked(self.score, images, prompts, seeds)
        values = {REWARD + name: r for name, r in {"total": total, **parts}.items()}
        embeddings: Any = [None] * len(part)
        if self.clip is not None:
            embeddings = self.clip.embed_image(images)
            values["alignment"] = (embeddings * self.clip.embed_text(prompts)).sum(-1)
            embeddings = embeddings.cpu()
        return [
            Picture(
                first + i, prompts[i], seeds[i], {name: float(v[i]) for name, v in values.items()}, pixels[i],
                embedding=embeddings[i],
            )
            for i in range(len(part))
        ]  # fmt: skip


def compare(ours: Sequence[Picture], theirs: Sequence[Picture], prompts: int) -> dict[str, Compared]:
    """Every measure of two sides' pictures, which are of `prompts` prompts in turn."""

    def values(side: Sequence[Picture], name: str) -> np.ndarray:  # (P,K)
        return np.array([p.rewards[name] for p in side]).reshape(-1, prompts).T

    measures = {name: Compared.of(values(ours, name), values(theirs, name)) for name in ours[0].rewards}
    if ours[0].embedding is not None and len(ours) > prompts:
        a, b = (np.array([diversity(_embeddings(side[p::prompts])) for p in range(prompts)]) for side in (ours, theirs))
        measures["diversity"] = Compared.of(a, b)
    return measures


def wins(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Share of a prompt's pictures that beat the other side's of the same seed, a tie half: (P,K) twice -> (P,)."""
    return ((ours > theirs) + 0.5 * (ours == theirs)).mean(1)


def caption(picture: Picture) -> str:
    """What stands under a picture of the grid: the prompt, and a line for each number."""
    return "\n".join([picture.prompt, *(f"{name.removeprefix(REWARD)} {v:.3f}" for name, v in picture.rewards.items())])


def in_run(adapter: Adapter) -> Adapter:
    """The adapter; for the folder of a run, the one that the run exported."""
    inside = Path(adapter.folder) / "adapter"
    return replace(adapter, folder=str(inside)) if (Path(adapter.folder) / "run.json").is_file() else adapter


def _embeddings(side: Sequence[Picture]) -> torch.Tensor:
    """(K,E)."""
    return torch.stack([p.embedding for p in side if p.embedding is not None])
