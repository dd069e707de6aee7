"""Peak memory of an update is flat in K with checkpointing, and grows without it: live bytes of shapes, and a real process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raydiff import assets
from raydiff.config import load, override
from raydiff.plan.memory import measure

ROOT = Path(__file__).parents[1]


def test_live_bytes_are_flat_in_k_with_checkpointing() -> None:
    """The embedded model's shapes at the recipe's batch: at most 25 % between K = 1 and K = all 8."""
    run = load(ROOT / "jobs/recipes/emoji_draft_k.toml", ["batch.size=32", "batch.micro=32", "sampler.steps=8"])

    def peak(k: int, checkpointing: bool) -> int:
        changed = override(run, {"method.k": k, "train.gradient_checkpointing": checkpointing})
        return measure(changed, assets.path("pipeline"))[1].update

    assert peak(8, True) <= 1.25 * peak(1, True)
    assert peak(8, False) > 3 * peak(1, False)


@pytest.mark.slow
def test_resident_memory_is_flat_in_k_with_checkpointing() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/memory.py"), "--k", "1", "5", "20"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    peaks = [json.loads(line)["mib"] for line in lines if line.startswith("{")]
    assert max(peaks) / min(peaks) <= 1.25
