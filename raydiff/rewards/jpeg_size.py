"""The size of an image as a JPEG file: DDPO's compressibility and incompressibility (arXiv 2305.13301). A black box."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.reward_vjp import Reward
from raydiff.rewards.base import RewardConfig


class Plugin(RewardConfig):
    """-(size in kB), 1 kB = 1000 bytes, of the file that PIL writes."""

    differentiable: ClassVar[bool] = False

    target: Literal["compressible", "incompressible"] = "compressible"
    """"incompressible" rewards large files instead."""
    quality: int = Field(95, ge=1, le=100)
    """JPEG quality; 95 is DDPO's."""

    def build(self, device: torch.device | str = "cpu") -> Reward:
        from PIL import Image

        sign = -1 if self.target == "compressible" else 1

        def kilobytes(pixels: Tensor) -> float:  # (H,W,3) uint8
            file = io.BytesIO()
            Image.fromarray(pixels.numpy()).save(file, format="JPEG", quality=self.quality)
            return len(file.getvalue()) / 1000

        def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
            pixels = (images.detach().float() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu()
            return torch.tensor([sign * kilobytes(image) for image in pixels], device=images.device)

        return reward
