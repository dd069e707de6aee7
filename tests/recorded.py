"""Losses and metrics of two updates of every recipe, at fixed seeds: what a change of structure must leave as it is.

    python -m tests.recorded            # compares with tests/recorded.json, and prints what differs
    python -m tests.recorded --write    # after a change that is meant to move them; the commit says why and by how much

Each recipe keeps its method, optimiser and sampler, on the embedded model, with the embedded rewards and few, short updates.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raydiff.config import Run, load, override
from raydiff.local import fit
from tests.data import shards

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-5  # relative, or absolute near zero: other processors round differently
Rows = list[dict[str, float]]


def recipes() -> list[str]:
    return sorted(path.stem for path in (ROOT / "jobs/recipes").glob("*.toml"))


def small(recipe: str, pairs: Path) -> Run:
    """Two updates of a recipe that take seconds; `pairs`: where labelled pairs are made, if it has them."""
    run = load(ROOT / "jobs/recipes" / f"{recipe}.toml")
    micro, minibatches = min(run.batch.micro, 2), min(run.method.minibatches, 2)
    changes: dict[str, Any] = {
        "model.path": "embedded", "model.dtype": "float32", "model.revision": None, "model.variant": None,
        "sampler.steps": min(run.sampler.steps, 8),
        "batch": {"size": 2 * micro * minibatches, "micro": micro},
        "train": {"updates": 2, "zero_gradient": "accept"},
        "pools.train.replicas": 1, "generation.where": "learner", "rewards.where": "learner",
        "evaluate": {"images": 2, "batch": 2, "grid": 0, "every": 2, "drift_images": 0, "clip": None, "rewards": {}},
    }  # fmt: skip
    if minibatches > 1:
        changes["method.minibatches"] = minibatches
    if run.model.path != "embedded" and run.rewards.named:
        changes["rewards"] = {"aesthetic": {"kind": "aesthetic"}}
    if run.method.labelled:
        changes["pairs.path"] = str(shards.pairs(pairs / "pairs.parquet", 8, size=(32, 32)))
    return override(run, changes)


def record(recipe: str) -> Rows:
    """The metrics of each update, without what is measured in seconds."""
    with tempfile.TemporaryDirectory() as folder:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in fit(small(recipe, Path(folder)))]


def differences(recipe: str, now: Rows, before: Rows) -> Iterator[str]:
    for mine, theirs in zip(now, before, strict=True):
        for name in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(name), theirs.get(name)
            if a is None or b is None or abs(a - b) > TOLERANCE * max(1.0, abs(b)):
                yield f"{recipe}, update {theirs['step']:g}, {name}: {b} recorded, {a} now"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        FILE.write_text(json.dumps({recipe: record(recipe) for recipe in recipes()}, indent=1) + "\n")
        return 0
    before = json.loads(FILE.read_text())
    found = [line for recipe in recipes() for line in differences(recipe, record(recipe), before[recipe])]
    print("\n".join(found) or f"{len(before)} recipes are as recorded")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
