"""The DRaFT family on a float64 model: identities between the methods, and against gradients taken by hand."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from raydiff.core.denoise import denoise
from raydiff.core.policy import NonFiniteReward, Policy
from raydiff.core.reward_vjp import score_and_grad, weighted_sum, with_remote_gradient
from raydiff.core.rollouts import Rollouts
from raydiff.methods import draft, draft_k, draft_lv, refl
from raydiff.methods.base import Method
from tests.core.tiny import gradient, make_policy, smooth_reward

PROMPTS, SEEDS = ("a cat", "a horse", "an ant"), torch.tensor([[5], [6], [7]])


def rollouts(policy: Policy, method: Method, rng_seed: int = 0) -> Rollouts:
    kept = method.keep(policy.schedule.steps, torch.Generator().manual_seed(rng_seed))
    _, points = policy.sample(list(PROMPTS), SEEDS.flatten().tolist(), last=max(kept), keep=kept)
    return Rollouts(PROMPTS, SEEDS, points.unflatten(0, SEEDS.shape).double(), kept)


def method_gradient(policy: Policy, method: Method, batch: Rollouts | None = None) -> Tensor:
    loss, _ = method.loss(policy, batch or rollouts(policy, method))
    return gradient(loss, policy)


def test_draft_is_the_gradient_of_the_negative_mean_reward_through_every_step() -> None:
    policy = make_policy()
    x = policy.noise(SEEDS.flatten().tolist())(-1).double()
    latents, _ = denoise(policy.predict(PROMPTS), policy.schedule, x)
    expected = gradient(-smooth_reward(policy.model.decode(latents), PROMPTS).mean(), policy)
    assert torch.allclose(method_gradient(policy, draft.Plugin()), expected, rtol=1e-12)


def test_draft_k_of_all_steps_is_draft_and_fewer_is_not() -> None:
    policy = make_policy()
    full = method_gradient(policy, draft.Plugin())
    assert torch.equal(method_gradient(policy, draft_k.Plugin(k=4)), full)
    assert not torch.allclose(method_gradient(policy, draft_k.Plugin(k=1)), full, rtol=1e-3)


def test_gradient_norm_grows_with_k() -> None:
    policy = make_policy(steps=6)
    norms = [float(method_gradient(policy, draft_k.Plugin(k=k)).norm()) for k in (1, 6)]
    assert norms[1] > norms[0]


def test_refl_at_the_last_step_is_draft_1_when_the_grid_ends_noise_free() -> None:
    policy = make_policy()
    ours, other = method_gradient(policy, refl.Plugin(last_steps=1)), method_gradient(policy, draft_k.Plugin(k=1))
    assert torch.allclose(ours, other, rtol=1e-10)


def test_refl_draws_one_late_step_for_everyone() -> None:
    method, drawn = refl.Plugin(last_steps=3), set()
    for seed in range(40):
        (point,) = method.keep(10, torch.Generator().manual_seed(seed))
        assert (point,) == method.keep(10, torch.Generator().manual_seed(seed))
        drawn.add(point)
    assert drawn == {7, 8, 9}


def test_lv_equals_its_terms_one_by_one() -> None:
    """n batched copies and the original = the mean of n + 1 separate gradients."""
    policy, method = make_policy(), draft_lv.Plugin(n=3)
    batch = rollouts(policy, method)
    prompts = batch.flat_prompts()
    original = method_gradient(policy, draft_k.Plugin(k=1), batch)
    with torch.no_grad():
        clean = method.finish(policy, policy.predict(prompts), batch)

    def copy_gradient(k: int) -> Tensor:
        mine = method.renoised(policy, clean, prompts, batch.loss_seeds(shared=False), [])[3 * k : 3 * k + 3]
        return gradient(-smooth_reward(policy.model.decode(mine), prompts).mean(), policy)

    terms = [original, *(copy_gradient(k) for k in range(3))]
    assert torch.allclose(method_gradient(policy, method, batch), torch.stack(terms).mean(0), rtol=1e-9)
    alone = method_gradient(policy, draft_lv.Plugin(n=3, include_original=False), batch)
    assert torch.allclose(alone, torch.stack(terms[1:]).mean(0), rtol=1e-9)


def test_lv_copies_are_one_jump_from_the_last_noise_level() -> None:
    policy, method = make_policy(), draft_lv.Plugin(n=2)
    clean = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    copies = method.renoised(policy, clean, list(PROMPTS), [5, 6, 7], [])
    assert copies.shape == (6, 2, 4, 4) and not torch.allclose(copies[:3], copies[3:])
    sigma, alpha = float(policy.schedule.sigma[3]), float(policy.schedule.alpha[3])
    # without a network the jump would give x0 + sigma/alpha·eps; the network's part is bounded, so the distance shows the level
    spread = float((copies.detach() - clean.repeat(2, 1, 1, 1)).std())
    assert 0.5 * sigma / alpha < spread < 4 * sigma / alpha


@pytest.mark.parametrize("n", [1, 2, 4])
def test_lv_keeps_the_mean_gradient_and_divides_its_variance_by_n(n: int) -> None:
    """Over fresh noise, copies of a fixed x0 (design: variance 2.5e-3, 1.6e-3, 7.0e-4 for n = 1, 2, 4)."""
    policy = make_policy()
    clean = torch.randn(3, 2, 4, 4, dtype=torch.float64)

    def draws(n: int, count: int, start: int) -> Tensor:
        out = []
        for seed in range(start, start + count):
            copies = draft_lv.Plugin(n=n).renoised(policy, clean, list(PROMPTS), [3 * seed, 3 * seed + 1, 3 * seed + 2], [])
            out.append(gradient(-smooth_reward(policy.model.decode(copies), list(PROMPTS) * n).mean(), policy))
        return torch.stack(out)

    one, ours = draws(1, 300, 0), draws(n, 300, 10_000)
    ratio = float(ours.var(0).sum() / one.var(0).sum())
    assert ratio == pytest.approx(1 / n, rel=0.3)
    error = (one.var(0).sum() / 300 + ours.var(0).sum() / 300).sqrt()
    assert float((ours.mean(0) - one.mean(0)).norm()) < 3 * float(error)


def test_lv_gradient_stops_at_x0() -> None:
    """d(copies)/d(prefix) = 0: the weights reach a copy through its own jump alone."""
    policy, method = make_policy(), draft_lv.Plugin(n=2)
    batch = rollouts(policy, method)
    prompts, seeds = batch.flat_prompts(), batch.flat_seeds()
    clean = method.finish(policy, policy.predict(prompts), batch)
    assert clean.requires_grad
    attached = method.renoised(policy, clean.detach(), prompts, seeds, [])
    assert torch.autograd.grad(attached.sum(), clean, allow_unused=True)[0] is None


def test_lv_copies_of_a_second_pass_are_others() -> None:
    policy, method = make_policy(), draft_lv.Plugin(n=2)
    batch = rollouts(policy, method)
    first, second = (method_gradient(policy, method, replace(batch, epoch=epoch)) for epoch in (0, 1))
    assert not torch.allclose(first, second, rtol=1e-3)
    assert torch.equal(first, method_gradient(policy, method, batch))


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5, 6])
def test_kl_gradient_is_that_of_the_logged_penalty(k: int, checkpointing: bool) -> None:
    """By finite differences, also where x_t of the later steps moves with the weights; 6 steps are the whole chain."""
    policy = make_policy(steps=6, checkpointing=checkpointing)
    method = draft_k.Plugin(k=k, kl=1.0)
    batch, delta = rollouts(policy, method), policy.model.trained()["delta"]
    penalty = method.loss(policy, batch)[0] - method.model_copy(update={"kl": 0.0}).loss(policy, batch)[0]
    analytic = gradient(penalty, policy)
    for seed in range(3):
        direction = torch.randn(delta.shape, dtype=delta.dtype, generator=torch.Generator().manual_seed(seed))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                delta.add_(direction, alpha=sign * 1e-5)
                ends.append(float(method.loss(policy, batch)[1]["kl"]))
                delta.add_(direction, alpha=-sign * 1e-5)
        assert float(analytic @ direction.flatten()) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5)


@pytest.mark.parametrize(
    "method", [draft.Plugin(kl=0.5), draft_k.Plugin(k=2, kl=0.5), draft_lv.Plugin(kl=0.5), refl.Plugin(last_steps=2, kl=0.5)]
)
def test_kl_term_is_the_mean_squared_distance_to_the_reference(method: draft.Draft) -> None:
    policy = make_policy()
    batch = rollouts(policy, method)
    loss, metrics = method.loss(policy, batch)
    without, _ = method.model_copy(update={"kl": 0.0}).loss(policy, batch)
    assert float((loss - without).detach()) == pytest.approx(0.5 * float(metrics["kl"]), rel=1e-9) and metrics["kl"] > 0
    assert gradient(loss, policy).norm() > 0
    with torch.no_grad():
        policy.model.trained()["delta"].zero_()
    assert float(method.loss(policy, batch)[1]["kl"]) == 0.0


def test_kl_of_draft_1_by_hand() -> None:
    policy, method = make_policy(), draft_k.Plugin(k=1, kl=1.0)
    batch = rollouts(policy, method)
    x, predict = batch.at(3), policy.predict(batch.flat_prompts())
    time = policy.schedule.time(3, x)
    with torch.no_grad():
        ours = predict(x, time)
        with policy.model.reference():
            base = predict(x, time)
    assert float(method.loss(policy, batch)[1]["kl"]) == pytest.approx(float((ours - base).square().mean()), rel=1e-9)


@pytest.mark.parametrize("method", [draft.Plugin(), draft_k.Plugin(k=2), draft_lv.Plugin(), refl.Plugin(last_steps=2)])
def test_remote_gradient_equals_local_backpropagation(method: Method) -> None:
    policy = make_policy()
    local = method_gradient(policy, method)
    double = weighted_sum({"smooth": smooth_reward, "again": smooth_reward}, {"smooth": 0.75, "again": 0.25})
    policy.score = with_remote_gradient(score_and_grad(double))
    assert float((method_gradient(policy, method) - local).norm() / local.norm()) <= 1e-12


def test_calls_count_what_was_spent() -> None:
    policy, method = make_policy(guidance=3.0), draft_lv.Plugin(n=2)
    method_gradient(policy, method)
    calls = policy.calls
    assert (calls.images, calls.reward_queries) == (3, 9)
    # 3 images × 2 branches: 3 steps before x_1, then the step and two copies, each of which is computed twice
    assert calls.denoiser_forward == 6 * (3 + 2 * 3) and calls.denoiser_backward == 6 * 3


def test_a_reward_that_is_not_finite_names_itself_the_prompt_and_the_seed() -> None:
    policy = make_policy()

    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        return torch.where(torch.tensor(["horse" in p for p in prompts]), torch.nan, smooth_reward(images, prompts))

    policy.score = weighted_sum({"fine": smooth_reward, "broken": broken}, {"fine": 1.0, "broken": 1.0})
    with pytest.raises(NonFiniteReward, match=r"'broken' is nan for prompt 'a horse', seed 6"):
        method_gradient(policy, draft_k.Plugin())
