"""The one way from a model and a run's sampler to pictures: training, evaluation, `generate` and the batch tools take it."""

from __future__ import annotations

from raydiff.config import Sampler
from raydiff.core.policy import LatentModel, Policy
from raydiff.core.reward_vjp import Score, weighted_sum


def policy(model: LatentModel, sampler: Sampler, score: Score | None = None, *, gradient_checkpointing: bool = False) -> Policy:
    """The model on the sampler's grid. Without `score` every reward is 0."""
    return Policy(
        model=model,
        denoiser=model.denoiser,
        schedule=model.schedule(sampler.steps, sampler.spacing, sampler.final_alpha),
        score=score or weighted_sum({}, {}),
        guidance=sampler.guidance,
        eta=sampler.eta,
        detach_negative=sampler.detach_negative,
        gradient_checkpointing=gradient_checkpointing,
    )
