"""What every reward file provides: a config that builds a Reward."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field

from raydiff.config import PluginConfig, Run
from raydiff.core.reward_vjp import Reward


class RewardConfig(PluginConfig):
    """A reward: fields, and `build`. Higher is always better."""

    weight: float = 1.0
    """Factor in the weighted sum; a negative one turns the reward into a penalty."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """Ray runtime environment of replicas of this reward's own, e.g. {pip = ["image-reward==1.5"]}: packages that conflict with
    raydiff's stay out of the trainer. Needs rewards.where = "pool"."""
    differentiable: ClassVar[bool] = True
    """Whether a gradient reaches the images. The DRaFT family needs it."""

    def check(self, run: Run) -> None:
        if self.runtime_env and run.rewards.where != "pool":
            raise ValueError(
                f"a reward of kind {self.kind!r} has a runtime_env, which only replicas of its own can have:"
                ' set rewards.where to "pool", or leave runtime_env out'
            )

    def build(self, device: torch.device | str = "cpu") -> Reward:
        """The reward: images (B,3,H,W) float in [0,1], B prompts -> (B,) fp32. Its own weights are frozen, in eval mode."""
        raise NotImplementedError
