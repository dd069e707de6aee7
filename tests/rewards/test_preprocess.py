"""Preprocessing in torch, against the image processors of transformers on PIL images."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from raydiff.rewards._images import Geometry, Preprocess, centre_crop, preprocess_of, resized

Picture = Callable[..., Tensor]


def processors() -> dict[str, Any]:
    from transformers import CLIPImageProcessorPil, ConvNextImageProcessorPil, ViTImageProcessorPil

    return {
        "clip": CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        "clip, sizes as numbers": CLIPImageProcessorPil(size=20, crop_size=16),
        "clip, crop larger than the image": CLIPImageProcessorPil(size={"shortest_edge": 11}, crop_size=16),
        "clip, no resize": CLIPImageProcessorPil(do_resize=False, do_center_crop=True, crop_size=10),
        "clip, no normalisation": CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16, do_normalize=False),
        "vit": ViTImageProcessorPil(size={"height": 16, "width": 12}),
        "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=0.875),
        "convnext, large": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    }


def pil_images(images: Tensor) -> list[Image.Image]:
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in pixels]


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (50, 40), (33, 47), (12, 12)])
@pytest.mark.parametrize("name", list(processors()))
def test_preprocessing_is_that_of_pil(name: str, size: tuple[int, int], picture: Picture) -> None:
    """Within PIL's rounding: each of two passes rounds to 1/255, which is 0.015 in units of the standard deviation."""
    processor, images = processors()[name], picture(2, *size)
    expected = torch.from_numpy(np.stack(processor(pil_images(images))["pixel_values"])).double()
    ours = preprocess_of(processor)(images)
    assert ours.shape == expected.shape
    distance = (ours - expected).abs()
    assert distance.max() < 0.02
    assert distance.mean() < 0.005


def test_hard_edges_differ_more_because_pil_clips_what_bicubic_overshoots(picture: Picture) -> None:
    """A black and white picture, 4 times smaller: 0.024 standard deviations on average."""
    images = (picture(2, 64) > 0.4).double()
    processor = processors()["clip"]
    expected = torch.from_numpy(np.stack(processor(pil_images(images))["pixel_values"])).double()
    assert (preprocess_of(processor)(images) - expected).abs().mean() < 0.03


def test_half_precision_images_are_resized_in_fp32(picture: Picture) -> None:
    preprocess, images = preprocess_of(processors()["clip"]), picture(2, 40).to(torch.bfloat16)
    assert torch.equal(preprocess(images), preprocess(images.float()))


def test_resized_keeps_the_shape() -> None:
    assert resized((512, 512), 224) == (224, 224)
    assert resized((512, 768), 224) == (224, 336)
    assert resized((333, 100), 50) == (166, 50)
    assert resized((10, 20), (7, 9)) == (7, 9)


def test_centre_crop_pads_small_images() -> None:
    assert torch.equal(centre_crop(torch.arange(5.0)[None, None, None], (1, 3)).flatten(), torch.tensor([1.0, 2, 3]))
    padded = centre_crop(torch.ones(1, 1, 1, 2), (1, 5)).flatten()
    assert torch.equal(padded, torch.tensor([0.0, 0, 1, 1, 0]))


def test_a_processor_that_does_more_is_refused() -> None:
    from transformers import CLIPImageProcessorPil, EfficientNetImageProcessorPil

    with pytest.raises(ValueError, match="EfficientNetImageProcessorPil is not known"):
        preprocess_of(EfficientNetImageProcessorPil())
    with pytest.raises(ValueError, match="resample = 1"):
        preprocess_of(CLIPImageProcessorPil(resample=1))


def test_preprocess_moves_with_its_module() -> None:
    preprocess = Preprocess(Geometry(), [0.5] * 3, [0.25] * 3).double()
    assert preprocess(torch.ones(1, 3, 2, 2)).dtype == torch.float64
    assert not preprocess.state_dict()
