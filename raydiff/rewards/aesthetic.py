"""LAION's aesthetic score: a small head on a CLIP model's image embedding, about 1 (bad) to 10 (good). Prompts are not read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from raydiff import assets
from raydiff.config import InputPath
from raydiff.core.reward_vjp import Reward
from raydiff.rewards._pretrained import Dtype, check_safetensors, located
from raydiff.rewards.base import RewardConfig
from raydiff.rewards.clip import ImageEmbedding, check_clip, load_clip


class Plugin(RewardConfig):
    """head(image embedding of unit length), on the scale that the head was trained on."""

    model: InputPath = "embedded"
    """CLIP model of the embedding, as in `clip`; LAION's head belongs to openai/clip-vit-large-patch14."""
    head: InputPath = "embedded"
    """"embedded", or the head's file, .safetensors or .pth, e.g. sac+logos+ava1-l14-linearMSE.pth."""
    dtype: Dtype = "float32"
    """Precision of the CLIP weights; the head is fp32."""

    def files(self) -> dict[str, Path | str]:
        return super().files() | {"model": located(self.model, embedded="clip"), "head": head_file(self.head)}

    def preflight(self) -> None:
        check_clip(self.model, text=False)
        file = head_file(self.head)
        head_of(read_weights(file), file)

    def build(self, device: torch.device | str = "cpu") -> Reward:
        embed_image, file = load_clip(self.model, None, self.dtype), head_file(self.head)
        head = head_of(read_weights(file), file)
        width, wanted = embed_image.clip.config.projection_dim, head[0].in_features
        if width != wanted:
            raise ValueError(
                f"head = {self.head!r} takes embeddings of {wanted} numbers, model = {self.model!r} gives {width}:"
                " use the CLIP model that the head was trained on"
            )
        return Aesthetic(embed_image, head).eval().to(device)


class Aesthetic(nn.Module):
    """The reward of this file."""

    def __init__(self, embed_image: ImageEmbedding, head: nn.Sequential) -> None:
        super().__init__()
        self.embed_image, self.head = embed_image, head

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.head(self.embed_image(images)).squeeze(-1)


def head_file(head: str) -> Path:
    """The head's file. Raises FileNotFoundError or ValueError when it cannot be one."""
    file = assets.path("aesthetic") / "model.safetensors" if head == "embedded" else Path(head).expanduser()
    if file.suffix not in (".safetensors", ".pth", ".pt"):
        raise ValueError(f"head = {head!r}: a head is a .safetensors or .pth file")
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    return file


def read_weights(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if file.suffix != ".safetensors":
        try:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # of pickle's, zipfile's and torch's own kinds
            raise ValueError(f"{file} is broken, or holds more than tensors: {str(error).splitlines()[0]}") from None
        if not isinstance(weights, Mapping):
            raise ValueError(f"{file} is no aesthetic head: it holds a {type(weights).__name__}, not tensors by name")
        return dict(weights)
    check_safetensors(file)
    return load_file(file)


def _check_chain(weights: Mapping[str, Tensor], numbers: Sequence[int], file: Path) -> None:
    """Raise ValueError unless each layer takes what the one before it gives, and the last gives one number."""
    shapes = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    for n, following in zip(numbers, [*numbers[1:], None], strict=True):
        shape = shapes[f"layers.{n}.weight"]  # (out, in)
        out = 1 if following is None else (shapes[f"layers.{following}.weight"] + (0, 0))[1]
        if len(shape) != 2 or shape[0] != out or shapes[f"layers.{n}.bias"] != (out,):
            after = "the end" if following is None else f"layers.{following}"
            raise ValueError(
                f"{file} is no whole aesthetic head: layers.{n}.weight is {shape}, and {after} takes {out} numbers"
            )


def head_of(weights: Mapping[str, Tensor], file: Path) -> nn.Sequential:
    """The head as linear layers one after another: LAION's `layers.0, 2, 4, 6, 7` are those, what is between is dropout.

    There are no activations, and dropout is off in evaluation; sizes are the tensors'.
    """
    numbers = sorted({int(match[1]) for key in weights if (match := re.fullmatch(r"layers\.(\d+)\.weight", key))})
    wanted = {f"layers.{n}.{part}" for n in numbers for part in ("weight", "bias")}
    if not numbers or set(weights) != wanted:
        raise ValueError(f"{file} is no aesthetic head: it holds {sorted(weights)[:4]}, not layers.N.weight and layers.N.bias")
    _check_chain(weights, numbers, file)
    layers = []
    for n in numbers:
        weight = weights[f"layers.{n}.weight"]  # (out, in)
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight.float(), "bias": weights[f"layers.{n}.bias"].float()})
        layers.append(layer)
    return nn.Sequential(*layers).eval().requires_grad_(False)
