"""A reward that does, by its field `how`, what a reward must not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from raydiff.core.reward_vjp import Reward
from raydiff.rewards.base import RewardConfig

Function = Callable[[Tensor, Sequence[str]], Tensor]


def green(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 1].mean((1, 2)) + images.square().mean((1, 2, 3))


def _after(mischief: Callable[[Tensor, Any], object]) -> Function:
    """Honest values, and then the mischief."""

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        values = green(images.clone(), prompts)
        mischief(images, prompts)
        return values

    return reward


SPOILERS: dict[str, Function] = {
    "in place": _after(lambda images, prompts: images.mul_(0.5)),
    "through a view": _after(lambda images, prompts: images[:, 2].fill_(1.0)),
    "through a detached alias": _after(lambda images, prompts: images.detach().zero_()),
    "through .data": _after(lambda images, prompts: images.data.zero_()),
    "numpy view": _after(lambda images, prompts: images.detach().numpy().fill(0.5)),
    "prompts": _after(lambda images, prompts: prompts.clear()),
    "no grad wanted": _after(lambda images, prompts: images.requires_grad_(images.requires_grad).detach_()),
}
GLOBAL: dict[str, Function] = {
    "grad off after": _after(lambda images, prompts: torch.set_grad_enabled(False)),
    "grad on after": _after(lambda images, prompts: torch.set_grad_enabled(True)),
    "default dtype": _after(lambda images, prompts: torch.set_default_dtype(torch.float64)),
    "default device": _after(lambda images, prompts: torch.set_default_device("meta")),
}


def _elsewhere(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A graph, to a weight of its own and not to the pictures."""
    return green(images.detach(), prompts) * torch.ones((), requires_grad=True)


def _inference(images: Tensor, prompts: Sequence[str]) -> Tensor:
    with torch.inference_mode():
        return green(images, prompts)


DETACHED: dict[str, Function] = {
    "detached": lambda images, prompts: green(images, prompts).detach(),
    "no_grad": torch.no_grad()(green),
    "inference mode": _inference,
    "through numpy": lambda images, prompts: torch.from_numpy(green(images, prompts).detach().numpy()),
    "of its own weight": _elsewhere,
    "compared": lambda images, prompts: (images > 0.5).float().mean((1, 2, 3)),
    "constant": lambda images, prompts: torch.zeros(len(images)),
}


def _if_fox(error: Callable[[], object]) -> Function:
    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if "a fox" in prompts:
            error()
        return green(images, prompts)

    return reward


def _raise(error: BaseException) -> None:
    raise error


class OneWay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, refuse: bool) -> Tensor:
        ctx.refuse = refuse
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if ctx.refuse:
            raise ValueError("no way back")
        return gradient, None


RAISING: dict[str, tuple[Function, str]] = {
    "a plain error": (_if_fox(lambda: _raise(RuntimeError("asleep"))), "RuntimeError: asleep"),
    "an error of torch": (_if_fox(lambda: torch.zeros(2) @ torch.zeros(3)), "RuntimeError: .*inconsistent tensor size"),
    "the end of an iterator": (_if_fox(lambda: next(iter(()))), "StopIteration: "),
    "the end of the process": (_if_fox(lambda: sys.exit(3)), "SystemExit: 3"),
    "in the backward pass": (
        lambda images, prompts: OneWay.apply(green(images, prompts), "a fox" in prompts),
        "ValueError: no way back",
    ),
}

HOW: dict[str, Function] = {
    "honest": green,
    **SPOILERS,
    **GLOBAL,
    **DETACHED,
    "random seed": _after(lambda images, prompts: torch.manual_seed(0)),
    "column": lambda images, prompts: green(images, prompts)[:, None],
    "raises": lambda images, prompts: {}["judge"],  # type: ignore[return-value]
    "raises for a pig": lambda images, prompts: {}["judge"] if "a pig" in prompts else green(images, prompts),
    "backward": lambda images, prompts: OneWay.apply(green(images, prompts), True),
}


class Plugin(RewardConfig):
    kind: Literal["tests.rewards.naughty"] = "tests.rewards.naughty"
    how: str = "honest"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        return HOW[self.how]
