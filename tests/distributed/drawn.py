"""A reward whose weights are drawn anew in each process."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from raydiff.core.reward_vjp import Reward
from raydiff.rewards.base import RewardConfig


class Plugin(RewardConfig):
    kind: Literal["tests.distributed.drawn"] = "tests.distributed.drawn"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        network = nn.Conv2d(3, 1, 3).requires_grad_(False).to(device)

        def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return network(images).mean((1, 2, 3))

        return reward
