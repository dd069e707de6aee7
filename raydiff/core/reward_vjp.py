"""What every reward goes through: asked with what it cannot spoil, its answer checked, its gradient taken at once.

The gradient crosses to the pictures' own graph, or to another process, by the chain rule; autograd does not.
Legend: B images, H W pixels, R named rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

_ATTEMPTS = 3  # calls of a reward that raises, before it is believed
_SCALES = 2.0**12, 1.0
"""Of a reward's backward pass, the second where the first overflows. A power of two changes no bit of float32 and bfloat16, and
a reward that computes in float16 has no numbers for the slope of one pixel of many."""


class RewardError(RuntimeError):
    """A reward raised, or answered with what cannot be used. `row` is the image at fault, None when it was the whole batch."""

    def __init__(self, name: str, message: str, row: int | None = None) -> None:
        super().__init__(name, message, row)  # as it is pickled
        self.name, self.message, self.row = name, message, row

    def __str__(self) -> str:
        return f"reward {self.name!r} failed: {self.message}"


def weighted_sum(rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> Score:
    """Score whose total is Σ weight·reward, 0 without any; the parts are the rewards before weighting.

    Each reward gets a copy of the pictures and is asked by `ask`. Raises RewardError.
    """

    def score_and_grad(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts, Tensor]:
        asked = {name: ask(name, reward, images, prompts, gradient=True) for name, reward in rewards.items()}
        gradient = torch.zeros_like(images, dtype=_wide(images))
        for name, (_, part) in asked.items():
            gradient += weights[name] * part
        parts = {name: values for name, (values, _) in asked.items()}
        return total(parts, images), parts, gradient

    def plain(images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
        parts = {name: ask(name, reward, images, prompts, gradient=False)[0] for name, reward in rewards.items()}
        return total(parts, images), parts

    def total(parts: Parts, images: Tensor) -> Tensor:
        weighted = [weights[name] * part for name, part in parts.items()]
        return torch.stack(weighted).sum(0) if weighted else images.new_zeros(len(images), dtype=_wide(images))

    return with_remote_gradient(score_and_grad, plain)


def ask(name: str, reward: Reward, images: Tensor, prompts: Sequence[str], *, gradient: bool) -> tuple[Tensor, Tensor]:
    """A reward's values (B,) and d values / d images, (B,3,H,W) and empty without `gradient`: both without a graph.

    A reward that raises is asked again, then picture by picture, to find the one at fault. Raises RewardError.
    """
    for _ in range(_ATTEMPTS):
        try:
            return _answer(reward, images, prompts, gradient)
        except _Unusable as unusable:
            raise RewardError(name, str(unusable), unusable.row) from None
        except (Exception, SystemExit) as raised:
            error = raised
    row = None
    for i in range(len(images)):
        try:
            _answer(reward, images[i : i + 1], prompts[i : i + 1], gradient)
        except (Exception, SystemExit) as single:
            row, error = i, single
            break
    raise RewardError(name, f"{type(error).__name__}: {error}", row) from error


class _Unusable(Exception):
    """What a reward answered breaks the contract; another call would not mend it."""

    def __init__(self, message: str, row: int | None = None) -> None:
        super().__init__(message)
        self.row = row


def _answer(reward: Reward, images: Tensor, prompts: Sequence[str], gradient: bool) -> tuple[Tensor, Tensor]:
    """One call. The reward gets copies, which it may change in place as it likes."""
    if not len(images):
        return images.new_zeros(0, dtype=_wide(images)), torch.zeros_like(images)
    found = images.new_zeros(0)
    for scale in _SCALES if gradient else (1.0,):
        with _undisturbed(gradient):
            own = images.detach().requires_grad_(gradient)
            values = reward(own.clone(), list(prompts))
        _check(values, images)
        if gradient:
            found = _gradient(values, own, scale)
        if bool(torch.isfinite(found).all()):
            break
    else:
        _check_finite(values, found)
    # A copy: the reward may keep the tensor and write to it again
    return values.detach().to(_wide(images), copy=True), found


@contextmanager
def _undisturbed(gradient: bool) -> Iterator[None]:
    """Autograd as wanted inside; after it, torch's global settings are what they were, whatever was done to them."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with torch.set_grad_enabled(gradient):
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            if torch.get_default_device() != device:
                torch.set_default_device(device)


def _check(values: Any, images: Tensor) -> None:
    if not isinstance(values, Tensor):
        found = f"an object of type {type(values).__name__}"
    elif values.shape != images.shape[:1]:
        found = f"a tensor of shape {tuple(values.shape)}"
    elif not values.is_floating_point():
        found = f"a tensor of type {values.dtype}"
    elif values.device != images.device:
        found = f"a tensor on {values.device}"
    else:
        return
    raise _Unusable(
        f"it returned {found}; it must return a float tensor of shape ({len(images)},) on {images.device}, one value for each"
        " picture"
    )


def _gradient(values: Tensor, images: Tensor, scale: float) -> Tensor:
    """d values / d images: one backward pass, as each value depends on its own image alone."""
    if values.requires_grad:
        values.backward(torch.full_like(values, scale))  # autograd.grad would refuse a reward with reentrant checkpoints
    if images.grad is None:
        raise _Unusable(
            "training needs its gradient, and none reaches the pictures: it detaches them, or computes without torch's graph;"
            " keep the graph, or set `differentiable = False` in its class Plugin and measure it in evaluate.rewards only"
        )
    return images.grad / scale


def _check_finite(values: Tensor, gradient: Tensor) -> None:
    """Raise _Unusable for a finite value whose gradient is not; what is not finite itself has no better one."""
    broken = torch.isfinite(values) & ~torch.isfinite(gradient).flatten(1).all(1)
    if bool(broken.any()):
        row = int(broken.nonzero()[0])
        raise _Unusable(f"its value is {values[row].item():.4g}, and the gradient of it is not finite", row)


def _wide(images: Tensor) -> torch.dtype:
    """fp32, and fp64 where the pictures are."""
    return torch.promote_types(images.dtype, torch.float32)


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
        total, parts, gradient = remote(images.detach(), prompts)
        return RewardVJP.apply(images, total, gradient), parts

    return score


class RewardVJP(torch.autograd.Function):
    """Forward is the total (B,) that is known; backward multiplies: dL/dimages = dL/dr · dr/dimages."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.dtype = images.dtype
        ctx.save_for_backward(gradient)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (d_total[:, None, None, None] * gradient).to(ctx.dtype), None, None
