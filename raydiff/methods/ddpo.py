"""DDPO: policy gradient on the sampler's steps, with clipped importance ratios (Black et al. 2024, arXiv 2305.13301, eq. 5).

Legend: B prompts, G attempts, R = B·G, D numbers of a latent.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.config import Run
from raydiff.core.advantages import PerPrompt
from raydiff.core.learner import Metrics
from raydiff.core.log_prob import log_ratio, transition_log_prob
from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts
from raydiff.methods.base import TrajectoryMethod

_PUBLISHED_D = 4 * 64 * 64  # of the latents that the official clip was chosen for


class Plugin(TrajectoryMethod):
    """max(-A·ρ, -A·clipped ρ) at each step, with ρ = π_θ/π_old of the step; π_old are the weights that sampled."""

    kind: Literal["ddpo"] = "ddpo"
    clip: float = Field(1e-4, gt=0)
    """Bound on |log ρ| as published, for the mean over the 4·64·64 numbers of a 512-pixel latent: 1.64 nats of the step's true
    log-ratio. At any D, and with either reduction, the bound is these clip·16384 nats."""
    max_advantage: float = Field(5.0, gt=0)
    """Advantages are clamped to ± this."""
    history: int = Field(32, ge=0)
    """Rewards remembered per prompt, whose mean and standard deviation standardise; 0: those of the update always."""
    min_count: int = Field(16, ge=1)
    """A prompt with fewer remembered rewards is standardised by the update's."""

    @property
    def needs_log_probs(self) -> bool:
        return True

    def advantages(self) -> PerPrompt:
        return PerPrompt(self.history, self.min_count)

    def check(self, run: Run) -> None:
        super().check(run)
        if 0 < self.history < self.min_count:
            raise ValueError(
                f"method.history = {self.history} never holds method.min_count = {self.min_count} rewards:"
                " raise history, lower min_count, or set history to 0 to standardise by the update alone"
            )

    def bound(self, size: int) -> float:
        """On |log ρ| for latents of `size` numbers: the same nats of the true log-ratio at any size."""
        nats = self.clip * _PUBLISHED_D
        return nats / size if self.log_prob_reduction == "mean" else nats

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]:
        """One graph over all steps: with gradient checkpointing each adds a few latents to it, not a network's activations."""
        assert batch.log_probs is not None and batch.advantages is not None
        predict, steps = policy.predict(batch.flat_prompts()), self.steps(batch)
        size = math.prod(policy.model.latent_shape)

        def log_rho(i: Tensor) -> Tensor:
            new = transition_log_prob(predict, policy.schedule, i, batch.at(i), batch.at(i + 1), policy.eta)
            return log_ratio(new, old.gather(1, i[:, None].to(old.device))[:, 0], size, self.log_prob_reduction)

        old = batch.log_probs.flatten(0, 1)  # (R,S)
        ratio, bound = torch.stack([log_rho(i) for i in steps], 1), self.bound(size)  # (R,steps)
        advantage = batch.advantages.flatten()[:, None].clamp(-self.max_advantage, self.max_advantage)
        nats = ratio.detach() * (size if self.log_prob_reduction == "mean" else 1)
        loss = torch.maximum(-advantage * ratio.exp(), -advantage * ratio.clamp(-bound, bound).exp()).mean()
        return loss, {
            "reward/total": batch.total().mean(),
            "advantage": advantage.abs().mean(),
            "clipped": (ratio.detach().abs() > bound).float().mean(),
            "approximate_kl": 0.5 * nats.square().mean(),  # of a step, in nats: half the squared log-ratio
        }
