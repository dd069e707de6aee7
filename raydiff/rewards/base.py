"""What every reward file provides: a config that builds a Reward."""

from __future__ import annotations

from typing import ClassVar

import torch

from raydiff.config import PluginConfig
from raydiff.core.reward_vjp import Reward


class RewardConfig(PluginConfig):
    """A reward: fields, and `build`. Higher is always better."""

    weight: float = 1.0
    """Factor in the weighted sum; a negative one turns the reward into a penalty."""
    differentiable: ClassVar[bool] = True
    """Whether a gradient reaches the images. The DRaFT family needs it."""

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """The reward: images (B,3,H,W) float in [0,1], B prompts -> (B,) fp32. Its own weights are frozen, in eval mode."""
        raise NotImplementedError
