"""The denoising error: how well a network finds the noise in a clean latent. Training's own loss, one number an image.

Legend: R images, C h w latent, T training steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raydiff.core.policy import Policy


@dataclass(frozen=True)
class Noised:
    """R clean latents at random noise levels: one question for the policy and its reference alike."""

    prompts: list[str]  # R
    x: Tensor  # (R,C,h,w)
    time: Tensor  # (R,) as the network is told it
    target: Tensor  # (R,C,h,w) the right answer

    def error(self, policy: Policy) -> Tensor:
        """Squared error of the network, MEAN over C,h,w, (R,), without guidance (Ho et al. 2020, eq. 14)."""
        predict = policy.predict(self.prompts, guidance=1.0, once=True)
        return (predict(self.x, self.time) - self.target).square().flatten(1).mean(1)


def noised(policy: Policy, clean: Tensor, prompts: Sequence[str], seeds: Sequence[int], dropout: float) -> Noised:
    """Noise `clean` (R,C,h,w) at t ~ U over the T training steps; with probability `dropout` a caption becomes "".

    Each row draws from its seed alone: rows of one seed share step, noise and dropout, on any worker and in any batch.
    """
    schedule = policy.training_schedule
    steps, noise, dropped = zip(*(_draw(seed, schedule.steps, clean.shape[1:], dropout) for seed in seeds), strict=True)
    i, eps = torch.tensor(steps), torch.stack(noise).to(clean)
    x = schedule.add_noise(clean, eps, i)
    captions = ["" if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
    return Noised(captions, x, schedule.time(i, x), schedule.target(clean, eps, i))


def _draw(seed: int, steps: int, shape: Sequence[int], dropout: float) -> tuple[int, Tensor, bool]:
    """On the CPU, as devices draw differently."""
    generator = torch.Generator().manual_seed(seed)
    step = int(torch.randint(steps, (), generator=generator))
    dropped = bool(torch.rand((), generator=generator) < dropout)
    return step, torch.randn(tuple(shape), generator=generator), dropped
