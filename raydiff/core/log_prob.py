"""Log-densities of sampler steps: the same transition that draws a step scores it.

A log-probability here is the SUM over C, h and w. A method that follows a published constant defined on the mean divides by
the number of elements in plain sight.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from raydiff.core.denoise import Predict
from raydiff.core.schedule import Schedule


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Any) -> Tensor:
    """log N(x; mean, std²) summed over all but the first axis, (B,), in fp32 or wider.

    Raises ValueError when std is 0: a deterministic step has no density.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    std = torch.as_tensor(std, dtype=dtype, device=x.device)
    if not bool((std > 0).all()):
        raise ValueError("a step with std 0 has no log-probability: use eta > 0, and a grid that does not end in sigma = 0")
    z = (x.to(dtype) - mean.to(dtype)) / std
    return (-0.5 * z**2 - std.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def transition_log_prob(predict: Predict, schedule: Schedule, i: int | Tensor, x: Tensor, x_next: Tensor, eta: float) -> Tensor:
    """log p(x_next | x) of the step i -> i+1 under `predict`, (B,), summed over C,h,w. x, x_next: (B,C,h,w)."""
    mean, std = schedule.transition(i, x, predict(x, schedule.time(i, x)), eta)
    return gaussian_log_prob(x_next, mean, std)


Reduction = Literal["mean", "sum"]


def log_ratio(log_prob: Tensor, base: Tensor, numbers: int, reduction: Reduction) -> Tensor:
    """log π_θ/π_base of one step from the two log-probabilities, (B,).

    "mean" divides by the D `numbers` of a latent: the published codes of DDPO and D3PO call that mean a log-probability, and
    their β and clip are constants for it. "sum" is the true log-ratio.
    """
    ratio = log_prob - base
    return ratio / numbers if reduction == "mean" else ratio
