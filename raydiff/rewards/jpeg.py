"""How well an image survives JPEG, differentiably: DRaFT's compressibility and incompressibility (arXiv 2309.17400).

r = -1000·mean (x - d(c(x)))²: quantisation is rounding, which has no gradient, so it becomes x̃ = [x] + (x - [x])³.
Legend: B images, C channels, H W pixels, h w blocks of 8 x 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from raydiff.core.reward_vjp import Reward
from raydiff.rewards._images import at_least_fp32
from raydiff.rewards.base import RewardConfig

# JPEG standard, Annex K: quantisation of luma and chroma at quality 50.
LUMA = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    *(17, 18, 24, 47, 99, 99, 99, 99),
    *(18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)
# JFIF: luma is a weighted sum of red, green and blue, chroma the scaled distance of blue and red from it.
RED, GREEN, BLUE = 0.299, 0.587, 0.114
TO_YCBCR = (
    (RED, GREEN, BLUE),
    (-RED / (1 - BLUE) / 2, -GREEN / (1 - BLUE) / 2, 0.5),
    (0.5, -GREEN / (1 - RED) / 2, -BLUE / (1 - RED) / 2),
)


class Plugin(RewardConfig):
    """-1000 × the mean squared error of JPEG: 0 is lossless, -1 a PSNR of 30 dB, -10 one of 20 dB."""

    target: Literal["compressible", "incompressible"] = "compressible"
    """"incompressible" rewards the error instead: fine texture."""
    quality: int = Field(50, ge=1, le=100)
    """JPEG quality: 100 keeps everything but rounding, 1 next to nothing."""
    chroma_subsampling: bool = True
    """Halve the resolution of colour (4:2:0), as encoders do by default."""

    def build(self, device: torch.device | str = "cpu") -> Reward:
        sign = -1000 if self.target == "compressible" else 1000

        def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
            images = at_least_fp32(images)
            return sign * (images - codec(images, self.quality, self.chroma_subsampling)).square().mean((1, 2, 3))

        return reward


def soft_round(x: Tensor) -> Tensor:
    """[x] + (x - [x])³: the rounded value, with a gradient that is zero only at whole numbers."""
    whole = x.round()
    return whole + (x - whole) ** 3


def codec(
    images: Tensor,
    quality: int,
    chroma_subsampling: bool = True,
    rounding: Callable[[Tensor], Tensor] = soft_round,
) -> Tensor:
    """d(c(x)): images (B,3,H,W) in [0,1], encoded and decoded. The result may leave [0,1] a little; no clamp."""
    height, width = images.shape[-2:]
    unit = 16 if chroma_subsampling else 8
    images = pad(images, (0, -width % unit, 0, -height % unit), mode="replicate")
    to_ycbcr = images.new_tensor(TO_YCBCR)
    y, cb, cr = torch.einsum("ij,bjhw->bihw", to_ycbcr, 255 * images).split(1, 1)
    luma, chroma = table(LUMA, quality).to(images), table(CHROMA, quality).to(images)
    y = quantised(y - 128, luma, rounding) + 128  # chroma is centred on 0 already
    colours = torch.cat((cb, cr), 1)  # (B,2,H,W)
    if chroma_subsampling:
        # A triangle filter on the way back, as libjpeg's "fancy upsampling".
        small = quantised(avg_pool2d(colours, 2), chroma, rounding)
        colours = interpolate(small, scale_factor=2, mode="bilinear", align_corners=False)
    else:
        colours = quantised(colours, chroma, rounding)
    ycbcr = torch.cat((y, colours), 1)
    decoded = torch.einsum("ij,bjhw->bihw", torch.linalg.inv(to_ycbcr), ycbcr) / 255
    return decoded[..., :height, :width]


def quantised(planes: Tensor, steps: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Each 8 x 8 block of (B,C,H,W) rounded to multiples of `steps` (8,8) in the cosine basis."""
    basis = dct_basis().to(planes)
    b, c, height, width = planes.shape
    blocks = planes.reshape(b, c, height // 8, 8, width // 8, 8).transpose(3, 4)  # (B,C,h,w,8,8)
    coefficients = rounding(basis @ blocks @ basis.T / steps) * steps
    return (basis.T @ coefficients @ basis).transpose(3, 4).reshape(b, c, height, width)


def dct_basis() -> Tensor:
    """(8,8) orthonormal DCT-II: row k is the k-th cosine."""
    k, n = torch.meshgrid(torch.arange(8.0, dtype=torch.float64), torch.arange(8.0, dtype=torch.float64), indexing="ij")
    basis = torch.cos(math.pi / 8 * (n + 0.5) * k) / 2
    basis[0] /= math.sqrt(2)
    return basis


def table(base: Sequence[int], quality: int) -> Tensor:
    """(8,8) quantisation steps at a quality, scaled and clipped as libjpeg does."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = torch.tensor([min(max((step * percent + 50) // 100, 1), 255) for step in base])
    return steps.reshape(8, 8)
