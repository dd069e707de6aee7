"""DRaFT-K: DRaFT with the gradient truncated to the last K sampler steps (arXiv 2309.17400, §4.2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raydiff.config import Run
from raydiff.methods.draft import Draft


class Plugin(Draft):
    kind: Literal["draft_k"] = "draft_k"
    k: int = Field(1, ge=1)
    """Steps with gradient; K = sampler.steps is DRaFT. The paper's practical choice is 1."""

    def grad_steps(self, steps: int) -> int:
        return self.k

    def check(self, run: Run) -> None:
        if self.k > run.sampler.steps:
            raise ValueError(f"method.k = {self.k} is more than sampler.steps = {run.sampler.steps}: lower k, or use draft")
        super().check(run)
