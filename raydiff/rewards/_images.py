"""What the image rewards share: precision, and the resize, crop and normalisation that a model was trained with, in torch.

Legend: B images, H W pixels, h w pixels that the model takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

# PIL's numbers of the filters that torch has with antialiasing.
FILTERS = {2: "bilinear", 3: "bicubic"}


def at_least_fp32(x: Tensor) -> Tensor:
    """Half precision raised to fp32: a score is a mean over many pixels, and bf16 resolves 1/256 of full scale."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Geometry:
    """Resize to `resize` = (h, w), or so that the shorter side becomes an int; then cut `crop` = (h, w) from the centre."""

    resize: int | tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mode: str = "bicubic"


class Preprocess(nn.Module):
    """(B,3,H,W) in [0,1] -> (B,3,h,w) normalised: an image processor without PIL, uint8 or rounding, so gradients pass.

    Antialiased, so the filters are PIL's. Not clamped after bicubic resizing as PIL does: a clamp kills the gradient of
    saturated pixels. The two differ at hard edges only.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, geometry: Geometry, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.geometry = geometry
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = at_least_fp32(images)  # interpolation in half precision shifts pixels by more than PIL's rounding
        if self.geometry.resize is not None:
            size = resized(images.shape[-2:], self.geometry.resize)
            if size != tuple(images.shape[-2:]):
                images = interpolate(images, size, mode=self.geometry.mode, antialias=True, align_corners=False)
        if self.geometry.crop is not None:
            images = centre_crop(images, self.geometry.crop)
        return (images - self.mean) / self.std


def resized(shape: Sequence[int], resize: int | tuple[int, int]) -> tuple[int, int]:
    """(h, w) after resizing: as given, or the shorter side as given and the longer one in proportion, rounded down."""
    if isinstance(resize, tuple):
        return resize
    height, width = shape
    return (resize, resize * width // height) if height <= width else (resize * height // width, resize)


def centre_crop(images: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle (h, w) of the images; where they are smaller, zeros around them."""
    (height, width), (h, w) = images.shape[-2:], size
    top, left = (height - h) // 2, (width - w) // 2
    return pad(images, (-left, left + w - width, -top, top + h - height))


def preprocess_of(processor: Any) -> Preprocess:
    """The Preprocess that computes what a transformers image processor does. Raises ValueError for one that does more."""
    name = type(processor).__name__
    family = name.removesuffix("Pil").removesuffix("Fast").removesuffix("ImageProcessor")
    if family not in ("CLIP", "ConvNext", "DeiT", "Siglip", "ViT"):
        raise ValueError(
            f"{name} is not known to be a plain resize, crop and normalisation; use a model with a CLIP, ConvNext, DeiT,"
            " Siglip or ViT image processor, or write a reward of your own (see raydiff/rewards/base.py)"
        )
    if processor.do_resize and processor.resample not in FILTERS:
        raise ValueError(f"{name}: resample = {processor.resample} has no antialiased twin in torch; use 2 or 3")
    # Images come in [0,1]; the processor's scale starts from 0..255.
    scale = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    mean = processor.image_mean if processor.do_normalize else (0.0, 0.0, 0.0)
    std = processor.image_std if processor.do_normalize else (1.0, 1.0, 1.0)
    return Preprocess(
        convnext_geometry(processor) if family == "ConvNext" else plain_geometry(processor),
        [m / scale for m in mean],
        [s / scale for s in std],
    )


def plain_geometry(processor: Any) -> Geometry:
    size, crop = processor.size, processor.crop_size
    return Geometry(
        resize=(size.shortest_edge or (size.height, size.width)) if processor.do_resize else None,
        crop=(crop.height, crop.width) if processor.do_center_crop else None,
        mode=FILTERS.get(processor.resample, "bicubic"),
    )


def convnext_geometry(processor: Any) -> Geometry:
    """Below 384 pixels a ConvNext processor crops what it resized to size / crop_pct; from there on it warps to a square."""
    edge, mode = processor.size.shortest_edge, FILTERS.get(processor.resample, "bicubic")
    if not processor.do_resize:
        return Geometry()
    if edge >= 384:
        return Geometry(resize=(edge, edge), mode=mode)
    return Geometry(resize=int(edge / processor.crop_pct), crop=(edge, edge), mode=mode)
