"""Mirror symmetry and rotational anti-correlation (DRaFT, arXiv 2309.17400): rewards in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from raydiff.core.reward_vjp import Reward
from raydiff.rewards._images import at_least_fp32
from raydiff.rewards.base import RewardConfig


class Plugin(RewardConfig):
    """Mean squared difference of an image and itself, mirrored or turned: 0 is the same image, 1 black against white."""

    pattern: Literal["mirror", "anti_rotation"] = "mirror"
    """"mirror": -‖x - mirror(x)‖², symmetric images. "anti_rotation": +‖x - rot(x)‖² averaged over 90°, 180° and 270°,
    images that differ from themselves turned; they must be square."""
    axis: Literal["left_right", "top_bottom"] = "left_right"
    """Which halves "mirror" swaps."""

    def build(self, device: torch.device | str = "cpu") -> Reward:
        side = 3 if self.axis == "left_right" else 2

        def mirror(images: Tensor, prompts: Sequence[str]) -> Tensor:
            images = at_least_fp32(images)
            return -(images - images.flip(side)).square().mean((1, 2, 3))

        def anti_rotation(images: Tensor, prompts: Sequence[str]) -> Tensor:
            height, width = images.shape[-2:]
            if height != width:
                raise ValueError(f'pattern = "anti_rotation" needs square images, not {height} x {width}; use "mirror"')
            images = at_least_fp32(images)
            turned = [images.rot90(quarters, (2, 3)) for quarters in (1, 2, 3)]
            return torch.stack([(images - other).square().mean((1, 2, 3)) for other in turned]).mean(0)

        return mirror if self.pattern == "mirror" else anti_rotation
