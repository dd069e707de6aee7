"""The differentiable JPEG codec and the byte count, against PIL."""

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from raydiff.rewards.jpeg import CHROMA, LUMA, codec, dct_basis, soft_round, table
from tests.rewards.conftest import plugin_of

Picture = Callable[..., Tensor]


def pil_file(image: Tensor, quality: int, subsampling: int = 2) -> io.BytesIO:
    """A (3,H,W) image as a JPEG file; subsampling 2 is 4:2:0, 0 is 4:4:4."""
    pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality, subsampling=subsampling)
    return file


def pil_codec(image: Tensor, quality: int, subsampling: int = 2) -> Tensor:
    decoded = np.array(Image.open(pil_file(image, quality, subsampling)))
    return torch.from_numpy(decoded).permute(2, 0, 1).double() / 255


def test_cosine_basis_is_orthonormal() -> None:
    torch.testing.assert_close(dct_basis() @ dct_basis().T, torch.eye(8, dtype=torch.float64))


@pytest.mark.parametrize("quality", [1, 10, 49, 50, 75, 95, 100])
def test_tables_are_those_in_pil_files(quality: int, picture: Picture) -> None:
    tables = Image.open(pil_file(picture(1)[0], quality)).quantization
    for base, written in ((LUMA, tables[0]), (CHROMA, tables[1])):
        assert table(base, quality).flatten().tolist() == list(written)


@pytest.mark.parametrize("subsampling", [2, 0])
@pytest.mark.parametrize("quality", [10, 50, 95])
def test_codec_with_hard_rounding_is_pil(quality: int, subsampling: int, picture: Picture) -> None:
    (image,) = picture(1, 56, 40, noise=0)
    ours = codec(image[None], quality, subsampling == 2, rounding=torch.round)[0].clamp(0, 1)
    distance = 255 * (ours - pil_codec(image, quality, subsampling)).abs()
    # libjpeg computes in integers; where its rounding tips a coefficient over, a block differs by a step. The error that
    # both measure is 1.4 to 11 levels.
    assert distance.mean() < 1


@pytest.mark.parametrize("size", [(32, 32), (17, 9), (1, 1), (24, 40)])
def test_codec_keeps_any_size(size: tuple[int, int], picture: Picture) -> None:
    image = picture(2, *size)
    for subsampling in (True, False):
        assert codec(image, 50, subsampling).shape == image.shape
    torch.testing.assert_close(codec(image, 100, False), image, rtol=0, atol=0.02)


def test_soft_error_follows_the_error_of_pil(picture: Picture) -> None:
    """Over pictures and qualities: ratio 0.6 to 1.2 (soft rounding leaves 0.73 of the hard error), correlation > 0.99."""
    pairs = []
    for noise in (0.0, 0.02, 0.1):
        (image,) = picture(1, 48, noise=noise)
        errors = []
        for quality in (10, 30, 60, 90):
            soft = (image - codec(image[None], quality)[0]).square().mean()
            errors.append((soft, (image - pil_codec(image, quality)).square().mean()))
        soft_errors, pil_errors = torch.tensor(errors).T
        assert (soft_errors.diff() < 0).all(), "a higher quality has a smaller error"
        assert (pil_errors.diff() < 0).all()
        pairs += errors
    soft_errors, pil_errors = torch.tensor(pairs).T
    ratio = soft_errors / pil_errors
    assert ratio.min() > 0.6
    assert ratio.max() < 1.2
    assert torch.corrcoef(torch.stack((soft_errors.log(), pil_errors.log())))[0, 1] > 0.99


def test_soft_rounding_is_rounding_at_whole_numbers_and_has_a_slope_between() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0, 0.25, -1.4], dtype=torch.float64, requires_grad=True)
    y = soft_round(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([-2, 0, 3, 0.25**3, -1 - 0.4**3], dtype=torch.float64))
    torch.testing.assert_close(x.grad, torch.tensor([0, 0, 0, 3 * 0.25**2, 3 * 0.4**2], dtype=torch.float64))


def test_reward_reads_as_a_psnr(picture: Picture) -> None:
    images = picture(2)
    mse = (images - codec(images, 30)).square().mean((1, 2, 3))
    score = plugin_of(kind="jpeg", quality=30).build()(images, ["", ""])
    torch.testing.assert_close(score, -1000 * mse)
    torch.testing.assert_close(plugin_of(kind="jpeg", quality=30, target="incompressible").build()(images, ["", ""]), -score)
    torch.testing.assert_close(10 * (1000 / -score).log10(), -10 * mse.log10())


@pytest.mark.parametrize(("target", "sign"), [("compressible", 1), ("incompressible", -1)])
def test_climbing_the_reward_changes_the_size_of_the_file(target: str, sign: int, picture: Picture) -> None:
    soft, size = plugin_of(kind="jpeg", target=target).build(), plugin_of(kind="jpeg_size").build()
    start = picture(2, 32, noise=0.1)
    images = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([images], lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        (-soft(images, ["", ""]).sum()).backward()
        optimizer.step()
    assert (sign * (size(images, ["", ""]) - size(start, ["", ""])) > 0).all()


@pytest.mark.parametrize("quality", [30, 95])
def test_size_is_the_length_of_the_file(quality: int, picture: Picture) -> None:
    images = picture(3, 40).float()
    expected = torch.tensor([-len(pil_file(image, quality).getvalue()) / 1000 for image in images])
    plugin = plugin_of(kind="jpeg_size", quality=quality)
    assert not plugin.differentiable
    score = plugin.build()(images, [""] * 3)
    assert score.dtype == torch.float32
    assert torch.equal(score, expected)
    assert torch.equal(plugin_of(kind="jpeg_size", quality=quality, target="incompressible").build()(images, [""] * 3), -score)
    assert torch.equal(plugin.build()(images[[2, 0]].requires_grad_(True), ["", ""]), score[[2, 0]])


@pytest.mark.parametrize("fields", [{"quality": 0}, {"quality": 101}, {"target": "small"}])
def test_impossible_settings_are_refused(fields: dict) -> None:
    for kind in ("jpeg", "jpeg_size"):
        with pytest.raises(ValidationError, match=next(iter(fields))):
            plugin_of(kind=kind, **fields)
