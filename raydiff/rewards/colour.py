"""How close a region of the image is to one colour. With a little `clip` beside it, backgrounds change and subjects stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.reward_vjp import Reward
from raydiff.rewards._images import at_least_fp32
from raydiff.rewards.base import RewardConfig

Level = Annotated[float, Field(ge=0, le=1)]


class Plugin(RewardConfig):
    """-(mean squared distance to `rgb`): 0 is the colour itself, -1 black where white is wanted."""

    rgb: tuple[Level, Level, Level] = (0.1, 0.3, 0.9)
    """Wanted red, green and blue, each in [0,1]; the default is blue."""
    region: Literal["border", "centre", "all"] = "border"
    """"border" is a frame, "centre" what it encloses."""
    border: float = Field(0.125, gt=0, lt=0.5)
    """Width of the frame as a fraction of the image's shorter side: 0.125 is 4 pixels of 32, 64 of 512."""

    def build(self, device: torch.device | str = "cpu") -> Reward:
        def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
            images = at_least_fp32(images)
            pixels = images[:, :, region(images, self.region, self.border)]  # (B,3,P)
            return -(pixels - images.new_tensor(self.rgb)[:, None]).square().mean((1, 2))

        return reward


def region(images: Tensor, name: str, border: float) -> Tensor:
    """(H,W) bool: the pixels that count."""
    height, width = images.shape[-2:]
    side = min(height, width)
    thickness = min(max(round(border * side), 1), (side - 1) // 2)  # both the frame and the centre keep a pixel
    frame = torch.ones(height, width, dtype=torch.bool, device=images.device)
    if name == "all":
        return frame
    frame[thickness : height - thickness, thickness : width - thickness] = False
    return frame if name == "border" else ~frame
