"""Exact gradients of a reward that is computed elsewhere: the chain rule crosses processes, autograd does not.

Legend: B images, H W pixels, R named rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reward = Callable[[Tensor, Sequence[str]], Tensor]
"""images (B,3,H,W) float in [0,1], B prompts -> (B,) fp32, higher is better. Each image is scored on its own."""

Parts = dict[str, Tensor]
Score = Callable[[Tensor, Sequence[str]], tuple[Tensor, Parts]]
"""images, prompts -> (total (B,), {reward name: (B,)}): several rewards at once."""

ScoreAndGrad = Callable[[Tensor, Sequence[str]], tuple[Tensor, Parts, Tensor]]
"""images, prompts -> (total (B,), parts, d total / d images (B,3,H,W)), all without a graph: what can cross a process."""


class RewardError(RuntimeError):
    """A reward raised. `row` is the image at fault, None when it was the batch as a whole."""

    def __init__(self, name: str, message: str, row: int | None = None) -> None:
        super().__init__(name, message, row)  # as it is pickled
        self.name, self.message, self.row = name, message, row

    def __str__(self) -> str:
        return f"reward {self.name!r} failed: {self.message}"


def weighted_sum(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Score:
    """Score whose total is Σ weight·reward, 0 without any; the parts are the rewards before weighting."""

    def score(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
        if not rewards:
            return images.new_zeros(len(prompts)), {}
        parts = {name: reward(images, prompts) for name, reward in rewards.items()}
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum(0)
        return total, {name: part.detach() for name, part in parts.items()}

    return score


def score_and_grad(score: Score) -> ScoreAndGrad:
    """Serve `score` with the gradient of its total. One backward pass: each total depends on its own image alone."""

    def served(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts, Tensor]:
        with torch.enable_grad():
            images = images.detach().requires_grad_(True)
            total, parts = score(images, prompts)
            (gradient,) = torch.autograd.grad(total.sum(), images)
        return total.detach(), parts, gradient

    return served


def with_remote_gradient(remote: ScoreAndGrad, plain: Score | None = None) -> Score:
    """A Score that backpropagates through `remote`: the inverse of `score_and_grad`, exact by the chain rule.

    Where no gradient is wanted, `plain` answers if it is given.
    """

    def score(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
        if not (torch.is_grad_enabled() and images.requires_grad):
            total, parts = plain(images, prompts) if plain else remote(images, prompts)[:2]
            return total, parts
        parts_out: Parts = {}
        return RewardVJP.apply(images, prompts, remote, parts_out), parts_out

    return score


class RewardVJP(torch.autograd.Function):
    """Forward asks for (r, dr/dimages); backward multiplies them: dL/dimages = dL/dr · dr/dimages."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, prompts: Sequence[str], remote: ScoreAndGrad, parts_out: Parts) -> Tensor:
        total, parts, gradient = remote(images.detach(), prompts)
        parts_out.update(parts)
        ctx.save_for_backward(gradient.to(images))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return d_total.to(gradient)[:, None, None, None] * gradient, None, None, None
