"""The denoising error against its definition, and its draws: a function of each row's seed."""

import torch

from raydiff.core.denoising import noised
from raydiff.core.schedule import Schedule, alphas_cumprod
from tests.core.tiny import SD, make_policy

SEEDS = [3, 4, 3]
PROMPTS = ["a cat", "a horse", "an ant"]
CLEAN = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_the_error_is_that_of_a_forward_by_hand() -> None:
    policy = make_policy(guidance=3.0)
    ours = noised(policy, CLEAN, PROMPTS, SEEDS, 0.0)
    bar = alphas_cumprod(SD)[ours.time.long()][:, None, None, None]
    assert torch.allclose(
        ours.x, bar.sqrt() * CLEAN + (1 - bar).sqrt() * ours.target
    )  # eps prediction: the target is the noise
    codes = torch.tensor([len(p) / 10 for p in PROMPTS], dtype=torch.float64)
    out = policy.denoiser(ours.x, ours.time, codes)  # one conditional call: no guidance
    expected = torch.stack([((out[r] - ours.target[r]) ** 2).sum() / 32 for r in range(3)])
    assert torch.allclose(ours.error(policy), expected, rtol=1e-12)
    assert policy.calls.denoiser_forward == 3


def test_rows_of_one_seed_share_their_draws_in_any_batch() -> None:
    policy = make_policy()
    ours = noised(policy, CLEAN, PROMPTS, SEEDS, 0.5)
    assert torch.equal(ours.target[0], ours.target[2]) and ours.time[0] == ours.time[2]
    assert not torch.equal(ours.target[0], ours.target[1]) and ours.time[0] != ours.time[1]
    alone = noised(policy, CLEAN[1:2], PROMPTS[1:2], SEEDS[1:2], 0.5)
    assert torch.equal(alone.x[0], ours.x[1]) and alone.time[0] == ours.time[1] and alone.prompts[0] == ours.prompts[1]


def test_steps_are_uniform_over_training_and_captions_drop_as_often_as_asked() -> None:
    n = 4000
    ours = noised(make_policy(), CLEAN[:1].expand(n, -1, -1, -1), ["a cat"] * n, list(range(n)), 0.2)
    assert ours.time.min() <= 3 and ours.time.max() >= 996
    assert abs(float(ours.time.mean()) - 499.5) < 5 * 289 / n**0.5
    assert abs(ours.prompts.count("") / n - 0.2) < 5 * (0.16 / n) ** 0.5


def test_the_target_is_what_splits_back_for_every_output() -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for config in ({**SD}, {**SD, "prediction_type": "v_prediction"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}):
        schedule = Schedule.from_config(config, 8)
        i = torch.tensor([1, 5])
        x0_hat, eps_hat = schedule.split(schedule.target(x0, eps, i), schedule.add_noise(x0, eps, i), i)
        assert torch.allclose(x0_hat, x0) and torch.allclose(eps_hat, eps)


def test_all_training_steps_are_on_the_training_schedule() -> None:
    schedule = make_policy().training_schedule
    assert torch.equal(schedule.times, torch.arange(1000).flip(0))
    assert torch.allclose(schedule.alpha[:-1].flip(0) ** 2, alphas_cumprod(SD))
