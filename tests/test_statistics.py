"""Intervals by simulation of what they claim to cover, and against scipy where it has the same one; prices of known curves."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from raydiff import statistics
from raydiff.statistics import noise, price

Draw = Callable[[np.random.Generator, int], np.ndarray]
DRAWS: dict[str, tuple[Draw, float]] = {  # values of mean 0, one a prompt, and the least coverage with 8 prompts and more
    "normal": (lambda rng, n: rng.normal(size=n), 0.935),
    "uniform": (lambda rng, n: rng.uniform(-1, 1, n), 0.935),
    "heavy tails": (lambda rng, n: rng.standard_t(3, n), 0.935),
    "skewed": (lambda rng, n: rng.exponential(size=n) - 1, 0.91),
    "skewed down": (lambda rng, n: 1 - rng.exponential(size=n), 0.91),
    "paired": (lambda rng, n: (r := rng.normal(3, 9, n)) + rng.normal(0, 1, n) - r, 0.935),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_intervals_of_means_cover(kind: str) -> None:
    (draw, least), rng = DRAWS[kind], np.random.default_rng(0)
    for prompts in (2, 4, 8, 16, 32):
        intervals = [statistics.mean(draw(rng, prompts)) for _ in range(1500)]
        covered = np.mean([i.low <= 0 <= i.high for i in intervals])
        print(f"{kind}, {prompts} prompts: {100 * covered:.1f} %")
        assert covered > (least if prompts >= 8 else least - 0.02), prompts
        assert covered < 0.985, prompts


@pytest.mark.parametrize("alike", [0.0, 0.2, 0.8, 1.0])
def test_intervals_of_rates_cover(alike: float) -> None:
    """Four pictures a prompt that win at a rate of their own; `alike` is the correlation of a prompt's pictures."""
    rng = np.random.default_rng(1)
    for prompts in (2, 4, 8, 16, 32):
        for true in (0.5, 0.7, 0.9):
            covered = 0
            for _ in range(500):
                interval = statistics.rate(rng.binomial(4, _rates(rng, true, alike, prompts)) / 4, 4)
                assert 0 <= interval.low < interval.high <= 1
                covered += interval.low <= true <= interval.high
            assert covered / 500 > 0.92, (prompts, true)


def _rates(rng: np.random.Generator, true: float, alike: float, prompts: int) -> np.ndarray:
    """(P,) true rates of prompts."""
    if alike == 0:
        return np.full(prompts, true)
    if alike == 1:
        return (rng.random(prompts) < true).astype(float)
    total = 1 / alike - 1
    return rng.beta(true * total, (1 - true) * total, prompts)


def test_rates_of_one_picture_a_prompt_are_clopper_and_pearsons() -> None:
    for won, of in ((0, 5), (2, 5), (5, 5), (13, 20)):
        values = np.array([1.0] * won + [0.0] * (of - won))
        expected = stats.binomtest(won, of).proportion_ci(method="exact")
        interval = statistics.rate(values, 1)
        assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_a_rate_is_never_sure() -> None:
    all_won, ties = statistics.rate(np.ones(8), 4), statistics.rate(np.full(8, 0.5), 4)
    assert (all_won.value, all_won.high) == (1, 1)
    assert all_won.low == pytest.approx(0.025 ** (1 / 8))  # of eight prompts, however many pictures each has
    assert ties.low < 0.5 < ties.high
    shares = np.array([0.25, 1, 0.75, 0.75, 0.5])
    one, other = statistics.rate(shares, 4), statistics.rate(1 - shares, 4)
    assert (one.low, one.high) == pytest.approx((1 - other.high, 1 - other.low))


def test_a_mean_without_skewness_has_students_interval() -> None:
    values = np.array([-3.0, -1, 0, 1, 3]) + 0.2
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    interval = statistics.mean(values, 0.9)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert statistics.mean(np.full(4, 0.3)).high == pytest.approx(0.3)
    for interval_of in (statistics.mean, lambda values: statistics.rate(values, 1)):
        with pytest.raises(ValueError, match="1 values make no interval: two are the least"):
            interval_of(np.ones(1))


def test_a_skewed_mean_lies_further_where_the_tail_is() -> None:
    values = np.random.default_rng(0).exponential(size=20)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval, mirrored = statistics.mean(values), statistics.mean(-values)
    assert interval.high > expected.high
    assert interval.low == pytest.approx(expected.low)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))


def test_few_prompts_are_warned_of() -> None:
    assert statistics.few(statistics.FEW) is None
    assert str(statistics.few(3)).startswith("3 prompts are few: below 16")


COST = np.linspace(0, 1000, 101)


def reached(reward: np.ndarray, threshold: float, counts: np.ndarray | None = None) -> float:
    cost = np.linspace(0, 1000, len(reward))
    return price(cost, reward, np.ones(len(reward), bool) if counts is None else counts, threshold)


def test_a_price_without_noise_is_the_crossing() -> None:
    x, y = np.array([0.0, 10, 20, 30]), np.array([0.0, 1, 3, 2])
    for threshold, expected in ((0.5, 5), (2, 15), (3, 20), (3.1, float("inf")), (-1, 0)):
        assert price(x, y, np.ones(4, bool), threshold) == expected
    for shape in (1 - np.exp(-COST / 300), COST / 1000, 1 / (1 + np.exp((500 - COST) / 60)), np.minimum(COST / 300, 0.7)):
        for threshold in (0.3, 0.5, 0.7):
            assert reached(shape, threshold) == pytest.approx(
                np.interp(threshold, *_rising(shape)) if shape[-1] >= threshold else np.inf
            )


def _rising(shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(reward, cost) up to the plateau."""
    last = int(np.argmax(shape)) + 1
    return shape[:last], COST[:last]


CURVES = {  # of cost up to 1000 and the true price of 0.5
    "saturating": lambda x, true: 1 - 0.5 ** (x / true),
    "linear": lambda x, true: 0.5 * x / true,
    "sigmoid": lambda x, true: 1 / (1 + np.exp(-(x - true) / 80)),
    "falls at the end": lambda x, true: np.where(x < 1.5 * true, 0.5 * x / true, 0.75 - (x - 1.5 * true) / 500),
}


@pytest.mark.parametrize("shape", CURVES)
def test_prices_are_not_biased_by_noise(shape: str) -> None:
    """Within 3 % of the price, beside what chance may do to a mean of 200."""
    rng = np.random.default_rng(2)
    for evaluations in (16, 32, 80, 150):
        x = np.linspace(0, 1000, evaluations + 1)
        for true in (300, 500, 700):
            for sd in (0.02, 0.05, 0.1):
                curve = CURVES[shape](x, true)
                paid = np.array([reached(curve + rng.normal(0, sd, len(x)), 0.5) for _ in range(200)])
                found = paid[np.isfinite(paid)]
                # A rise and fall of few evaluations may not stand out of the noise.
                assert len(found) > (0.7 if shape == "falls at the end" else 0.96) * len(paid), (evaluations, true, sd)
                bias = abs(found.mean() - true) - 2.5 * found.std() / len(found) ** 0.5
                assert bias < 0.03 * true, (evaluations, true, sd, found.mean())


def test_a_plateau_below_the_threshold_does_not_reach_it_by_noise() -> None:
    """The plateau is two standard deviations below: among 150 evaluations one exceeds the threshold nearly always."""
    rng = np.random.default_rng(3)
    for evaluations in (32, 150):
        plateau = np.minimum(np.linspace(0, 5, evaluations + 1), 1)
        missed = [np.isinf(reached(plateau + rng.normal(0, 0.05, len(plateau)), 1.1)) for _ in range(200)]
        assert np.mean(missed) > 0.93


def test_what_does_not_count_is_left_out() -> None:
    rewards, counts = np.array([0.0, 1, 9, 2, 3, 4]), np.array([True, True, False, True, True, False])
    assert reached(rewards, 1.5, counts) == 600  # nothing is known between the second and the fourth
    assert reached(rewards, 2.5, counts) == 700
    assert reached(rewards, 3.5, counts) == float("inf")
    assert reached(rewards, 0.5, np.zeros(6, bool)) == float("inf")


def test_noise_is_what_no_rise_and_fall_explains() -> None:
    x = np.linspace(0, 1, 200)
    assert noise(1 - (x - 0.6) ** 2) == pytest.approx(0, abs=1e-9)
    found = noise(np.minimum(3 * x, 1) + np.random.default_rng(0).normal(0, 0.1, 200))
    assert found == pytest.approx(0.1, rel=0.15)
