"""Rewards without a gradient to learn from: one is the same for all pictures, one has a slope that is not a number."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from raydiff.rewards.base import RewardConfig


class Plugin(RewardConfig):
    kind: Literal["tests.rough"] = "tests.rough"
    what: Literal["constant", "root"] = "constant"
    """0 for every picture, with a graph; or the root of a number that is 0, whose slope times 0 is NaN."""

    def build(self, device: torch.device | str = "cpu") -> Callable[[Tensor, Sequence[str]], Tensor]:
        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            zero = 0 * images.mean((1, 2, 3))
            return zero.sqrt() if self.what == "root" else zero

        return score
