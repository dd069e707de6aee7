"""A reward that reads its value from an environment variable, which only its own replicas have."""

import os
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from raydiff.core.reward_vjp import Reward
from raydiff.rewards.base import RewardConfig


class Plugin(RewardConfig):
    kind: Literal["tests.distributed.environment"] = "tests.distributed.environment"

    def build(self, device: torch.device | str = "cpu") -> Reward:
        value = float(os.environ["RAYDIFF_TEST_ENVIRONMENT"])

        def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
            return 0 * images.mean((1, 2, 3)) + value

        return reward
