"""How far training has moved from the model it began with, and how alike its pictures are: what over-optimisation looks like.

Legend: B images, N probed points, C h w latent, E embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydiff.core.policy import Policy

METRICS = ("drift", "latent_norm", "diversity")
_POINTS = 4


@dataclass(frozen=True)
class Probe:
    """What the model from before training does on fixed prompts and seeds."""

    points: tuple[int, ...]  # N grid points, spread evenly from the noise to the last step
    latents: Tensor  # (B,N,C,h,w) on its own way
    outputs: Tensor  # (B,N,C,h,w) its guided outputs there
    norm: Tensor  # (B,) of its clean latents

    @classmethod
    @torch.no_grad()
    def of(cls, policy: Policy, prompts: Sequence[str], seeds: Sequence[int]) -> Probe:
        """One walk of the model that `policy.model.reference()` gives, and a call at each point."""
        last = policy.schedule.steps - 1
        points = tuple(sorted({round(last * n / (_POINTS - 1)) for n in range(_POINTS)}))
        with policy.model.reference():
            clean, latents = policy.sample(prompts, seeds, keep=points)
            return cls(points, latents, _outputs(policy, prompts, latents, points), _norm(clean))

    @torch.no_grad()
    def drift(self, policy: Policy, prompts: Sequence[str]) -> Tensor:
        """Mean squared difference of the policy's guided outputs to the base's, over points, C, h and w: (B,).

        The KL of a step up to its factor: with mean a·x + b·out and standard deviation s it is b²·C·h·w/(2s²) times this. A
        deterministic sampler has no KL, and this it has.
        """
        outputs = _outputs(policy, prompts, self.latents, self.points)
        return squared_distance(outputs.flatten(0, 1), self.outputs.flatten(0, 1)).view(len(prompts), -1).mean(1)

    def latent_norm(self, clean: Tensor) -> Tensor:
        """Norm of the policy's clean latents (B,C,h,w) over that of the base's, (B,): 1 before training."""
        return _norm(clean) / self.norm


def squared_distance(out: Tensor, reference: Tensor) -> Tensor:
    """Squared difference of two outputs (B,C,h,w), MEAN over C,h,w: (B,)."""
    return (out - reference).square().flatten(1).mean(1)


def diversity(embeddings: Tensor) -> float:
    """Mean cosine distance of all pairs of unit vectors (B,E), B at least 2: 0 when all are alike, 1 when all are orthogonal.

    By |Σe|² = B + Σ_{i≠j} e_i·e_j. The vectors' own lengths stand for B, so that equal ones give 0 to the last digits.
    """
    e, count = embeddings.double(), len(embeddings)
    lengths = e.square().sum()
    pairs = e.sum(0).square().sum() - lengths
    return float(lengths / count - pairs / (count * (count - 1)))


def _outputs(policy: Policy, prompts: Sequence[str], latents: Tensor, points: Sequence[int]) -> Tensor:
    """(B,N,C,h,w)."""
    predict = policy.predict(prompts)
    return torch.stack([predict(x, policy.schedule.time(i, x)) for i, x in zip(points, latents.unbind(1), strict=True)], 1)


def _norm(latents: Tensor) -> Tensor:
    return latents.flatten(1).norm(dim=1)
