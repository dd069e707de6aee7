"""SFT: go on with the training loss of diffusion models, on the best samples alone: Diffusion-DPO's baseline
(arXiv 2311.12908, §5.2)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.denoising import noised
from raydiff.core.learner import Metrics
from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts
from raydiff.methods.base import PairMethod


class Plugin(PairMethod):
    """Denoising error of each prompt's best attempt: of the winner, where rollouts are a data set's labelled pairs."""

    kind: Literal["sft"] = "sft"
    attempts: int = Field(4, ge=1)
    caption_dropout: float = Field(0.1, ge=0, le=1)

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]:
        total, attempts = batch.total(), batch.seeds.shape[1]
        rows = (total.argmax(1).cpu() + torch.arange(len(batch)) * attempts).tolist()
        clean, seeds = batch.at(policy.schedule.steps)[rows], batch.loss_seeds(shared=False)
        noisy = noised(policy, clean, batch.prompts, [seeds[r] for r in rows], self.caption_dropout)
        loss = noisy.error(policy).mean()
        if self.labelled:  # of labels, always 0.5 and 1
            return loss, {}
        return loss, {"reward/total": total.mean(), "reward/best": total.amax(1).mean()}
