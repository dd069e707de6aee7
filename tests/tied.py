"""A reward that cannot tell the samples of some prompts apart, and is blue's share for the others."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from raydiff.rewards.base import RewardConfig


class Plugin(RewardConfig):
    kind: Literal["tests.tied"] = "tests.tied"
    tied: tuple[str, ...] = ()
    """Prompts whose samples all get 0."""

    def build(self, device: torch.device | str = "cpu") -> Callable[[Tensor, Sequence[str]], Tensor]:
        def score(images: Tensor, prompts: Sequence[str]) -> Tensor:
            told = torch.tensor([prompt not in self.tied for prompt in prompts], device=images.device)
            return images[:, 2].mean((1, 2)) * told

        return score


def run_changes(tied: Sequence[str]) -> dict[str, Any]:
    return {"rewards": {"blue": {"kind": "tests.tied", "tied": list(tied)}}}
