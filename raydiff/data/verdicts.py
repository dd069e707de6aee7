"""What people said of a run's own samples: labels of pairs, looked up by prompt and seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raydiff.data import preferences
from raydiff.data.pieces import PairsError
from raydiff.data.preferences import FIRST, LABEL, PROMPT, SECOND, TIE

SEEDS = ("seed_0", "seed_1")


class Verdicts:
    """The share of its comparisons that a picture won, a tie half, over all pairs and annotators that show it: what D3PO's
    official code averages too (arXiv 2311.13231)."""

    def __init__(self, path: str | Path, shares: Mapping[tuple[str, int], float]) -> None:
        self.path, self.shares = path, shares

    @classmethod
    def read(cls, path: str | Path, split: str | None = None) -> Verdicts:
        """Of a dataset of pairs with prompts and seeds. Rows without a label are left out: nobody has looked at them yet.

        Raises FileNotFoundError or PairsError, with the row or column, when there is a label that is none.
        """
        preferences.overview(path, split=split)
        won: dict[tuple[str, int], list[float]] = defaultdict(list)
        for file in preferences.files(path, split=split, option="pairs.split"):
            names = preferences.opened(file).schema_arrow.names
            if missing := [name for name in SEEDS if name not in names]:
                raise PairsError(
                    f"{file}: there is no column {missing[0]!r}, by which samples are told; there are {', '.join(names)}"
                )
            for start, batch in preferences.batches(file, (PROMPT, *SEEDS, LABEL)):
                for i, row in enumerate(batch.to_pylist()):
                    label = row[LABEL]
                    if label is None:
                        continue
                    if label not in (FIRST, SECOND, TIE):
                        raise PairsError(f"{file}, row {start + i}: column {LABEL!r}: {label} is none of 1, 0.5 and 0")
                    won[row[PROMPT], row[SEEDS[0]]].append(label)
                    won[row[PROMPT], row[SEEDS[1]]].append(1 - label)
        return cls(path, {picture: sum(labels) / len(labels) for picture, labels in won.items()})

    def of(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """(N,) of N samples. Raises PairsError, with prompt and seed, for one that nobody has compared."""
        pictures = list(zip(prompts, seeds, strict=True))
        for prompt, seed in pictures:
            if (prompt, seed) not in self.shares:
                raise PairsError(
                    f"pairs.path = {str(self.path)!r}: no label for {prompt!r}, seed {seed}: label every picture that"
                    " `raydiff pairs to-label` drew, and keep the run's seed, prompts, batch.size and method.attempts"
                )
        return torch.tensor([self.shares[picture] for picture in pictures])
