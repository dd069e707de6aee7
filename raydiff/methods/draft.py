"""DRaFT: ascend the reward's gradient through the sampler (Clark et al. 2024, arXiv 2309.17400, algorithm 1).

Legend: B images, C h w latent, S sampler steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from raydiff.core.denoise import Predict, denoise
from raydiff.core.guard import squared_distance
from raydiff.core.learner import Metrics
from raydiff.core.policy import Policy
from raydiff.core.reward_vjp import Parts
from raydiff.core.rollouts import Rollouts
from raydiff.methods.base import RewardGradientMethod


class Draft(RewardGradientMethod):
    """Loss -r(decode(x0)) with the gradient of the last `grad_steps` sampler steps; here all of them."""

    def grad_steps(self, steps: int) -> int:
        return steps

    def keep(self, steps: int, rng: torch.Generator) -> tuple[int, ...]:
        return (steps - self.grad_steps(steps),)

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]:
        prompts, seeds = batch.flat_prompts(), batch.flat_seeds()
        predict, drift = with_drift(policy, policy.predict(prompts), prompts, self.kl)
        latents = self.finish(policy, predict, batch)
        total, parts = policy.rewards(latents, prompts, seeds)
        return reward_loss(total, parts, drift, self.kl)

    def finish(self, policy: Policy, predict: Predict, batch: Rollouts) -> Tensor:
        """From the kept point to x0 with gradient: (B,C,h,w)."""
        (point,) = batch.kept
        noise = policy.noise(batch.flat_seeds())
        return denoise(predict, policy.schedule, batch.at(point), first=point, eta=policy.eta, noise=noise)[0]


class Plugin(Draft):
    kind: Literal["draft"] = "draft"


def with_drift(policy: Policy, predict: Predict, prompts: list[str], kl: float) -> tuple[Predict, list[Tensor]]:
    """Wrap `predict` so that each call appends mean squared (policy - reference) output of each image, (B,), to the list.

    The list stays empty at kl = 0. NeMo's DRaFT+: the squared error of guided outputs at the same x_t. The reference's weights
    are frozen, but its x_t is the policy's: from the second step with gradient on, the penalty's gradient flows through both.
    """
    drift: list[Tensor] = []
    if not kl:
        return predict, drift
    reference = policy.predict(prompts, reference=True)

    def measured(x: Tensor, time: Tensor) -> Tensor:
        out = predict(x, time)
        drift.append(squared_distance(out, reference(x, time)))
        return out

    return measured, drift


def reward_loss(total: Tensor, parts: Parts, drift: list[Tensor], kl: float) -> tuple[Tensor, Metrics]:
    """-mean reward + kl·mean drift, and the metrics that every reward-gradient method reports."""
    loss = -total.mean()
    metrics = {"reward/total": total.detach().mean(), **{f"reward/{name}": part.mean() for name, part in parts.items()}}
    if drift:
        penalty = torch.stack(drift).mean()
        loss = loss + kl * penalty
        metrics["kl"] = penalty.detach()
    return loss, metrics
