"""Prompt alignment, against the whole of transformers' own pipeline."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.rewards.conftest import PIXELS, PROMPTS, plugin_of

Picture = Callable[..., Tensor]


@pytest.fixture
def copy(clip_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clip_folder, tmp_path / "clip"))


@pytest.mark.parametrize(("size", "tolerance"), [((PIXELS, PIXELS), 1e-5), ((48, 40), 0.01)])
def test_alignment_is_that_of_transformers(
    size: tuple[int, int], tolerance: float, clip_folder: Path, picture: Picture
) -> None:
    """Resized images go through PIL there, and random weights magnify its rounding more than trained ones."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    images = picture(3, *size).float()
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    inputs = CLIPImageProcessorPil.from_pretrained(clip_folder)([Image.fromarray(p) for p in pixels], return_tensors="pt")
    tokens = CLIPTokenizer.from_pretrained(clip_folder)(PROMPTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        logits = clip(**inputs, **tokens).logits_per_image.diagonal()
    reward = plugin_of(kind="clip", model=str(clip_folder)).build()
    scaled = plugin_of(kind="clip", model=str(clip_folder), logit_scale=True).build()
    torch.testing.assert_close(reward(images, PROMPTS), logits / clip.logit_scale.exp(), rtol=0, atol=tolerance)
    torch.testing.assert_close(scaled(images, PROMPTS), logits, rtol=0, atol=tolerance * clip.logit_scale.exp().item())
    assert logits.std() / clip.logit_scale.exp() > 5 * tolerance, "the tiny model tells these apart"


def test_prompts_matter_and_long_ones_are_cut(clip_folder: Path, picture: Picture) -> None:
    reward, images = plugin_of(kind="clip", model=str(clip_folder)).build(), picture(1).float()
    letters = list("abcdefgh" * 4)  # each a token; 22 fit between the start and the end
    scores = [reward(images, [" ".join(letters[:n])]).item() for n in (0, 1, 21, 22, 23, 32)]
    assert len(set(scores[:4])) == 4
    assert len(set(scores[3:])) == 1


def test_half_precision_weights_score_almost_the_same(clip_folder: Path, picture: Picture) -> None:
    images = picture(3).float()
    full = plugin_of(kind="clip", model=str(clip_folder)).build()(images, PROMPTS)
    reward = plugin_of(kind="clip", model=str(clip_folder), dtype="bfloat16").build()
    assert reward.embed_image.clip.dtype == torch.bfloat16
    half = reward(images, PROMPTS)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0, atol=0.03)


def test_processor_may_live_elsewhere(copy: Path, clip_folder: Path, picture: Picture) -> None:
    for file in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / file).unlink()
    plugin = plugin_of(kind="clip", model=str(copy), processor=str(clip_folder))
    plugin.preflight()
    whole = plugin_of(kind="clip", model=str(clip_folder))
    images = picture(3).float()
    assert torch.equal(plugin.build()(images, PROMPTS), whole.build()(images, PROMPTS))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"])
def test_a_missing_file_is_named(file: str, copy: Path) -> None:
    (copy / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"clip/{file} is missing"):
        plugin_of(kind="clip", model=str(copy)).preflight()


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_a_broken_file_is_named(file: str, copy: Path) -> None:
    whole = (copy / file).read_bytes()
    (copy / file).write_bytes(whole[: len(whole) // 2])
    plugin = plugin_of(kind="clip", model=str(copy))
    for use in (plugin.preflight, plugin.build):
        with pytest.raises(ValueError, match=f"clip/{file} is broken"):
            use()


def test_a_missing_shard_is_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    index = {"weight_map": {"logit_scale": "model-00001-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002.safetensors is missing"):
        plugin_of(kind="clip", model=str(copy)).preflight()


def test_a_missing_weight_is_an_error_and_not_noise(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack visual_projection\.weight"):
        plugin_of(kind="clip", model=str(copy)).build()


def test_another_kind_of_model_is_refused(classifier_folder: Path, clip_folder: Path) -> None:
    with pytest.raises(ValueError, match="of type 'resnet', not 'clip'"):
        plugin_of(kind="clip", model=str(classifier_folder), processor=str(clip_folder)).build()


def test_a_folder_that_is_none_is_named_and_a_hub_id_is_left_alone() -> None:
    for missing in ("/no/such/folder", "./clip", "some/models/clip"):
        with pytest.raises(FileNotFoundError, match=f"model = '{missing}': there is no such folder"):
            plugin_of(kind="clip", model=missing).preflight()
    plugin_of(kind="clip", model="openai/clip-vit-large-patch14").preflight()
