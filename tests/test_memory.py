"""Peak memory of an update is flat in K with checkpointing, and grows without it: live bytes of shapes, and a real process."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raydiff import assets
from raydiff.config import Run, load, override
from raydiff.plan.memory import Live, measure
from raydiff.session import Session

ROOT = Path(__file__).parents[1]


def test_live_bytes_are_flat_in_k_with_checkpointing() -> None:
    """The embedded model's shapes at the recipe's batch: at most 25 % between K = 1 and K = all 8."""
    run = load(ROOT / "jobs/recipes/emoji_draft_k.toml", ["batch.size=32", "batch.micro=32", "sampler.steps=8"])

    def peak(k: int, checkpointing: bool) -> int:
        changed = override(run, {"method.k": k, "train.gradient_checkpointing": checkpointing})
        return measure(changed, assets.path("pipeline")).memory.update

    assert peak(8, True) <= 1.25 * peak(1, True)
    assert peak(8, False) > 3 * peak(1, False)


@pytest.mark.parametrize("method", ["d3po", "ddpo"])
def test_a_graph_over_all_steps_holds_a_few_latents_of_each_with_checkpointing(
    tiny_run: Callable[..., Run], method: str
) -> None:
    """What a loss over whole trajectories holds until its backward pass: hundreds of latents a step and row without."""

    def held(steps: int, checkpointing: bool) -> int:
        grid = {"sampler.steps": steps, "sampler.eta": 1.0, "sampler.final_alpha": None}
        session = Session(tiny_run(method, {**grid, "method.attempts": 2, "train.gradient_checkpointing": checkpointing}))
        batch = next(iter(session.ready(session.batches(0))))
        with Live(list(session.model.trained().values())) as live:
            loss, _ = session.method.loss(session.policy, batch)
            now = live.now
        assert loss.requires_grad
        return now

    latents = 4 * 4 * 8 * 8 * 4  # bytes of one for each of 2·2 rows
    assert held(12, True) - held(4, True) < 8 * 4 * latents
    assert held(12, False) - held(4, False) > 8 * 100 * latents


@pytest.mark.slow
def test_resident_memory_is_flat_in_k_with_checkpointing() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/memory.py"), "--k", "1", "5", "20"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    peaks = [json.loads(line)["mib"] for line in lines if line.startswith("{")]
    assert max(peaks) / min(peaks) <= 1.25
