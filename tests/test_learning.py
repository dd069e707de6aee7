"""Methods learn on the embedded model, by stated margins and on two seeds each."""

from pathlib import Path

import pytest

import raydiff
from raydiff.data import feedback
from raydiff.evaluate import evaluate
from raydiff.generate import Adapter

MARGIN = 0.05  # of a mean squared distance that starts near 0.22
RECIPES = Path(__file__).parents[1] / "jobs/recipes"
# A tenth of the cost of sampling with 10 guided steps, and enough to see which of two methods learns more.
CHEAP = ["sampler.steps=5", "sampler.guidance=1", "batch.micro=8", "evaluate.images=64", "evaluate.drift_images=0"]


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


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])
def test_d3po_reaches_ddpos_reward_on_as_many_images(seed: int) -> None:
    """The gain in held-out reward over the base by comparisons alone is at least 0.9 of that by the rewards themselves.

    Each has its best learning rate of 1e-3, 3e-3 and 1e-2, by the held-out reward after 40 updates at seed 2: 0.027, 0.170 and
    0.189 of gain for DDPO, 0.040, 0.197 and 0.103 for D3PO. Everything else is the same, and as in the recipes.
    """
    gain = {}
    for method, lr in (("ddpo", 1e-2), ("d3po", 3e-3)):
        changes = [*CHEAP, f"seed={seed}", f"optimizer.lr={lr}", "evaluate.every=20"]
        history = list(raydiff.fit(raydiff.load(RECIPES / f"emoji_{method}.toml", changes)))
        totals = [m["held_out/total"] for m in history if "held_out/total" in m]
        print(method, [round(total, 4) for total in totals], history[-1]["images"])
        gain[method] = totals[-1] - totals[0]
        assert history[-1]["images"] == 2560
    assert gain["ddpo"] > MARGIN
    assert gain["d3po"] >= 0.9 * gain["ddpo"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, 1])
def test_dpo_on_labelled_pairs_beats_base(seed: int, tmp_path: Path) -> None:
    """The hidden preference is for a style, "3d", which no prompt names: training sees labels only. A classifier of styles labels
    the pairs that it tells apart by over 2 nats and, on held-out prompts, judges: 64 pictures a side, win rate at least 65 %.

    Measured: 73 % and 86 %. The 32 pairs of best against worst alone are too few for some seeds: 80 % and 53 % after 100 updates.
    """
    style = {"style": {"kind": "classifier", "model": "embedded-style", "label": "3d"}}
    changes = {"seed": seed, "rewards": style, "pairs.path": str(tmp_path / "pairs"), "optimizer.lr": 3e-3,
               "train.updates": 300, "evaluate.every": 1000, "evaluate.images": 4}  # fmt: skip
    run = raydiff.override(raydiff.load(RECIPES / "emoji_dpo.toml"), changes)
    summary = feedback.from_rewards(run, tmp_path / "pairs", feedback.Labelling("all", min_margin=2.0), n=8, seed=100 * seed)
    for _ in raydiff.fit(run, folder=tmp_path / "adapter"):
        pass
    report = evaluate(run, Adapter(str(tmp_path / "adapter")))
    print(summary, *report.lines(), sep="\n")
    assert len(report.ours) == 64
    won = report.measures["reward/style"].win_rate
    assert won is not None and won.value >= 0.65
