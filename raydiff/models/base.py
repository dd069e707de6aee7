"""What a model family provides, whole: a config that builds, loads and describes a model, and what the model does.

A family is one file with a `Plugin` and its `Model`; no other file knows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from raydiff.config import Config, InputPath, PluginConfig
from raydiff.core.policy import LatentModel
from raydiff.core.schedule import Schedule


class Lora(Config):
    """Low-rank adapter (Hu et al. 2022): W + alpha/rank·B·A on each target, with B = 0 at the start."""

    rank: int = Field(8, ge=1)
    alpha: float | None = Field(None, gt=0)
    """None: alpha = rank, so that the adapter's scale is 1."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Module names that get an adapter: attention's query, key, value and output projections."""


class Model(LatentModel, Protocol):
    """A model of a family: what sampling and losses call, and what the rest of raydiff does."""

    def encode(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> (B,C,h,w), the mean of the posterior."""

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B,3,H,W) in [0,1] -> mean and standard deviation of the encoder's Gaussian, (B,C,h,w) each."""

    def encoder_digest(self) -> str:
        """SHA-256 of what `posterior` depends on."""

    def parts(self) -> dict[str, nn.Module]:
        """Every network that lies in memory, by name, adapter and frozen copy included."""

    def settings(self) -> dict[str, Any]:
        """What decides its results beside networks' weights, by name: text or JSON."""

    def export(self, folder: str | Path, state: Mapping[str, Tensor]) -> None:
        """Write the trained weights `state` to a folder, as the family's other users read them."""

    def load(self, folder: str | Path) -> None:
        """Take up the trained weights that `export` wrote to a folder."""


class Skeleton(LatentModel, Protocol):
    """A model on the meta device: everything has a shape, and nothing a value."""

    def parts(self) -> dict[str, nn.Module]:
        """Every network that would lie in memory, by name, adapter and frozen copy included."""


class ModelConfig(PluginConfig):
    train: Literal["lora", "full"] = "lora"
    """Train an adapter on a frozen base, or every weight of the denoiser."""
    lora: Lora = Lora()
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the frozen weights; an adapter is always fp32."""
    adapters: tuple[InputPath, ...] = ()
    """Folders of exported adapters that are merged into the base model. Training and its reference start from the merged
    weights, which are rounded to `dtype`. For another round on a run's result, name that run's adapter here. The new adapter
    was trained on the sum: to use it, load all of them."""

    @property
    def name(self) -> str:
        """What pictures of it say that they were made with."""
        return self.kind

    def tokenizers(self) -> list[Any]:
        """What turns prompts into the tokens that the model sees, as transformers has it; [] where that is not here."""
        return []

    def build(
        self, device: torch.device | str = "cpu", *, seed: int = 0, reference: bool = False, checkpointing: bool = True
    ) -> Model:
        """The model, ready to train.

        `seed` fixes the adapter's start; `reference` says that a loss will call reference(); `checkpointing` recomputes the
        decoder's activations in the backward pass. (The denoiser's are the policy's business.)
        """
        raise NotImplementedError

    def folder(self) -> str | None:
        """The folder that its files lie in, where it is one of this machine."""
        return None

    def check_exported(self, adapters: Sequence[tuple[str, float]]) -> None:
        """Raise FileNotFoundError or ValueError, before a model is loaded, for exported weights [(folder, λ_j), ...] that are
        not there, and for a mixture that makes no sense. Here: for LoRA adapters."""
        from raydiff.models import lora

        for folder, _ in adapters:
            lora.weights_file(folder)

    def exported_digest(self, folder: str | Path) -> str:
        """SHA-256 of the weights that `Model.export` wrote to a folder. Here: of a LoRA adapter."""
        from raydiff.models import lora

        return lora.digest(folder)

    def config_folder(self) -> Path | None:
        """The folder of its config files, which may lie in a hub's cache; None: not on this machine."""
        return None

    def grid(self, steps: int, spacing: str | None, final_alpha: float | None) -> Schedule | None:
        """The sampling grid, from its config files alone; None: not on this machine.

        Raises ValueError for one that its scheduler cannot follow.
        """
        return None

    def skeleton(self, folder: Path, *, reference: bool = False, checkpointing: bool = True) -> Skeleton:
        """The model without weights, from the config files of a folder, which `config_folder` found; arguments as of `build`.

        Raises ValueError for LoRA targets that it lacks.
        """
        raise NotImplementedError

    def load(self, device: torch.device | str = "cpu", adapters: Sequence[tuple[str, float]] = ()) -> Model:
        """The model to draw with, nothing of it trained: base + Σ λ_j·ΔW_j of exported adapters [(folder, λ_j), ...]; or the
        weights of full fine-tuning, whose folder then comes alone.

        Raises ValueError for an adapter of another base model, FileNotFoundError when there is none.
        """
        raise NotImplementedError
