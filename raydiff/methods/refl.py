"""ReFL: one step with gradient at a random late point, then a jump to its x0_hat (Xu et al. 2023, arXiv 2304.05977)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.config import Run
from raydiff.core.denoise import Predict
from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts
from raydiff.methods.draft import Draft


class Plugin(Draft):
    kind: Literal["refl"] = "refl"
    last_steps: int = Field(10, ge=1)
    """The step with gradient is drawn from the last so many, once per update for all workers: the official code draws per
    worker and makes them wait for each other. 1 is DRaFT-1, if the grid ends in alpha-bar = 1."""

    def keep(self, steps: int, rng: torch.Generator) -> tuple[int, ...]:
        return (steps - 1 - int(torch.randint(self.last_steps, (), generator=rng)),)

    def finish(self, policy: Policy, predict: Predict, batch: Rollouts) -> Tensor:
        (point,) = batch.kept
        x = batch.at(point)
        return policy.schedule.split(predict(x, policy.schedule.time(point, x)), x, point)[0]

    def check(self, run: Run) -> None:
        if self.last_steps > run.sampler.steps:
            raise ValueError(f"method.last_steps = {self.last_steps} exceeds sampler.steps = {run.sampler.steps}: lower it")
        super().check(run)
