"""The aesthetic head, against LAION's layers written out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.rewards.conftest import PROMPTS, plugin_of

Picture = Callable[..., Tensor]


@pytest.fixture
def published(head_weights: dict[str, Tensor]) -> nn.Module:
    """The layout of christophschuhmann/improved-aesthetic-predictor."""
    model = nn.Module()
    model.layers = nn.Sequential(
        *(nn.Linear(12, 16), nn.Dropout(0.2), nn.Linear(16, 8), nn.Dropout(0.2)),
        *(nn.Linear(8, 4), nn.Dropout(0.1), nn.Linear(4, 2), nn.Linear(2, 1)),
    )
    model.load_state_dict(head_weights)
    return model.eval()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_score_is_that_of_the_published_layers(
    suffix: str, published: nn.Module, clip_folder: Path, head_path: Path, tmp_path: Path, picture: Picture
) -> None:
    if suffix == ".pth":
        head_path = tmp_path / "head.pth"
        torch.save(published.state_dict(), head_path)
    plugin = plugin_of(kind="aesthetic", model=str(clip_folder), head=str(head_path))
    plugin.preflight()
    reward, images = plugin.build(), picture(3).float()
    with torch.no_grad():
        clip = reward.embed_image.clip
        features = clip.visual_projection(clip.vision_model(reward.embed_image.preprocess(images)).pooler_output)
        expected = published.layers(features / features.norm(dim=-1, keepdim=True)).squeeze(1)
    torch.testing.assert_close(reward(images, PROMPTS), expected)
    assert torch.equal(reward(images, [""] * 3), reward(images, PROMPTS))


def test_a_head_of_another_width_is_refused(clip_folder: Path, head_weights: dict[str, Tensor], tmp_path: Path) -> None:
    wide = {**head_weights, "layers.0.weight": torch.zeros(16, 768)}
    torch.save(wide, tmp_path / "head.pth")
    with pytest.raises(ValueError, match=r"embeddings of 768 numbers, .* gives 12"):
        plugin_of(kind="aesthetic", model=str(clip_folder), head=str(tmp_path / "head.pth")).build()


def test_a_file_that_is_no_head_is_named(clip_folder: Path, head_weights: dict[str, Tensor], tmp_path: Path) -> None:
    no_bias = {key: value for key, value in head_weights.items() if key != "layers.4.bias"}
    for weights in ({"fc.weight": torch.zeros(1)}, no_bias):
        torch.save(weights, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=r"head\.pth is no aesthetic head"):
            plugin_of(kind="aesthetic", model=str(clip_folder), head=str(tmp_path / "head.pth")).build()


def test_a_pickle_with_code_in_it_is_not_run(clip_folder: Path, published: nn.Module, tmp_path: Path) -> None:
    torch.save(published, tmp_path / "head.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        plugin_of(kind="aesthetic", model=str(clip_folder), head=str(tmp_path / "head.pth")).build()


def test_a_missing_or_broken_head_is_named(clip_folder: Path, head_path: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(head_path.read_bytes()[:-8])
    for head, error, message in (
        (tmp_path / "gone.pth", FileNotFoundError, "gone.pth is missing"),
        (cut, ValueError, "cut.safetensors is broken"),
        (tmp_path, ValueError, "a head is a .safetensors or .pth file"),
    ):
        with pytest.raises(error, match=message):
            plugin_of(kind="aesthetic", model=str(clip_folder), head=str(head)).preflight()
