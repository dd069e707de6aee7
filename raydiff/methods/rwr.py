"""RWR: the training loss of diffusion models, on all samples, weighted by reward: DDPO's baseline (arXiv 2305.13301, §4.2;
Peters & Schaal 2007)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.advantages import OfUpdate
from raydiff.core.denoising import noised
from raydiff.core.learner import Metrics
from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts
from raydiff.methods.base import CleanMethod


class Plugin(CleanMethod):
    """Mean over samples of weight × denoising error; the weights of an update's N samples, over all workers, have mean 1."""

    kind: Literal["rwr"] = "rwr"
    beta: float = Field(1.0, ge=0)
    """Weights are N·softmax(beta·reward): 0 trains on all samples alike, large values on the best one."""
    top: float | None = Field(None, gt=0, le=1)
    """Instead: the same weight for this share of the samples, the best ones, and none for the others (RWR-sparse)."""
    caption_dropout: float = Field(0.1, ge=0, le=1)

    def advantages(self) -> OfUpdate:
        return OfUpdate(self.weights)

    def weights(self, rewards: Tensor) -> Tensor:
        """(N,) -> (N,), mean 1."""
        if self.top is None:
            return len(rewards) * torch.softmax(self.beta * rewards, 0)
        chosen = rewards.topk(math.ceil(self.top * len(rewards))).indices
        return torch.zeros_like(rewards).index_fill(0, chosen, len(rewards) / len(chosen))

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]:
        assert batch.advantages is not None
        clean, seeds = batch.at(policy.schedule.steps), batch.loss_seeds(shared=False)
        noisy = noised(policy, clean, batch.flat_prompts(), seeds, self.caption_dropout)
        weights = batch.advantages.flatten()
        loss = (weights * noisy.error(policy)).mean()
        # The mean square of weights of mean 1: N over it is how many samples count, in effect (Kish 1965).
        return loss, {"reward/total": batch.total().mean(), "weight/square": weights.square().mean()}
