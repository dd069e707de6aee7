"""What every model file provides: a config that builds a LatentModel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field

from raydiff.config import Config, InputPath, PluginConfig
from raydiff.core.policy import LatentModel


class Lora(Config):
    """Low-rank adapter (Hu et al. 2022): W + alpha/rank·B·A on each target, with B = 0 at the start."""

    rank: int = Field(8, ge=1)
    alpha: float | None = Field(None, gt=0)
    """None: alpha = rank, so that the adapter's scale is 1."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Module names that get an adapter: attention's query, key, value and output projections."""


class ModelConfig(PluginConfig):
    train: Literal["lora", "full"] = "lora"
    """Train an adapter on a frozen base, or every weight of the denoiser."""
    lora: Lora = Lora()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights; an adapter is always fp32."""
    adapters: tuple[InputPath, ...] = ()
    """Folders of exported adapters that are merged into the base: what is trained, and its reference, starts from there. A new
    round on a run's result names its adapter here. The weights in between are rounded to `dtype`. The new adapter is for that
    sum: where it is used, all of them are."""

    @property
    def name(self) -> str:
        """What pictures of it say that they were made with."""
        return self.kind

    def tokenizers(self) -> list[Any]:
        """What turns prompts into the tokens that the model sees, as transformers has it; [] where that is not here."""
        return []

    def build(
        self, device: torch.device | str = "cpu", *, seed: int = 0, reference: bool = False, checkpointing: bool = True
    ) -> LatentModel:
        """The model, ready to train.

        `seed` fixes the adapter's start; `reference` says that a loss will call reference(); `checkpointing` recomputes the
        decoder's activations in the backward pass. (The denoiser's are the policy's business.)
        """
        raise NotImplementedError

    def folder(self) -> str | None:
        """The folder that its files lie in, where it is one of this machine."""
        return None

    def load(self, device: torch.device | str = "cpu", adapters: Sequence[tuple[str, float]] = ()) -> LatentModel:
        """The model to draw with, nothing of it trained: base + Σ λ_j·ΔW_j of exported adapters [(folder, λ_j), ...]; or the
        weights of full fine-tuning, whose folder then comes alone.

        Raises ValueError for an adapter of another base model, FileNotFoundError when there is none.
        """
        raise NotImplementedError
