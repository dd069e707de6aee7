"""DRaFT-LV: DRaFT-1 plus n re-noised copies of its own x0, for a gradient of lower variance (arXiv 2309.17400, §4.3).

Legend: B images, n re-noised copies, C h w latent.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.denoise import mix, seeded_noise
from raydiff.core.learner import Metrics
from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts
from raydiff.methods.draft import Draft, reward_loss, with_drift


class Plugin(Draft):
    kind: Literal["draft_lv"] = "draft_lv"
    n: int = Field(2, ge=1)
    """Re-noised copies of each x0."""
    include_original: bool = True
    """Average over the DRaFT-1 term and the n copies, as in the paper's algorithm; false: over the copies alone."""

    def grad_steps(self, steps: int) -> int:
        return 1

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]:
        """The paper sums the n + 1 terms; the mean has the same direction and leaves the learning rate's meaning alone."""
        prompts, seeds = batch.flat_prompts(), batch.flat_seeds()
        predict, drift = with_drift(policy, policy.predict(prompts), prompts, self.kl)
        with torch.set_grad_enabled(self.include_original):
            clean = self.finish(policy, predict, batch)
        if not self.include_original:
            drift.clear()  # that call had no graph
        copies = self.renoised(policy, clean.detach(), prompts, batch.loss_seeds(shared=False), drift)
        terms = torch.cat([clean, copies]) if self.include_original else copies
        times = len(terms) // len(prompts)
        total, parts = policy.rewards(terms, prompts * times, seeds * times)
        return reward_loss(total, parts, drift, self.kl)

    def renoised(self, policy: Policy, clean: Tensor, prompts: list[str], seeds: list[int], drift: list[Tensor]) -> Tensor:
        """x0_hat of n fresh noisings of `clean` (B,C,h,w) at the last grid step: (n·B,C,h,w), in one batched call.

        `seeds` are of what the loss draws for each image, so that each pass over an update's samples re-noises them anew.
        """
        last = policy.schedule.steps - 1
        prompts = prompts * self.n
        fresh = [mix(seed, k) for k in range(self.n) for seed in seeds]
        x0 = clean.repeat(self.n, 1, 1, 1)
        x = policy.schedule.add_noise(x0, seeded_noise(fresh, clean.shape[1:], clean.device)(-1).to(x0), last)
        predict, more = with_drift(policy, policy.predict(prompts), prompts, self.kl)
        out = predict(x, policy.schedule.time(last, x))
        drift.extend(part for d in more for part in d.chunk(self.n))
        return policy.schedule.split(out, x, last)[0]
