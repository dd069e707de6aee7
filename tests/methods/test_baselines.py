"""SFT and RWR: denoising errors of the best samples, or of all by weight."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from raydiff.config import Run
from raydiff.core.denoising import noised
from raydiff.methods import rwr, sft
from raydiff.session import Session
from tests.core.tiny import gradient, make_policy, make_rollouts

PROMPTS = ("a cat", "a horse", "an ant")
SFT = sft.Plugin(caption_dropout=0.0)
RWR = rwr.Plugin(caption_dropout=0.0)


def test_sft_is_the_denoising_error_of_the_best() -> None:
    policy = make_policy()
    batch = make_rollouts(policy, PROMPTS, 3, rewards=torch.tensor([[0.1, 0.9, 0.2], [3.0, 1.0, 2.0], [1.0, 0.0, 0.5]]))
    rows = [1, 3, 6]
    seeds = batch.loss_seeds(shared=False)
    asked = noised(policy, batch.at(4)[rows], list(PROMPTS), [seeds[r] for r in rows], 0.0)
    codes = torch.tensor([len(p) / 10 for p in PROMPTS], dtype=torch.float64)
    expected = (policy.denoiser(asked.x, asked.time, codes) - asked.target).square().mean()
    loss, metrics = SFT.loss(policy, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient(loss, policy), gradient(expected, policy), rtol=1e-9)
    assert metrics["reward/best"].item() == pytest.approx((0.9 + 3 + 1) / 3)


def test_sft_takes_the_winners_of_labelled_pairs() -> None:
    policy = make_policy()
    batch = make_rollouts(policy, PROMPTS, 2, rewards=torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    winners = torch.tensor([1, 0, 1])
    rows = torch.arange(3)
    alone = replace(
        batch,
        seeds=batch.seeds[rows, winners][:, None],
        latents=batch.latents[rows, winners][:, None],
        log_probs=None,
        rewards={"total": torch.ones(3, 1)},
    )
    assert SFT.loss(policy, batch)[0].item() == pytest.approx(SFT.loss(policy, alone)[0].item(), rel=1e-12)


def test_rwr_weights_by_hand() -> None:
    rewards = torch.tensor([0.0, 1.0, 3.0, 2.0], dtype=torch.float64)
    odds = torch.exp(0.5 * rewards)
    assert torch.allclose(RWR.model_copy(update={"beta": 0.5}).weights(rewards), 4 * odds / odds.sum())
    assert RWR.model_copy(update={"beta": 0.0}).weights(rewards).tolist() == [1, 1, 1, 1]
    assert RWR.model_copy(update={"top": 0.5}).weights(rewards).tolist() == [0, 0, 2, 2]
    assert RWR.model_copy(update={"top": 0.1}).weights(rewards).tolist() == [0, 0, 4, 0]


def test_rwr_is_the_weighted_error_and_plain_sft_at_equal_weights() -> None:
    policy = make_policy()
    batch = make_rollouts(policy, PROMPTS, 1)
    flat = replace(batch, advantages=torch.ones(3, 1, dtype=torch.float64))
    assert RWR.loss(policy, flat)[0].item() == pytest.approx(SFT.loss(policy, batch)[0].item(), rel=1e-12)
    one = replace(batch, advantages=torch.tensor([[0.0], [3.0], [0.0]], dtype=torch.float64))
    assert RWR.loss(policy, one)[0].item() == pytest.approx(SFT.loss(policy, batch.select([1]))[0].item(), rel=1e-12)


def test_rwr_normalises_over_the_update_not_the_micro_batch(tiny_run: Callable[..., Run]) -> None:
    session = Session(tiny_run("rwr", {"method.beta": 20.0}))
    batches = list(session.ready(session.batches(0)))
    assert len(batches) == 2
    weights, rewards = (
        torch.cat([getattr(b, part)() if part == "total" else b.advantages for b in batches]).flatten()
        for part in ("weights", "total")
    )
    assert torch.allclose(weights, 4 * torch.softmax(20 * rewards.double(), 0).float())
    assert batches[0].advantages is not None and batches[0].advantages.sum() != pytest.approx(2.0, rel=1e-3)
