"""Statistics of the comparison against numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from raydiff.bench.curves import COSTS, Curve, Draws, Price, crossing, interval, median
from raydiff.bench.renoising import variances


def curve(rewards: list[float], each: float = 10) -> Curve:
    """A run whose pictures all have the same reward."""
    steps = np.arange(len(rewards))
    costs = dict.fromkeys(COSTS, each * steps)
    return Curve(("a", "a", "b"), steps, costs, {"total": np.repeat(np.array(rewards)[:, None], 3, 1)}, steps >= 0)


def test_a_reward_without_alignment_is_not_reached() -> None:
    run = replace(curve([0, 1, 2, 3]), aligned=np.array([True, False, False, True]))
    assert run.paid(run.costs["images"], 1) == 30  # nothing is known between the second and the last
    assert replace(run, aligned=np.array([True, False, False, False])).paid(run.costs["images"], 1) == float("inf")
    assert replace(run, aligned=np.array([True, True, False, False])).paid(run.costs["images"], 0.5) == 5


def test_crossing_is_linear_between_evaluations() -> None:
    x = np.array([0.0, 10, 20, 30])
    y = np.array([0.0, 1, 3, 2])
    assert crossing(x, y, 0.5) == 5
    assert crossing(x, y, 2) == 15
    assert crossing(x, y, 3) == 20
    assert crossing(x, y, 3.1) == float("inf")
    assert crossing(x, y, -1) == 0


def test_median_keeps_what_was_not_reached() -> None:
    inf = float("inf")
    assert median([3, inf, 1]) == 3
    assert median([inf, inf, 1]) == inf
    assert median([1, inf]) == inf


def test_interval_is_of_percentiles_and_counts_inf() -> None:
    assert interval(np.arange(1001.0)) == (25, 975)
    low, high = interval(np.array([1.0] * 90 + [float("inf")] * 10))
    assert (low, high) == (1, float("inf"))


def test_variances_of_a_known_mixture() -> None:
    """Pictures of variance 4 and copies of variance 9, for each of 3 weights."""
    draw = torch.Generator().manual_seed(0)
    centres, copies = 2 * torch.randn(4000, 1, 3, generator=draw), 3 * torch.randn(4000, 8, 3, generator=draw)
    between, within = variances(centres + copies)
    assert between == pytest.approx(12, rel=0.05)
    assert within == pytest.approx(27, rel=0.02)
    assert variances(copies[:2])[0] >= 0


def test_a_resample_counts_its_gain_over_the_common_start() -> None:
    """Two pictures that start 2 apart and gain 1 and 3: drawn alone, each crosses a mean gain of 1 at its own time."""
    rewards = np.array([[0.0, 2.0], [1.0, 5.0]])
    run = Curve(("a", "b"), np.arange(2), {c: np.array([0.0, 10.0]) for c in COSTS}, {"total": rewards}, np.ones(2, bool))
    cost = run.costs["images"]
    assert run.paid(cost, 2.0) == 5  # from a mean of 1 to 3
    assert run.paid(cost, 2.0, np.array([0, 0])) == 10
    assert run.paid(cost, 2.0, np.array([1, 1])) == pytest.approx(10 / 3)


def test_prompts_stay_whole_and_draws_are_paired() -> None:
    prompts = ["a", "b", "c", "a", "b", "c"]
    draws = Draws.of(3, prompts, resamples=50)
    for pictures in draws.pictures:
        counts = np.bincount(pictures, minlength=6)
        assert (counts[:3] == counts[3:]).all()
        assert counts.sum() == 6
    again = Draws.of(3, prompts, resamples=50)
    assert all((a == b).all() for a, b in zip(draws.pictures, again.pictures, strict=True))
    assert (draws.seeds == again.seeds).all()


def test_price_and_ratio_of_curves_without_noise() -> None:
    fast, slow = [curve([0, 1, 2])] * 3, [curve([0, 0.25, 0.5, 0.75, 1, 2])] * 3
    draws = Draws.of(3, fast[0].prompts, resamples=40)
    cheap, dear = Price(fast, 1, draws), Price(slow, 1, draws)
    assert (cheap.queries().value, cheap.queries().low, cheap.queries().high) == (10, 10, 10)
    ratio = dear.ratio(cheap)
    assert (ratio.value, ratio.low, ratio.high) == (4, 4, 4)
    assert str(ratio) == "4 [4, 4]"
    never = Price(slow, 3, draws)
    assert str(never.queries()) == "> 50"
    assert str(Price([curve([0, 0.5])] * 3, 1, draws).ratio(cheap)) == "> 1"


def test_seeds_that_differ_widen_the_interval() -> None:
    runs = [curve([0, 1], each) for each in (10, 20, 60)]
    estimate = Price(runs, 1, Draws.of(3, runs[0].prompts)).queries()
    assert estimate.value == pytest.approx(20)
    assert (estimate.low, estimate.high) == (10, 60)
