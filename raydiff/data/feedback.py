"""Pairs from rewards: of pictures that were scored before, or that are drawn and scored here (AI feedback).

Both label by `raydiff.core.preferences`, the rule of training on rollouts. Legend: B prompts, G pictures each, P pairs.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydiff.config import Run
from raydiff.contents import Contents, digests, of_locations, of_parts
from raydiff.core.policy import checked
from raydiff.core.preferences import Pairs, Rule, Which, preferred_pairs
from raydiff.data import images, pictures, pieces, preferences
from raydiff.data.pieces import BadRow, PairsError, Part, Summary
from raydiff.data.prompts import read_both
from raydiff.pictures import to_bytes, to_pil

REWARD = "reward_"  # before a reward's name in a column of scored pictures
_TIE = "tie"
_DRAW = ("model", "method", "prompts.train")  # fields, or tables of them, whose files decide which pictures a run draws


@dataclass(frozen=True)
class Labelling:
    """How pictures of a prompt become pairs."""

    which: Which = "best_worst"
    rule: Rule = "total"
    min_margin: float = 0.0

    def __call__(self, rewards: Mapping[str, Tensor]) -> Pairs:
        return preferred_pairs(rewards, self.which, self.rule, self.min_margin)

    def check(self, rewards: Sequence[str]) -> None:
        """Raise ValueError for a rule that cannot work on rewards of these names."""
        named = [name for name in rewards if name != "total"]
        if not rewards:
            raise ValueError("--reward: there is none; name the rewards that label, e.g. --reward clip")
        if self.rule == "total" and len(rewards) > 1:
            raise ValueError(
                f"--rule total labels by one number, and there are {', '.join(rewards)}: name one, or --rule pareto"
            )
        if self.rule == "pareto" and len(named) < 2:
            raise ValueError(f"--rule pareto compares several rewards, and there is {', '.join(named) or 'none'}: name another")
        if self.rule == "pareto" and self.which == "best_worst" and "total" not in rewards:
            raise ValueError("--pairs best_worst needs a total to tell them by: add --reward total, or --pairs all")
        if self.rule == "pareto" and self.min_margin:
            raise ValueError("--min-margin is a difference of totals: leave it out with --rule pareto")

    def annotator(self, rewards: Sequence[str]) -> str:
        return f"{self.rule} of {', '.join(rewards)}"


@dataclass(frozen=True)
class _Chosen:
    """A pair of rows of the scored pictures, the first the winner."""

    rows: tuple[int, int]
    scores: tuple[float, float]


def from_scores(
    scored: str | Path,
    to: str | Path,
    rewards: Sequence[str],
    labelling: Labelling | None = None,
    *,
    rows_per_file: int = 512,
    max_bad_rows: int = 100,
    split: str | None = None,
) -> Summary:
    """Write pairs of a dataset of scored pictures (columns image, prompt, reward_NAME): those of one prompt are compared.

    The sides stand as the rows come, and the label says which wins. Ties are dropped. The columns model, adapters and seed are
    copied for each side where they are there. Raises ValueError before anything is written for rewards that the files do not
    have, and as `pieces.write` does.
    """
    labelling = labelling or Labelling()
    labelling.check(rewards)
    pictures = _Scored(preferences.files(scored, "SCORED", split), rewards)
    chosen, dropped, bad = pictures.pairs(labelling)
    annotator, created = labelling.annotator(rewards), datetime.now(UTC)

    def make(start: int, stop: int) -> Iterator[Part]:
        if start == 0:  # what the scores alone tell is told once
            yield Part(preferences.table({}, 0), dropped, bad)
        for a, b in pieces.split(start, stop, preferences.ROWS):
            yield pictures.part(chosen[a:b], {"annotator": annotator, "source": str(scored), "created": created})

    made_from = {
        "scored": pieces.listing(pictures.files),
        "rewards": list(rewards),
        "labelling": asdict(labelling),
        "rows_per_file": rows_per_file,
    }
    ranges = pieces.split(0, len(chosen), rows_per_file) or [(0, 0)]
    return pieces.write(to, preferences.schema(), made_from, ranges, make, max_bad_rows)


class _Scored:
    """A dataset of scored pictures. Rows count over all its files."""

    def __init__(self, files: Sequence[Path], rewards: Sequence[str]) -> None:
        self.files, self.rewards = list(files), list(rewards)
        self.starts = [0]
        for file in files:
            parquet = preferences.opened(file)
            there = parquet.schema_arrow.names
            for name in ("image", "prompt", *(REWARD + name for name in rewards)):
                if name not in there:
                    named = [n.removeprefix(REWARD) for n in there if n.startswith(REWARD)]
                    scored = f"rewards {', '.join(named)}" if named else "no rewards: `raydiff score` adds them"
                    raise PairsError(f"{file}: there is no column {name!r}; there are {', '.join(there)} ({scored})")
            self.starts.append(self.starts[-1] + parquet.metadata.num_rows)

    def pairs(self, labelling: Labelling) -> tuple[list[_Chosen], Counter[str], list[BadRow]]:
        """(pairs in the order of their first rows, rows or pairs dropped by reason, bad rows), without looking at a picture."""
        groups: dict[str, list[int]] = defaultdict(list)
        values, dropped, bad = dict[int, list[float]](), Counter[str](), list[BadRow]()
        for row, prompt, numbers in self._scores():
            if reason := images.bad_prompt(prompt) or _not_finite(self.rewards, numbers):
                bad.append(BadRow(*self._at(row), reason))
            else:
                groups[str(prompt)].append(row)
                values[row] = numbers
        chosen: list[_Chosen] = []
        for size, same in _by_length(groups.values()).items():
            if size == 1:
                dropped["the only picture of its prompt"] += len(same)
                continue
            scores = torch.tensor([[values[row] for row in rows] for rows in same], dtype=torch.float64)  # (B,G,K)
            named = dict(zip(self.rewards, scores.unbind(2), strict=True))
            pairs = labelling({"total": scores[:, :, 0], **named})  # Pareto does not look at it
            flat, totals = [row for rows in same for row in rows], scores[:, :, self._total].flatten().tolist()
            for winner, loser, decided in zip(*(t.tolist() for t in vars(pairs).values()), strict=True):
                if decided:
                    chosen.append(_Chosen((flat[winner], flat[loser]), (totals[winner], totals[loser])))
                else:
                    dropped[_TIE] += 1
        return sorted(chosen, key=lambda pair: min(pair.rows)), dropped, bad

    def part(self, chosen: Sequence[_Chosen], same: Mapping[str, Any]) -> Part:
        """Some pairs with their pictures."""
        rows = self._take(sorted({row for pair in chosen for row in pair.rows}))
        kept, bad = list[_Chosen](), dict[int, BadRow]()
        for pair in chosen:
            faults = {row: pictures.fault(rows[row]["image"]) for row in pair.rows}
            bad |= {row: BadRow(*self._at(row), f"column 'image': {why}") for row, why in faults.items() if why}
            if not any(faults.values()):
                kept.append(pair)
        columns: dict[str, list[Any]] = {"prompt": [], "label": []}
        for pair in kept:
            first, second = sorted(zip(pair.rows, pair.scores, strict=True))
            columns["prompt"].append(rows[first[0]]["prompt"])
            columns["label"].append(preferences.FIRST if first[0] == pair.rows[0] else preferences.SECOND)
            for side, (row, score) in enumerate((first, second)):
                for name in ("image", "model", "adapters", "seed"):
                    columns.setdefault(f"{name}_{side}", []).append(rows[row].get(name))
                columns.setdefault(f"score_{side}", []).append(score)
        constant = {name: [value] * len(kept) for name, value in same.items()}
        return Part(preferences.table(columns | constant, len(kept)), bad=list(bad.values()))

    @cached_property
    def _total(self) -> int:
        """Which reward a pair's scores are."""
        return self.rewards.index("total") if "total" in self.rewards else 0

    def _scores(self) -> Iterator[tuple[int, str | None, list[float]]]:
        names = ["prompt", *(REWARD + name for name in self.rewards)]
        for start, file in zip(self.starts, self.files, strict=False):
            for row, batch in preferences.batches(file, names):
                columns = [batch.column(name).to_pylist() for name in names]
                for i, (prompt, *numbers) in enumerate(zip(*columns, strict=True)):
                    yield start + row + i, prompt, [float("nan") if n is None else float(n) for n in numbers]

    def _at(self, row: int) -> tuple[str, int]:
        """(file, row in it)."""
        n = int(np.searchsorted(self.starts, row, side="right")) - 1
        return str(self.files[n]), row - self.starts[n]

    def _take(self, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Whole rows by number, read a few at a time from the row groups that have them."""
        found: dict[int, dict[str, Any]] = {}
        for start, stop, file in zip(self.starts, self.starts[1:], self.files, strict=False):
            wanted = [row - start for row in rows if start <= row < stop]
            if not wanted:
                continue
            there = preferences.opened(file).schema_arrow.names
            names = [name for name in ("image", "prompt", "model", "adapters", "seed") if name in there]
            for first, batch in chain.from_iterable(preferences.batches(file, names, *near) for near in _runs(wanted)):
                inside = [row - first for row in wanted if first <= row < first + len(batch)]
                for i, image in zip(inside, images.encoded(batch.column("image").take(inside)), strict=True):
                    others = {name: batch.column(name)[i].as_py() for name in names if name != "image"}
                    found[start + first + i] = {"image": image, **others}
        return found


def from_rewards(
    run: Run,
    to: str | Path,
    labelling: Labelling | None = None,
    *,
    adapters: Sequence[Any] = (),
    n: int = 4,
    seed: int = 0,
    prompts_per_file: int = 64,
    max_bad_rows: int = 100,
    device: torch.device | str = "cpu",
) -> Summary:
    """Draw `n` pictures of each of the run's training prompts, score them by its rewards, and write the pairs.

    In this process: what `raydiff generate`, `raydiff score` and `from_scores` do one after the other on a cluster. Picture g
    of a prompt has seed `seed` + g, and is the one that `raydiff.generate` draws with the run's model and sampler and these
    `raydiff.generate.Adapter`s. Raises ValueError or OSError before anything is drawn, and as `pieces.write` does.
    """
    from raydiff import generate as drawing

    labelling = labelling or Labelling()
    if n < 2:
        raise ValueError(f"--n {n}: one picture of a prompt makes no pair; 2 or more do")
    if not run.rewards.named:
        raise ValueError("rewards: there is none to label by; a reward is a table, [rewards.NAME] with kind")
    labelling.check(["total"] if labelling.rule == "total" else [*run.rewards.named, "total"])
    parts = {"model": run.model, **{f"rewards.{k}": r for k, r in run.rewards.named.items()}}
    for path, part in parts.items():
        _checked(path, part)
    drawing.check(run.model, adapters)
    prompts, _ = read_both(run.prompts)
    held = Contents(drawing.files(run.model, adapters) | of_locations(of_parts(parts)))
    artist = _Artist(run, labelling, tuple(adapters), range(seed, seed + n), prompts, device, held)
    made_from = {
        "model": run.model.model_dump(mode="json"),
        "model's files": drawing.model_digest(run.model),
        "adapters": artist.origin,
        "sampler": run.sampler.model_dump(mode="json"),
        "rewards": run.rewards.model_dump(mode="json"),
        "labelling": asdict(labelling),
        "prompts": list(prompts),
        "seeds": [seed, seed + n],
        "prompts_per_file": prompts_per_file,
        pieces.CONTENTS: {name: digest for name, digest in held.digests.items() if not name.startswith("adapters.")},
    }
    ranges = pieces.split(0, len(prompts), prompts_per_file)
    return pieces.write(to, preferences.schema(), made_from, ranges, artist.parts, max_bad_rows)


def to_label(run: Run, to: str | Path, *, device: torch.device | str = "cpu") -> Summary:
    """Draw the pictures of the run's first update, each two of a prompt as a pair whose label is null, for people to fill in.

    They are the run's own samples, by its seeds. Raises ValueError for a method that takes no labels, else as `pieces.write`.
    """
    from raydiff.generate import model_digest
    from raydiff.session import Session

    if not run.method.judged:
        raise ValueError('method.source is not "labels": nothing would read them; D3PO takes it')
    held = Contents(digests(run, _DRAW))
    session = Session(run, device)
    held.check(run, _DRAW, {"prompts.train": session.train_prompts})
    micro, attempts, steps = run.batch.micro, run.method.attempts, session.policy.schedule.steps

    @torch.no_grad()
    def make(start: int, stop: int) -> Iterator[Part]:
        drawn = session.sample(0, start // micro)
        images = to_bytes(session.model.decode(drawn.at(steps)))
        files, seeds = [_png(to_pil(image)) for image in images], drawn.flat_seeds()
        firsts = range(0, len(files), attempts)
        rows = [(b + i, b + j) for b in firsts for i, j in combinations(range(attempts), 2)]
        model = run.model.name
        columns: dict[str, list[Any]] = {"prompt": [drawn.flat_prompts()[i] for i, _ in rows], "source": [run.name] * len(rows)}
        for side in (0, 1):
            columns[f"image_{side}"] = [files[row[side]] for row in rows]
            columns[f"seed_{side}"] = [seeds[row[side]] for row in rows]
            columns[f"model_{side}"] = [model] * len(rows)
        yield Part(preferences.table(columns, len(rows)))

    fields = ("model", "method", "prompts", "sampler", "batch", "seed")
    made_from = run.model_dump(mode="json", include=set(fields))
    made_from |= {"model's files": model_digest(run.model), pieces.CONTENTS: held.digests}
    return pieces.write(to, preferences.schema(), made_from, pieces.split(0, run.batch.size, micro), make, 0)


@dataclass
class _Artist:
    """Draws, scores and pairs. Model and rewards are loaded when the first prompt is drawn."""

    run: Run
    labelling: Labelling
    adapters: tuple[Any, ...]
    seeds: range
    prompts: tuple[str, ...]
    device: torch.device | str
    held: Contents

    @cached_property
    def model(self) -> Any:
        from raydiff import generate as drawing

        model = drawing.load(self.run.model, self.adapters, self.device)
        self.held.compare(drawing.files(self.run.model, self.adapters))
        return model

    @cached_property
    def score(self) -> Any:
        from raydiff.session import Scores

        score = Scores.here(self.run, self.device).training
        self.held.check(self.run, ("rewards",))
        return score

    @cached_property
    def origin(self) -> list[dict[str, Any]]:
        """The adapters, as the schema has them."""
        from raydiff import generate as drawing

        return drawing.origins(self.run.model, self.adapters)

    def parts(self, start: int, stop: int) -> Iterator[Part]:
        """Pairs of some prompts, a batch of pictures at a time."""
        at_once = max(1, self.run.evaluate.batch // len(self.seeds))
        for a, b in pieces.split(start, stop, at_once):
            yield self._part(self.prompts[a:b], a)

    @torch.no_grad()
    def _part(self, prompts: Sequence[str], first: int) -> Part:
        from raydiff import generate as drawing

        size, flat = len(self.seeds), [prompt for prompt in prompts for _ in self.seeds]
        drawn = list(drawing.samples(self.model, prompts, self.seeds, self.run.sampler, self.run.evaluate.batch))
        images = torch.from_numpy(np.stack([np.array(s.image.convert("RGB")) for s in drawn])).permute(0, 3, 1, 2)
        total, parts = checked(self.score, images.to(self.device).float() / 255, flat, [s.seed for s in drawn])
        rewards = {name: r.float().cpu().view(-1, size) for name, r in {"total": total, **parts}.items()}
        pairs, scores = self.labelling(rewards), rewards["total"].flatten().tolist()
        columns: dict[str, list[Any]] = defaultdict(list)
        for winner, loser, decided in zip(*(t.tolist() for t in vars(pairs).values()), strict=True):
            if not decided:
                continue
            sides = sorted((winner, loser))
            columns["prompt"].append(flat[winner])
            columns["label"].append(preferences.FIRST if sides[0] == winner else preferences.SECOND)
            for side, row in enumerate(sides):
                columns[f"image_{side}"].append(_png(drawn[row].image))
                columns[f"seed_{side}"].append(drawn[row].seed)
                columns[f"score_{side}"].append(scores[row])
        count = len(columns["label"])
        named = ["total"] if self.labelling.rule == "total" else list(parts)
        model = self.run.model.name
        same: dict[str, Any] = {f"model_{side}": model for side in (0, 1)} | {
            f"adapters_{side}": self.origin for side in (0, 1)
        }
        same |= {"annotator": self.labelling.annotator(named), "source": self.run.name, "created": datetime.now(UTC)}
        table = preferences.table(columns | {name: [value] * count for name, value in same.items()}, count)
        return Part(table, Counter({_TIE: len(pairs.decided) - count}))


def _checked(path: str, part: Any) -> None:
    try:
        part.preflight()
    except (ValueError, OSError, ImportError) as error:
        raise ValueError(str(error) if str(error).startswith(path) else f"{path}: {error}") from None


def _png(image: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _not_finite(names: Sequence[str], values: Sequence[float]) -> str:
    for name, value in zip(names, values, strict=True):
        if not np.isfinite(value):
            return f"column {REWARD + name!r}: {value} is no finite number"
    return ""


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of rising row numbers that lie close together."""
    first = last = rows[0]
    for row in rows[1:]:
        if row - last > preferences.ROWS:
            yield first, last + 1
            first = row
        last = row
    yield first, last + 1


def _by_length(groups: Any) -> dict[int, list[list[int]]]:
    lengths: dict[int, list[list[int]]] = defaultdict(list)
    for rows in groups:
        lengths[len(rows)].append(rows)
    return lengths
