"""Prompt alignment: the cosine of a CLIP model's image and text embeddings. PickScore is one, with `logit_scale = true`.

Legend: B images, E embedding width, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from raydiff.config import InputPath
from raydiff.core.reward_vjp import Reward
from raydiff.rewards._images import Preprocess, at_least_fp32, preprocess_of
from raydiff.rewards._pretrained import (
    CONFIG,
    PROCESSOR,
    TOKENIZER,
    WEIGHTS,
    Dtype,
    check_folder,
    check_weights,
    load_frozen,
    located,
    read_json,
    source,
)
from raydiff.rewards.base import RewardConfig


class Plugin(RewardConfig):
    """Cosine of image and prompt, in [-1,1]; × exp(logit_scale) it is the logit that the model was trained with."""

    model: InputPath = "embedded"
    """"embedded", or a transformers CLIPModel with safetensors weights: a folder or a hub id."""
    processor: InputPath | None = None
    """Folder or hub id of the tokenizer and image processor where they are kept apart; None: with the model."""
    logit_scale: bool = False
    """Multiply by the learned temperature, about 100: PickScore's scale, near 20 for a good picture."""
    dtype: Dtype = "float32"
    """Precision of the weights; half precision is for GPUs. The score is fp32 all the same."""

    def files(self) -> dict[str, Path | str]:
        processor = {"processor": located(self.processor, embedded="clip")} if self.processor else {}
        return super().files() | {"model": located(self.model, embedded="clip")} | processor

    def preflight(self) -> None:
        check_clip(self.model, self.processor)

    def build(self, device: torch.device | str = "cpu") -> Reward:
        from transformers import AutoTokenizer

        embed_image = load_clip(self.model, self.processor, self.dtype)
        tokenizer = AutoTokenizer.from_pretrained(source(self.processor or self.model, embedded="clip"))
        return Alignment(embed_image, tokenizer, self.logit_scale).eval().to(device)


class ImageEmbedding(nn.Module):
    """Images (B,3,H,W) in [0,1] -> (B,E) of unit length, fp32; gradients reach the images, not the weights."""

    def __init__(self, clip: Any, preprocess: Preprocess) -> None:
        super().__init__()
        self.clip, self.preprocess = clip, preprocess

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.preprocess(images).to(self.clip.dtype)
        return normalize(at_least_fp32(self.clip.get_image_features(pixels).pooler_output), dim=-1)


class Alignment(nn.Module):
    """The reward of this file."""

    def __init__(self, embed_image: ImageEmbedding, tokenizer: Any, logit_scale: bool) -> None:
        super().__init__()
        self.embed_image, self.tokenizer, self.logit_scale = embed_image, tokenizer, logit_scale

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        cosine = (self.embed_image(images) * self.embed_text(prompts)).sum(-1)
        return cosine * at_least_fp32(self.embed_image.clip.logit_scale).exp() if self.logit_scale else cosine

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """(B,E) of unit length; what exceeds the model's T tokens is cut off."""
        clip = self.embed_image.clip
        # Tokenizers without a limit of their own report one of 1e30.
        limit = min(self.tokenizer.model_max_length, clip.config.text_config.max_position_embeddings)
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        features = clip.get_text_features(
            input_ids=tokens["input_ids"].to(clip.device), attention_mask=tokens["attention_mask"].to(clip.device)
        )
        return normalize(at_least_fp32(features.pooler_output), dim=-1)


def check_clip(model: str, processor: str | None = None, text: bool = True) -> None:
    """Raise when a file that `load_clip` reads is missing, broken or not CLIP's; `text`: the tokenizer is needed too."""
    from transformers import CLIPModel

    beside = (PROCESSOR, TOKENIZER) if text else (PROCESSOR,)
    name = source(model, embedded="clip")
    check_folder(name, CONFIG, WEIGHTS, *(() if processor else beside))
    if (config := Path(name) / CONFIG[0]).is_file():
        if (kind := read_json(config).get("model_type")) != "clip":
            raise ValueError(f"model = {model!r} is of type {kind!r}, not 'clip'")
        check_weights(CLIPModel, name)
    if processor:
        check_folder(source(processor, embedded="clip"), *beside)


def load_clip(model: str, processor: str | None, dtype: Dtype) -> ImageEmbedding:
    """A frozen CLIP whose images are prepared as its processor file says."""
    from transformers import AutoConfig, AutoImageProcessor, CLIPModel

    name = source(model, embedded="clip")
    check_clip(model, processor, text=False)
    if (kind := AutoConfig.from_pretrained(name).model_type) != "clip":
        raise ValueError(f"model = {model!r} is of type {kind!r}, not 'clip'")
    preprocess = preprocess_of(AutoImageProcessor.from_pretrained(source(processor or model, embedded="clip")))
    return ImageEmbedding(load_frozen(CLIPModel, name, dtype), preprocess)
