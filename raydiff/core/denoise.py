"""The one sampler. Guidance, checkpointing and drift are wrappers Predict -> Predict; the loop knows none of them.

Legend: B images, C h w latent, S sampler steps, N kept points. Grid index 0 is noise, S is clean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from raydiff.core.schedule import Schedule

Predict = Callable[[Tensor, Tensor], Tensor]
"""x (B,C,h,w), time (B,) -> network output (B,C,h,w). Conditioning and guidance are closed over."""

Noise = Callable[[int], Tensor]
"""Step index -> standard normal noise (B,C,h,w): a function of the index, so a chain from midway draws the same noise."""

Observe = Callable[[Tensor, Tensor, Any], None]
"""Told of each step as it is taken: x_{i+1} (B,C,h,w), and the mean (B,C,h,w) and std (float) that it was drawn with."""


def denoise(
    predict: Predict,
    schedule: Schedule,
    x: Tensor,
    *,
    first: int = 0,
    last: int | None = None,
    eta: float = 0.0,
    grad_steps: int | None = None,
    keep: Sequence[int] = (),
    noise: Noise | None = None,
    observe: Observe | None = None,
) -> tuple[Tensor, Tensor]:
    """Walk from grid point `first` to `last` (default S, the clean end) and return (latents (B,C,h,w), kept (B,N,C,h,w)).

    Gradient flows through the last `grad_steps` steps (None: all, 0: none); the steps before them run without a graph, so
    memory does not grow with them (DRaFT-K, Clark et al. 2024, §4.2). `keep` lists the grid points to return, detached, in
    the order of the walk. Starting from a kept point gives the same latents as the whole walk, bit for bit.
    Raises ValueError for an empty or reversed range, a point to keep outside it, and eta > 0 without `noise`.
    """
    last = schedule.steps if last is None else last
    if not 0 <= first <= last <= schedule.steps:
        raise ValueError(f"first = {first}, last = {last}: need 0 <= first <= last <= {schedule.steps}")
    if any(not first <= i <= last for i in keep):
        raise ValueError(f"keep = {tuple(keep)} has a point outside {first}..{last}")
    if eta > 0 and noise is None:
        raise ValueError(f"eta = {eta} draws noise at each step: pass noise=seeded_noise(seeds, shape)")
    grad_from = first if grad_steps is None else last - grad_steps
    kept = {}
    for i in range(first, last):
        if i in keep:
            kept[i] = x.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and i >= grad_from):
            out = predict(x, schedule.time(i, x))
            mean, std = schedule.transition(i, x, out, eta)
            x = mean + std * noise(i).to(mean) if noise is not None and std > 0 else mean
        if observe is not None:
            observe(x, mean, std)
    if last in keep:
        kept[last] = x.detach()
    return x, torch.stack([kept[i] for i in sorted(kept)], 1) if kept else x.new_empty(len(x), 0, *x.shape[1:])


def guided(predict: Predict, scale: float, *, detach_negative: bool = False) -> Predict:
    """Classifier-free guidance (Ho & Salimans 2022): out_negative + scale·(out_positive - out_negative).

    `predict` takes 2B images, the first half under the negative prompt. `detach_negative` stops the gradient of that half.
    """

    def both(x: Tensor, time: Tensor) -> Tensor:
        negative, positive = predict(torch.cat([x, x]), torch.cat([time, time])).chunk(2)
        if detach_negative:
            negative = negative.detach()
        return negative + scale * (positive - negative)

    return both


def checkpointed(predict: Predict) -> Predict:
    """Recompute activations in the backward pass: memory stays flat in the number of steps with gradient.

    Non-reentrant: ZeRO-2 and 3 fail with the reentrant kind, and a frozen first block needs it.
    """

    def recomputed(x: Tensor, time: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return predict(x, time)
        return checkpoint(predict, x, time, use_reentrant=False)

    return recomputed


def seeded_noise(seeds: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> Noise:
    """Noise of shape (B, *shape) that depends on each image's own seed and on the step alone.

    So a picture is the same in any batch, on any worker and from any starting point. Drawn on the CPU: devices draw
    differently. Index -1 is x_T itself: the draw that a diffusers pipeline makes from
    `torch.Generator().manual_seed(seed)`.
    """

    def draw(i: int) -> Tensor:
        rows = [
            torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed if i == -1 else mix(seed, i)))
            for seed in seeds
        ]
        return torch.stack(rows).to(device)

    return draw


def mix(*parts: int) -> int:
    """A 63-bit seed from several integers, the same on every machine (SplitMix64, Steele et al. 2014)."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
