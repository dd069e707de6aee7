"""Tiny random models in the formats of the published ones, and pictures."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from raydiff.config.base import RewardField

LABELS = ["cat", "red apple", "apple", "crane, bird", "crane, machine", "evergreen_tree"]
PIXELS = 16  # side of the images that the tiny models take
PROMPTS = ["a cat", "a red apple on the floor", "an Evergreen tree"]

torch.set_num_threads(1)


def plugin_of(**fields: Any) -> Any:
    """A reward's config, found by its kind as in a run file."""
    return TypeAdapter(RewardField).validate_python(fields)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=24)
    layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    clip = CLIPModel(
        CLIPConfig(
            text_config={"vocab_size": len(words), "max_position_embeddings": 24, **layer, **special},
            vision_config={"image_size": PIXELS, "patch_size": 8, **layer},
            projection_dim=12,
        )
    )
    for weights in clip.parameters():  # CLIP's own initialisation is so small that every image looks the same
        if weights.ndim > 1:
            nn.init.normal_(weights, std=0.3)
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = {"height": PIXELS, "width": PIXELS}
    CLIPImageProcessorPil(size={"shortest_edge": PIXELS}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    ResNetForImageClassification(
        ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            id2label=dict(enumerate(LABELS)),
            label2id={label: i for i, label in enumerate(LABELS)},
        )
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": PIXELS, "width": PIXELS}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def head_weights() -> dict[str, Tensor]:
    """LAION's layout at a fifth of its widths: layers 1, 3 and 5 are its dropouts."""
    generator = torch.Generator().manual_seed(0)
    widths = [12, 16, 8, 4, 2, 1]
    weights = {}
    for number, (n_in, n_out) in zip((0, 2, 4, 6, 7), pairwise(widths), strict=True):
        weights[f"layers.{number}.weight"] = torch.randn(n_out, n_in, generator=generator)
        weights[f"layers.{number}.bias"] = torch.randn(n_out, generator=generator)
    return weights


@pytest.fixture(scope="session")
def head_path(tmp_path_factory: pytest.TempPathFactory, head_weights: dict[str, Tensor]) -> Path:
    from safetensors.torch import save_file

    file = tmp_path_factory.mktemp("head") / "head.safetensors"
    save_file(head_weights, file)
    return file


@pytest.fixture(scope="session")
def plugins(clip_folder: Path, classifier_folder: Path, head_path: Path) -> dict[str, Any]:
    """One config for each thing that a differentiable reward can do."""
    return {
        "jpeg": plugin_of(kind="jpeg"),
        "jpeg incompressible": plugin_of(kind="jpeg", target="incompressible", quality=20, chroma_subsampling=False),
        "mirror": plugin_of(kind="symmetry"),
        "mirror top_bottom": plugin_of(kind="symmetry", axis="top_bottom"),
        "anti_rotation": plugin_of(kind="symmetry", pattern="anti_rotation"),
        "border": plugin_of(kind="colour"),
        "centre": plugin_of(kind="colour", region="centre", rgb=(1, 0, 0.5)),
        "clip": plugin_of(kind="clip", model=str(clip_folder)),
        "clip logit": plugin_of(kind="clip", model=str(clip_folder), logit_scale=True),
        "aesthetic": plugin_of(kind="aesthetic", model=str(clip_folder), head=str(head_path)),
        "classifier": plugin_of(kind="classifier", model=str(classifier_folder)),
        "classifier label": plugin_of(kind="classifier", model=str(classifier_folder), label="apple"),
    }


@pytest.fixture
def picture() -> Callable[..., Tensor]:
    """Smooth blobs, an edged disc and some noise: (B,3,H,W) fp64, multiples of 1/255, away from 0 and 1."""

    def draw(batch: int = 3, height: int = 24, width: int | None = None, noise: float = 0.02, edge: float = 0.2) -> Tensor:
        width = width or height
        generator = torch.Generator().manual_seed(batch + height)
        blobs = torch.rand(batch, 3, 4, 4, generator=generator, dtype=torch.float64)
        smooth = 0.25 + 0.3 * torch.nn.functional.interpolate(blobs, (height, width), mode="bicubic", align_corners=True)
        y = torch.linspace(-1, 1, height, dtype=torch.float64)[:, None]
        x = torch.linspace(-1, 1, width, dtype=torch.float64)
        disc = ((x - 0.1) ** 2 + (y + 0.2) ** 2 < 0.3).double()
        images = smooth + edge * disc + noise * torch.randn(smooth.shape, generator=generator, dtype=torch.float64)
        return (images.clamp(0.05, 0.95) * 255).round() / 255

    return draw
