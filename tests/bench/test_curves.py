"""Statistics of the comparison against numbers worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from raydiff.bench.curves import COSTS, Curve, Price, draws, median


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


def test_median_keeps_what_was_not_reached() -> None:
    inf = float("inf")
    assert median([3, inf, 1]) == 3
    assert median([inf, inf, 1]) == inf
    assert median([1, inf]) == inf


def test_a_resample_counts_its_gain_over_the_common_start() -> None:
    """Two pictures that start 2 apart and gain 1 and 3: drawn alone, each crosses a mean gain of 1 at its own time."""
    rewards = np.array([[0.0, 2.0], [1.0, 5.0]])
    run = Curve(("a", "b"), np.arange(2), {c: np.array([0.0, 10.0]) for c in COSTS}, {"total": rewards}, np.ones(2, bool))
    cost = run.costs["images"]
    assert run.paid(cost, 2.0) == 5  # from a mean of 1 to 3
    assert run.paid(cost, 2.0, np.array([0, 0])) == 10
    assert run.paid(cost, 2.0, np.array([1, 1])) == pytest.approx(10 / 3)


def test_prompts_stay_whole_and_draws_are_the_same_for_all() -> None:
    prompts = ["a", "b", "c", "a", "b", "c"]
    for pictures in draws(prompts, resamples=50):
        counts = np.bincount(pictures, minlength=6)
        assert (counts[:3] == counts[3:]).all()
        assert counts.sum() == 6
    assert all((a == b).all() for a, b in zip(draws(prompts, 50), draws(prompts, 50), strict=True))


def test_price_and_ratio_of_curves_without_noise() -> None:
    fast, slow = [curve([0, 1, 2])] * 3, [curve([0, 0.25, 0.5, 0.75, 1, 2])] * 3
    chosen = draws(fast[0].prompts, resamples=40)
    cheap, dear = Price(fast, 1, chosen), Price(slow, 1, chosen)
    assert (cheap.queries().value, cheap.queries().low, cheap.queries().high) == (10, 10, 10)
    ratio = dear.ratio(cheap)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((4, 4, 4))
    assert str(ratio) == "4 [4, 4]"
    never = Price(slow, 3, chosen)
    assert str(never.queries()) == "> 50"
    assert str(Price([curve([0, 0.5])] * 3, 1, chosen).ratio(cheap)) == "> 1"
    assert str(cheap.ratio(never)) == "–"
    assert str(Price(fast, 0, chosen).queries()) == "0 [0, 0]"  # before training already


def test_seeds_that_differ_widen_the_interval() -> None:
    """Student's t of three logs, for a median instead of a mean."""
    runs = [curve([0, 1], each) for each in (10, 20, 60)]
    estimate = Price(runs, 1, draws(runs[0].prompts)).queries()
    half = stats.t.ppf(0.975, 2) * np.std(np.log([10, 20, 60]), ddof=1) / np.sqrt(3) * np.sqrt(np.pi / 2)
    assert estimate.value == pytest.approx(20)
    assert (estimate.low, estimate.high) == pytest.approx((20 * np.exp(-half), 20 * np.exp(half)))
    alone = Price(runs[:1], 1, draws(runs[0].prompts)).queries()
    assert (alone.value, alone.low, alone.high) == (10, 0, float("inf"))


def test_a_seed_that_never_got_there_leaves_an_end_open() -> None:
    good, bad = [curve([0, 1])] * 2, curve([0, 0.5])
    chosen = draws(bad.prompts, resamples=40)
    mixed, sure = Price([*good, bad], 1, chosen), Price([curve([0, 1])] * 3, 1, chosen)
    assert (mixed.queries().value, mixed.queries().high) == (10, float("inf"))
    assert (mixed.ratio(sure).value, mixed.ratio(sure).high) == (1, float("inf"))
    assert (sure.ratio(mixed).value, sure.ratio(mixed).low) == (1, 0)


def noisy(true: float, count: int, sd: float, rng: np.random.Generator) -> Curve:
    """A run of `count` evaluations to a cost of 1000 that is halfway to its plateau of 1 at the true price."""
    cost = np.linspace(0, 1000, count + 1)
    mean = 1 - 0.5 ** (cost / true) + rng.normal(0, sd, count + 1)
    rewards = {"total": np.repeat(mean[:, None], 2, 1)}
    return Curve(("a", "b"), np.arange(count + 1), dict.fromkeys(COSTS, cost), rewards, np.ones(count + 1, bool))


def test_noise_and_the_number_of_evaluations_do_not_move_a_price() -> None:
    """The first evaluation above the threshold is early: of noise 0.05, by 1 % at 16 evaluations and by 15 % at 150."""
    rng = np.random.default_rng(0)
    for count in (16, 32, 80, 150):
        for sd in (0.02, 0.05, 0.1):
            runs = [noisy(500, count, sd, rng) for _ in range(150)]
            paid = [run.paid(run.costs["images"], 0.5) for run in runs]
            allowed = 0.03 * 500 + 2 * np.std(paid) / np.sqrt(len(paid))
            assert abs(np.mean(paid) - 500) < allowed, (count, sd, np.mean(paid))


def synthetic(true: float, weights: np.ndarray, rng: np.random.Generator) -> Curve:
    """A run of 16 evaluations that gets to a mean gain of 0.5 at the true price, at which prompts gain by `weights` of mean 1."""
    cost = np.linspace(0, 1000, 17)
    gains = weights * (0.5 * cost / true)[:, None] + rng.normal(0, 0.03, (17, 1)) + rng.normal(0, 0.05, (17, len(weights)))
    names = tuple(f"{i}" for i in range(len(weights)))
    return Curve(names, np.arange(17), dict.fromkeys(COSTS, cost), {"total": gains - gains[0]}, np.ones(17, bool))


@pytest.mark.parametrize(("of_prompts", "of_seeds"), [(0.5, 0.1), (0.5, 0.3), (0.1, 0.3)])
def test_intervals_of_prices_and_ratios_cover(of_prompts: float, of_seeds: float) -> None:
    """True prices of 500 and 250, three seeds, 16 prompts."""
    rng, covered, times = np.random.default_rng(5), np.zeros(2), 80
    for _ in range(times):
        weights = 1 + of_prompts * rng.normal(size=16)
        chosen = draws([f"{i}" for i in range(16)], resamples=40, seed=int(rng.integers(2**31)))
        common = np.exp(0.7 * of_seeds * rng.normal(size=3))
        dear, cheap = (
            Price([synthetic(true * c * np.exp(0.7 * of_seeds * rng.normal()), weights, rng) for c in common], 0.5, chosen)
            for true in (500, 250)
        )
        for i, (estimate, true) in enumerate(((dear.queries(), 500), (dear.ratio(cheap), 2))):
            covered[i] += estimate.low <= true <= estimate.high
    print(f"prices {covered[0] / times:.3f}, ratios {covered[1] / times:.3f}")
    assert (covered / times > 0.91).all()
