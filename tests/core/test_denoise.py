"""The one sampler: stored points, truncated gradients against finite differences, wrappers that change nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from raydiff.core.denoise import checkpointed, denoise, guided, mix, seeded_noise
from raydiff.core.policy import Policy
from tests.core.tiny import gradient, make_policy, smooth_reward

PROMPTS, SEEDS = ["a cat", "a horse"], [5, 6]


def reward_of(policy: Policy, grad_steps: int | None, latents: Tensor | None = None) -> Tensor:
    noise = seeded_noise(SEEDS, policy.model.latent_shape)
    x = noise(-1).double() if latents is None else latents
    first = 0 if latents is None else policy.schedule.steps - (grad_steps or 0)
    out, _ = denoise(
        policy.predict(PROMPTS), policy.schedule, x, first=first, eta=policy.eta, grad_steps=grad_steps, noise=noise
    )  # fmt: skip
    return smooth_reward(policy.model.decode(out), PROMPTS).mean()


def directional(policy: Policy, value: Callable[[], Tensor], direction: Tensor, h: float = 1e-5) -> float:
    """Central finite difference of value() along a direction of the trained weights."""
    delta = policy.model.trained()["delta"]
    with torch.no_grad():
        delta += h * direction
        up = float(value())
        delta -= 2 * h * direction
        down = float(value())
        delta += h * direction
    return (up - down) / (2 * h)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_full_gradient_equals_finite_differences_of_the_whole_chain(eta: float) -> None:
    policy = make_policy(eta=eta)
    direction = torch.randn(2, 6, 1, 1, dtype=torch.float64)
    ours = float(gradient(reward_of(policy, None), policy) @ direction.flatten())
    assert ours == pytest.approx(directional(policy, lambda: reward_of(policy, None), direction), rel=1e-6)


@pytest.mark.parametrize("k", [1, 2])
def test_truncated_gradient_equals_finite_differences_with_the_prefix_frozen(k: int) -> None:
    policy = make_policy()
    with torch.no_grad():
        x = seeded_noise(SEEDS, policy.model.latent_shape)(-1).double()
        point, _ = denoise(policy.predict(PROMPTS), policy.schedule, x, last=4 - k)
    direction = torch.randn(2, 6, 1, 1, dtype=torch.float64)
    ours = float(gradient(reward_of(policy, k), policy) @ direction.flatten())
    assert ours == pytest.approx(directional(policy, lambda: reward_of(policy, k, point), direction), rel=1e-6)
    whole = directional(policy, lambda: reward_of(policy, None), direction)
    assert abs(ours - whole) > 1e-3 * abs(whole)  # truncation is a bias, or the test above would see nothing


def test_k_of_n_steps_equals_untruncated_autograd_and_manual_detach() -> None:
    policy = make_policy(checkpointing=False)
    noise = seeded_noise(SEEDS, policy.model.latent_shape)

    def by_hand(detach_before: int | None) -> Tensor:
        x, predict = noise(-1).double(), policy.predict(PROMPTS)
        for i in range(policy.schedule.steps):
            x = x.detach() if i == detach_before else x
            x, _ = policy.schedule.transition(i, x, predict(x, policy.schedule.time(i, x)))
        return smooth_reward(policy.model.decode(x), PROMPTS).mean()

    assert torch.equal(gradient(reward_of(policy, 4), policy), gradient(by_hand(None), policy))
    assert torch.equal(gradient(reward_of(policy, 2), policy), gradient(by_hand(2), policy))


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_starting_from_a_kept_point_equals_the_whole_walk_bit_for_bit(eta: float) -> None:
    policy = make_policy(eta=eta, steps=6)
    noise = seeded_noise(SEEDS, policy.model.latent_shape)
    with torch.no_grad():
        whole, kept = denoise(
            policy.predict(PROMPTS), policy.schedule, noise(-1).double(), eta=eta, keep=(0, 2, 5, 6), noise=noise
        )
        for place, point in enumerate((0, 2, 5, 6)):
            resumed, _ = denoise(policy.predict(PROMPTS), policy.schedule, kept[:, place], first=point, eta=eta, noise=noise)
            assert torch.equal(resumed, whole)
    assert kept.shape == (2, 4, 2, 4, 4)


def test_prefix_has_no_graph() -> None:
    policy = make_policy(checkpointing=False)
    seen = []
    inner = policy.predict(PROMPTS)

    def watched(x: Tensor, time: Tensor) -> Tensor:
        out = inner(x, time)
        seen.append((x.requires_grad, out.requires_grad))
        return out

    denoise(watched, policy.schedule, torch.randn(2, 2, 4, 4, dtype=torch.float64), grad_steps=2)
    assert seen == [(False, False), (False, False), (False, True), (True, True)]


def test_checkpointing_changes_nothing() -> None:
    plain, recomputed = make_policy(checkpointing=False), make_policy(checkpointing=True)
    for k in (1, 3, None):
        a, b = gradient(reward_of(plain, k), plain), gradient(reward_of(recomputed, k), recomputed)
        assert torch.allclose(a, b, rtol=1e-12, atol=0)


def test_guidance_scale_one_is_the_conditional_branch_and_detach_stops_one_half() -> None:
    policy = make_policy()
    net, x, time = policy.denoiser, torch.randn(2, 2, 4, 4, dtype=torch.float64), torch.tensor([10.0, 10.0])
    codes = torch.tensor([0.0, 0.0, 0.5, 0.7], dtype=torch.float64)
    both = lambda x, t: net(x, t, codes)  # noqa: E731
    assert torch.allclose(guided(both, 1.0)(x, time), net(x, time, codes[2:]), rtol=1e-12)
    positive = net(x, time, codes[2:])
    stopped = gradient(guided(both, 3.0, detach_negative=True)(x, time).sum(), policy)
    assert torch.allclose(stopped, 3 * gradient(positive.sum(), policy))


def test_seeded_noise_depends_on_seed_and_step_alone() -> None:
    a, b = seeded_noise([1, 2, 3], (2, 4, 4)), seeded_noise([3], (2, 4, 4))
    assert torch.equal(a(7)[2:], b(7))
    assert not torch.equal(a(7), a(8))
    assert torch.equal(b(-1)[0], torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(3)))
    assert len({mix(i, j) for i in range(100) for j in range(100)}) == 10_000


def test_bad_ranges_are_refused() -> None:
    policy, x = make_policy(), torch.randn(2, 2, 4, 4, dtype=torch.float64)
    predict = checkpointed(policy.predict(PROMPTS))
    with pytest.raises(ValueError, match="first = 3, last = 2"):
        denoise(predict, policy.schedule, x, first=3, last=2)
    with pytest.raises(ValueError, match="keep"):
        denoise(predict, policy.schedule, x, first=2, keep=(1,))
    with pytest.raises(ValueError, match="eta"):
        denoise(predict, policy.schedule, x, eta=0.5)
