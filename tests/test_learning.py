"""Each method learns within its recipe: the held-out reward rises by a stated margin over its start, on two seeds."""

from pathlib import Path

import pytest

import raydiff

RECIPES = Path(__file__).parents[1] / "jobs/recipes"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("recipe", "part", "margin"),
    [
        ("emoji_draft", "clip", 0.02),
        ("emoji_draft_k", "clip", 0.02),
        ("emoji_draft_lv", "border", 0.05),
        ("emoji_refl", "border", 0.05),
    ],
)
def test_the_held_out_reward_rises_within_the_recipe(recipe: str, part: str, margin: float, seed: int) -> None:
    run = raydiff.load(RECIPES / f"{recipe}.toml", [f"seed={seed}", "evaluate.every=1000", "evaluate.images=64"])
    history = [m for m in raydiff.fit(run) if "held_out/total" in m]
    before, after = history[0], history[-1]
    print({name: (round(before[name], 4), round(after[name], 4)) for name in after if name.startswith("held_out/")})
    assert after["held_out/total"] > before["held_out/total"]
    assert after[f"held_out/{part}"] - before[f"held_out/{part}"] >= margin
