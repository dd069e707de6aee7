"""Which part of a DRaFT-1 gradient's variance the re-noised copies of DRaFT-LV can average out (arXiv 2309.17400, §4.3).

Legend: P pictures, M copies of each, D trained weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raydiff.config import Run, override

COPIES = 8


def renoising(run: Run, pictures: int, copies: int = COPIES) -> dict[str, float]:
    """Variance of a single copy's gradient before any training, summed over the weights: between pictures, each of a prompt and
    a seed of its own, and within a picture; `share` is the latter's of both. With n copies `within` is divided by n."""
    gradients = torch.stack(list(_gradients(run, pictures, copies)))
    between, within = variances(gradients)
    return {"steps": run.sampler.steps, "between": between, "within": within, "share": within / (between + within)}


def variances(gradients: Tensor) -> tuple[float, float]:
    """(between pictures, within a picture) of (P,M,D), unbiased: the first of a one-way analysis of variance, at least 0."""
    within = float(gradients.var(1).sum(-1).mean())
    between = float(gradients.mean(1).var(0).sum()) - within / gradients.shape[1]
    return max(between, 0.0), within


def _gradients(run: Run, pictures: int, copies: int) -> list[Tensor]:
    """Of each picture, its copies' gradients (M,D): of -reward, as in training: a saturated pixel passes a gradient on only
    where a loss falls towards the inside."""
    from raydiff.methods.draft_lv import Plugin
    from raydiff.session import Session

    session = Session(override(run, {"method": {"kind": "draft_lv", "n": copies}, "batch": {"size": 1, "micro": 1}}))
    method, policy = session.method, session.policy
    assert isinstance(method, Plugin)
    weights, found = list(session.model.trained().values()), []
    for step in range(pictures):
        batch = session.sample(step, 0)
        prompts, seeds = batch.flat_prompts(), batch.flat_seeds()
        with torch.no_grad():
            clean = method.finish(policy, policy.predict(prompts), batch)
        latents = method.renoised(policy, clean, prompts, batch.loss_seeds(shared=False), [])
        rewards, _ = policy.rewards(latents, prompts * copies, seeds * copies)
        each = [torch.autograd.grad(-reward, weights, retain_graph=True) for reward in rewards]
        found.append(torch.stack([torch.cat([g.flatten() for g in gradient]) for gradient in each]))
    return found
