"""Pairs from rewards by hand, and the logistic loss against the solution that preference learning has in closed form."""

import math

import pytest
import torch

from raydiff.core.log_prob import gaussian_log_prob, log_ratio
from raydiff.core.preferences import Pairs, accuracy, logistic_loss, mean_over, preferred_pairs


def listed(pairs: Pairs) -> list[tuple[int, int] | None]:
    """(winner, loser) of each pair, None for a tie."""
    found = zip(pairs.winner.tolist(), pairs.loser.tolist(), pairs.decided.tolist(), strict=True)
    return [(winner, loser) if decided else None for winner, loser, decided in found]


def test_the_best_wins_over_the_worst() -> None:
    total = torch.tensor([[0.3, 0.9, 0.1], [0.5, 0.5, 0.5], [2.0, 1.0, 1.5]])
    pairs = preferred_pairs({"total": total})
    assert listed(pairs) == [(1, 2), None, (6, 7)]
    rows, place = pairs.rows()
    assert rows.tolist() == [1, 2, 3, 5, 6, 7]
    assert rows[place].tolist() == [*pairs.winner.tolist(), *pairs.loser.tolist()]


def test_every_two_attempts_and_a_margin() -> None:
    total = torch.tensor([[0.3, 0.9, 0.1], [1.0, 1.0, 2.0]])
    assert listed(preferred_pairs({"total": total}, "all")) == [(1, 0), (0, 2), (1, 2), None, (5, 3), (5, 4)]
    assert listed(preferred_pairs({"total": total}, "all", min_margin=0.5)) == [(1, 0), None, (1, 2), None, (5, 3), (5, 4)]
    with pytest.raises(ValueError, match="method.attempts"):
        preferred_pairs({"total": torch.zeros(3, 1)})


def test_labels_of_a_data_set_are_rewards() -> None:
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert listed(preferred_pairs({"total": labels})) == [(0, 1), (3, 2), None]


def test_pareto_dominance_needs_every_reward() -> None:
    a, b = (
        torch.tensor([[1.0, 2.0], [1.0, 2.0], [3.0, 3.0], [1.0, 1.0]]),
        torch.tensor([[5.0, 5.0], [5.0, 4.0], [1.0, 2.0], [1.0, 1.0]]),
    )
    pairs = preferred_pairs({"total": a + b, "a": a, "b": b}, rule="pareto")
    assert listed(pairs) == [(1, 0), None, (5, 4), None]
    assert listed(preferred_pairs({"total": a + b, "a": a, "b": b})) == [(1, 0), None, (5, 4), None]
    assert listed(preferred_pairs({"total": a + b, "a": a, "b": b}, "all", "pareto")) == listed(pairs)


def test_means_over_what_is_decided() -> None:
    values, none = torch.tensor([1.0, 5.0, 3.0], requires_grad=True), torch.zeros(3, dtype=torch.bool)
    assert mean_over(values, torch.tensor([True, False, True])).item() == 2.0
    nothing = mean_over(values, none)
    nothing.backward()
    assert nothing.item() == 0.0 and values.grad is not None and values.grad.tolist() == [0, 0, 0]
    inside = torch.tensor([0.3, -0.1, 0.0, 7.0])
    assert float(accuracy(inside, torch.tensor([True, True, True, False]))) == (1 + 0 + 0.5 + 0.5) / 4


def test_the_minimum_is_the_reference_tilted_by_the_reward() -> None:
    """p_ref = N(0,1) and r(x) = a·x: p_ref·exp(r/β) is N(a/β, 1). Fitted from Bradley-Terry preferences alone."""
    a, beta = 0.6, 0.5
    torch.manual_seed(0)
    x, y = torch.randn(2, 2000, 1, dtype=torch.float64)
    wins = torch.sigmoid(a * (x - y))[:, 0]  # how often x is preferred
    mean, log_std = (
        torch.full((1,), -0.7, dtype=torch.float64, requires_grad=True),
        torch.full((1,), 0.4, dtype=torch.float64, requires_grad=True),
    )
    optimizer = torch.optim.LBFGS(
        [mean, log_std], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-15
    )

    def closure() -> float:
        optimizer.zero_grad()

        def ratio(z: torch.Tensor) -> torch.Tensor:
            log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(z)[:, 0]
            return log_ratio(log_prob, gaussian_log_prob(z, torch.zeros_like(z), 1.0), 1, "sum")

        inside = beta * (ratio(x) - ratio(y))
        loss = (wins * logistic_loss(inside) + (1 - wins) * logistic_loss(-inside)).mean()
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    assert mean.item() == pytest.approx(a / beta, abs=1e-4)
    assert log_std.item() == pytest.approx(0.0, abs=1e-4)


def test_logistic_loss_of_no_preference_is_log_2_and_far_ones_stay_finite() -> None:
    loss = logistic_loss(torch.tensor([0.0, -1e4, 1e4]))
    assert loss.tolist() == pytest.approx([math.log(2), 1e4, 0.0])
