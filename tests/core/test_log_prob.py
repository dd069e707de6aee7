"""Densities of sampler steps: what the sampler records is what scoring finds, and both are torch's own normal distribution."""

import pytest
import torch
from torch.distributions import Normal

from raydiff.core.log_prob import gaussian_log_prob, log_ratio, transition_log_prob
from tests.core.tiny import make_policy, make_rollouts

PROMPTS = ["a cat", "a horse", "an ant"]


def test_recorded_log_probs_equal_scoring_bit_for_bit_and_the_normal_density() -> None:
    policy = make_policy(eta=1.0, final_alpha=None)
    batch = make_rollouts(policy, PROMPTS, 2)
    predict = policy.predict(batch.flat_prompts())
    assert batch.log_probs is not None
    for i in range(4):
        x, x_next = batch.at(i), batch.at(i + 1)
        with torch.no_grad():
            again = transition_log_prob(predict, policy.schedule, i, x, x_next, policy.eta)
            mean, std = policy.schedule.transition(i, x, predict(x, policy.schedule.time(i, x)), policy.eta)
        assert torch.equal(again, batch.log_probs[:, :, i].flatten())
        expected = Normal(mean, torch.tensor(std, dtype=torch.float64)).log_prob(x_next).sum((1, 2, 3))
        assert torch.allclose(again, expected, rtol=1e-12)


def test_the_log_ratio_has_its_closed_form() -> None:
    """log N(x; μ+δ) - log N(x; μ) at x = μ + std·z is ⟨δ,z⟩/std - ‖δ‖²/2std²; its mean over z is minus the KL divergence."""
    mean, delta, z = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    std, delta = 0.3, 0.1 * delta
    x = mean + delta + std * z  # drawn under the policy
    ours = log_ratio(gaussian_log_prob(x, mean + delta, std), gaussian_log_prob(x, mean, std), 32, "sum")
    square = delta.square().flatten(1).sum(1) / (2 * std**2)
    assert torch.allclose(ours, (delta * z).flatten(1).sum(1) / std + square, rtol=1e-9)
    per_number = log_ratio(gaussian_log_prob(x, mean + delta, std), gaussian_log_prob(x, mean, std), 32, "mean")
    assert torch.allclose(per_number * 32, ours, rtol=1e-12)


def test_attempts_share_their_start_and_nothing_else() -> None:
    batch = make_rollouts(make_policy(eta=1.0, final_alpha=None), PROMPTS, 3)
    start, later = batch.latents[:, :, 0], batch.latents[:, :, 1]
    assert torch.equal(start[:, 0], start[:, 1]) and torch.equal(start[:, 0], start[:, 2])
    assert not torch.equal(start[0], start[1])
    assert all(not torch.equal(later[:, g], later[:, h]) for g, h in ((0, 1), (0, 2), (1, 2)))


def test_a_deterministic_step_has_no_density() -> None:
    policy = make_policy(eta=1.0)  # ends in sigma = 0
    batch = make_rollouts(policy, PROMPTS, 1)
    predict = policy.predict(batch.flat_prompts())
    with pytest.raises(ValueError, match="std 0"):
        transition_log_prob(predict, policy.schedule, 3, batch.at(3), batch.at(4), policy.eta)
