"""The norm of DRaFT-K's gradient against K, a prompt at a time, before any training (arXiv 2309.17400, §4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raydiff.bench.settings import GradientNorm
from raydiff.config import Run, override


def gradient_norms(run: Run, config: GradientNorm) -> list[dict[str, float]]:
    """For each K: mean, median and largest norm of the trained weights' gradient over single prompts, and the mean gradient's.

    The sampler is the paper's, DDIM. The last figure over the first tells how far the prompts agree.
    """
    run = override(run, {**ddim(config.steps), "batch": {"size": 1, "micro": 1}})
    return [{"k": k, **_norms(override(run, {"method": {"kind": "draft_k", "k": k}}), config.prompts)} for k in config.ks]


def ddim(steps: int) -> Mapping[str, Any]:
    """The paper's sampler as fields of a run."""
    return {"sampler.steps": steps, "sampler.eta": 0.0, "sampler.final_alpha": 1.0}


def _norms(run: Run, prompts: int) -> dict[str, float]:
    from raydiff.plan.cost import Backward
    from raydiff.session import Session

    session = Session(run)
    weights = list(session.model.trained().values())
    gradients = []  # (parameters,) each
    for step in range(prompts):
        session.update(Backward(), step)
        gradients.append(torch.cat([w.grad.flatten() for w in weights if w.grad is not None]))
        for w in weights:
            w.grad = None
    each = torch.stack(gradients)
    norms = each.norm(dim=1)
    return {
        "mean": float(norms.mean()),
        "median": float(norms.median()),
        "largest": float(norms.max()),
        "of_mean": float(each.mean(0).norm()),
    }
