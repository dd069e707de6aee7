"""Each method learns within its recipe: the held-out reward rises by a stated margin over its start, on two seeds."""

from pathlib import Path

import pytest

import raydiff

MARGIN = 0.05  # of a mean squared distance that starts near 0.22
RECIPES = Path(__file__).parents[1] / "jobs/recipes"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("recipe", ["emoji_draft", "emoji_draft_k", "emoji_draft_lv", "emoji_refl"])
def test_the_held_out_reward_rises_within_the_recipe(recipe: str, seed: int) -> None:
    run = raydiff.load(RECIPES / f"{recipe}.toml", [f"seed={seed}", "evaluate.every=1000", "evaluate.images=32"])
    history = [m for m in raydiff.fit(run) if "held_out/total" in m]
    before, after = history[0], history[-1]
    print({name: (round(before[name], 4), round(after[name], 4)) for name in after if name.startswith("held_out/")})
    assert after["held_out/border"] - before["held_out/border"] >= MARGIN
