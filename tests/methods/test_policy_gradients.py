"""DDPO: log-probabilities that the sampler stored, advantages over the whole update, and the clipped policy gradient."""

import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from raydiff.config import ConfigError, Run
from raydiff.core.advantages import PerPrompt
from raydiff.core.log_prob import transition_log_prob
from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts
from raydiff.methods import ddpo
from raydiff.session import Session
from tests.core.tiny import gradient, make_policy, make_rollouts

PROMPTS = ("a cat", "a horse", "an ant", "a bee")
DDPO = ddpo.Plugin(history=0)
GRID = {"sampler.eta": 1.0, "sampler.final_alpha": None}
Make = Callable[..., Run]


def rollouts(policy: Policy, method: ddpo.Plugin = DDPO, rewards: Tensor | None = None) -> Rollouts:
    batch = make_rollouts(policy, PROMPTS, 2, rewards=rewards)
    weights = method.advantages()(batch.flat_prompts(), batch.total().flatten().double())
    return replace(batch, advantages=weights.view(batch.seeds.shape))


def make() -> Policy:
    return make_policy(eta=1.0, final_alpha=None)


def moved(policy: Policy, by: float) -> Policy:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.model.trained().values():
            p += by * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return policy


def ratios_by_hand(policy: Policy, batch: Rollouts) -> Tensor:
    """(R,S) mean log π_θ/π_old of each step, by torch's Normal; π_old from the stored log-probabilities."""
    assert batch.log_probs is not None
    predict, columns = policy.predict(batch.flat_prompts()), []
    for i in range(4):
        x = batch.at(i)
        mean, std = policy.schedule.transition(i, x, predict(x, policy.schedule.time(i, x)), 1.0)
        columns.append(Normal(mean, torch.tensor(std, dtype=torch.float64)).log_prob(batch.at(i + 1)).mean((1, 2, 3)))
    return torch.stack(columns, 1) - batch.log_probs.flatten(0, 1) / 32


def test_stored_log_probs_equal_a_re_evaluation_bit_for_bit(tiny_run: Make) -> None:
    """On Stable Diffusion's own classes, guided, with an adapter away from its start: every ratio is exactly 1."""
    session = Session(tiny_run("ddpo", GRID))
    with torch.no_grad():
        for p in session.model.trained().values():
            p += 0.05
    (batch, *_) = session.ready(session.batches(0))
    assert batch.log_probs is not None and batch.log_probs.dtype == torch.float32 and batch.log_probs.shape == (2, 1, 4)
    predict = session.policy.predict(batch.flat_prompts())
    for i in range(4):
        with torch.no_grad():
            again = transition_log_prob(predict, session.policy.schedule, i, batch.at(i), batch.at(i + 1), 1.0)
        assert torch.equal(again, batch.log_probs[:, 0, i])
    metrics = session.method.loss(session.policy, batch)[1]
    assert metrics["approximate_kl"] == 0 and metrics["clipped"] == 0


def test_the_first_update_is_the_policy_gradient() -> None:
    """-mean of A·∇log π, with means over the latent: REINFORCE."""
    policy = make()
    batch = rollouts(policy)
    assert batch.advantages is not None
    loss, _ = DDPO.loss(policy, batch)
    log_prob = ratios_by_hand(policy, batch)
    expected = gradient(-(batch.advantages.flatten()[:, None] * log_prob).mean(), policy)
    assert log_prob.detach().abs().max() < 1e-15 and expected.norm() > 1e-3
    assert torch.allclose(gradient(loss, policy), expected, rtol=1e-9)


def test_the_clipped_objective_by_hand() -> None:
    policy = make()
    batch, method = rollouts(policy), DDPO.model_copy(update={"clip": 1e-2 * 32 / 16384})  # ±0.01 for the mean over 32
    moved(policy, 0.02)
    assert batch.advantages is not None
    loss, metrics = method.loss(policy, batch)
    rho, a = ratios_by_hand(policy, batch).exp(), batch.advantages.flatten()[:, None]
    by_hand = torch.maximum(-a * rho, -a * rho.clamp(math.exp(-0.01), math.exp(0.01))).mean()
    assert 0 < metrics["clipped"] < 1
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-9)
    assert torch.allclose(gradient(loss, policy), gradient(by_hand, policy), rtol=1e-8)


@pytest.mark.parametrize(
    ("advantage", "ratio", "has_gradient"), [(1, 0.5, False), (1, -0.5, True), (-1, 0.5, True), (-1, -0.5, False)]
)
def test_a_step_that_went_far_enough_has_no_gradient(advantage: int, ratio: float, has_gradient: bool) -> None:
    """Log-ratios of ±0.5 per number, far beyond the bound, made by moving the stored log-probabilities."""
    policy = make()
    batch = rollouts(policy)
    assert batch.log_probs is not None
    batch = replace(batch, advantages=torch.full((4, 2), float(advantage)), log_probs=batch.log_probs - 32 * ratio)
    norm = gradient(DDPO.loss(policy, batch)[0], policy).norm()
    assert (norm > 1e-3) == has_gradient and (norm == 0) != has_gradient


def test_the_clip_is_the_same_nats_at_every_size() -> None:
    """1e-4 of a mean over 4·64·64 numbers is 1.6384 nats of the step's log-ratio (6.55 of SDXL's 4·128·128 unscaled)."""
    assert DDPO.bound(4 * 64 * 64) == pytest.approx(1e-4)
    total = DDPO.model_copy(update={"log_prob_reduction": "sum"})
    for size in (32, 512, 4 * 64 * 64, 4 * 128 * 128):
        assert DDPO.bound(size) * size == pytest.approx(1.6384) == pytest.approx(total.bound(size))


def test_the_sum_has_the_gradient_of_the_mean_times_d() -> None:
    policy = make()
    batch = rollouts(policy)
    mean, total = (
        gradient(DDPO.model_copy(update={"log_prob_reduction": r}).loss(policy, batch)[0], policy) for r in ("mean", "sum")
    )
    assert torch.allclose(total, 32 * mean, rtol=1e-9)


def test_constant_rewards_teach_nothing() -> None:
    policy = make()
    batch = rollouts(policy, rewards=torch.full((4, 2), 0.7))
    assert batch.advantages is not None and torch.count_nonzero(batch.advantages) == 0
    loss, _ = DDPO.loss(moved(policy, 0.02), batch)
    assert torch.count_nonzero(gradient(loss, policy)) == 0


def test_advantages_are_clamped() -> None:
    policy = make()
    batch = rollouts(policy)
    far, edge = (replace(batch, advantages=torch.full((4, 2), a)) for a in (50.0, 5.0))
    assert torch.equal(gradient(DDPO.loss(policy, far)[0], policy), gradient(DDPO.loss(policy, edge)[0], policy))


def test_half_of_the_steps_are_drawn() -> None:
    policy = make()
    batch, method = rollouts(policy), DDPO.model_copy(update={"timestep_fraction": 0.5})
    assert batch.advantages is not None
    steps = method.steps(batch)  # (2,B·G)
    assert len({tuple(s) for s in steps.T.tolist()}) > 1  # each prompt has its own
    chosen = ratios_by_hand(policy, batch).gather(1, steps.T)
    expected = gradient(-(batch.advantages.flatten()[:, None] * chosen).mean(), policy)
    assert torch.allclose(gradient(method.loss(policy, batch)[0], policy), expected, rtol=1e-9)


def test_two_halves_of_a_batch_are_one_batch() -> None:
    policy = make()
    whole = rollouts(policy)
    moved(policy, 0.02)
    loss = gradient(DDPO.loss(policy, whole)[0], policy)
    halves = [gradient(DDPO.loss(policy, whole.select(rows))[0], policy) for rows in ([0, 1], [2, 3])]
    assert torch.allclose(loss, (halves[0] + halves[1]) / 2, rtol=1e-9)


def test_running_advantages_by_hand() -> None:
    """Two prompts, 3 remembered, statistics of a prompt from 2 on."""
    tracker = PerPrompt(history=3, min_count=2)

    def z(reward: float, among: list[float]) -> float:
        return (reward - np.mean(among)) / (np.std(among) + 1e-6)

    def tell(*pairs: tuple[str, float]) -> list[float]:
        return tracker([p for p, _ in pairs], torch.tensor([r for _, r in pairs], dtype=torch.float64)).tolist()

    first = tell(("a", 1.0), ("b", 5.0), ("a", 2.0))
    assert first == pytest.approx([z(1, [1, 2]), z(5, [1, 5, 2]), z(2, [1, 2])])  # b has one reward: the update's statistics
    tracker = PerPrompt(3, 2, tracker.past)
    state = json.loads(json.dumps(tracker.state()))
    assert state == {"a": [1.0, 2.0], "b": [5.0]}
    second = tell(("b", 7.0), ("a", 4.0), ("a", 8.0))
    assert second == pytest.approx([z(7, [5, 7]), z(4, [2, 4, 8]), z(8, [2, 4, 8])])  # a's first reward is forgotten
    restored = PerPrompt(3, 2)
    restored.restore(state)
    assert restored(["b", "a", "a"], torch.tensor([7.0, 4.0, 8.0], dtype=torch.float64)).tolist() == second
    assert restored.state() == tracker.state()


def test_without_history_the_update_standardises() -> None:
    rewards = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    tracker = PerPrompt(0, 16)
    for _ in range(20):
        values = tracker(["a", "a", "b"], rewards)
    assert values.numpy() == pytest.approx((rewards.numpy() - 3) / (rewards.numpy().std() + 1e-6))


def test_any_number_of_workers_computes_the_same_advantages(tiny_run: Make) -> None:
    run = tiny_run("ddpo", {**GRID, "batch.size": 8, "method.attempts": 2, "method.min_count": 2})
    alone = Session(run)
    whole = list(alone.ready(alone.batches(0)))
    pair = [Session(run, rank=rank, workers=2) for rank in (0, 1)]
    sampled = [list(session.batches(0)) for session in pair]
    told: dict[tuple[int, int], list] = {}  # by rank and call, what it tells the others; a real Gather waits for it

    for _ in range(2):  # the first round only listens
        out = []
        for rank, session in enumerate(pair):
            session.advantages, calls = run.method.advantages(), itertools.count()

            def gather(value: list, rank: int = rank, calls: Iterator[int] = calls) -> list:
                call = next(calls)
                told[rank, call] = value
                return [told.get((other, call), value) for other in (0, 1)]

            session.gather = gather
            out.append(list(session.ready(sampled[rank])))
    both = [batch for together in zip(*out, strict=True) for batch in together]
    assert len(both) == len(whole) == 4
    for ours, theirs in zip(whole, both, strict=True):
        assert ours.advantages is not None and theirs.advantages is not None
        assert ours.prompts == theirs.prompts and torch.equal(ours.advantages, theirs.advantages)
    assert alone.state() == pair[0].state() == pair[1].state()
    total = torch.cat([b.advantages.flatten() for b in whole if b.advantages is not None])
    assert total.abs().sum() > 1  # and they say something

    def share(session: Session, batches: list[Rollouts]) -> Tensor:
        losses = [session.method.loss(session.policy, b)[0] for b in batches]
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(torch.stack(losses).mean(), list(session.model.trained().values()))]
        )

    halves = [share(session, list(batches)) for session, batches in zip(pair, out, strict=True)]
    one = share(alone, whole)
    assert one.norm() > 0
    assert float(((halves[0] + halves[1]) / 2 - one).norm() / one.norm()) < 1e-5  # two workers are one with both batches


def test_a_session_carries_its_advantages_through_a_checkpoint(tiny_run: Make) -> None:
    run = tiny_run("ddpo", {**GRID, "method.min_count": 1})
    first, second = Session(run), Session(run)
    list(first.ready(first.batches(0)))
    second.restore(json.loads(json.dumps(first.state())))
    ours, again, fresh = (
        torch.cat([b.advantages for b in s.ready(s.batches(1)) if b.advantages is not None])
        for s in (first, second, Session(run))
    )
    assert torch.equal(ours, again) and not torch.equal(ours, fresh)
    assert Session(tiny_run("draft_k")).state() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler.eta": 0.0}, "sampler.eta = 0"),
        ({"sampler.final_alpha": 1.0}, "sampler.final_alpha = 1"),
        ({"method.history": 8}, "method.history = 8 never holds method.min_count = 16"),
    ],
)
def test_what_cannot_work_is_refused_with_the_field_to_set(tiny_run: Make, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run("ddpo", {**GRID, **changes})


def test_the_reward_rises(tiny_run: Make) -> None:
    """A reward that is linear in x0, so that a small network can learn it: from its values alone, over fresh samples."""
    policy = make()
    optimizer = torch.optim.Adam(policy.model.trained().values(), lr=0.02)

    def update(step: int) -> float:
        batch = make_rollouts(policy, PROMPTS, 4, first_seed=10_000 * step)
        total = batch.at(4)[:, 0].mean((1, 2)).view(4, 4)
        batch = replace(
            batch, rewards={"total": total}, advantages=DDPO.advantages()(batch.flat_prompts(), total.flatten()).view(4, 4)
        )
        loss, _ = DDPO.loss(policy, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(total.mean())

    rewards = [update(step) for step in range(40)]
    spread = float(np.std(rewards[:10]))
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 3 * spread
