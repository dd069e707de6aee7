"""The embedded CLIP, head and classifiers on pictures that the embedded model makes: good captions score higher."""

from typing import Any

import pytest
import torch
from torch import Tensor

from raydiff import assets
from tests.rewards.conftest import plugin_of

NAMES = ["cat", "fox", "zebra", "pizza", "banana", "frog", "tulip", "cactus"]
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "pink", "orange"]
PROMPTS = [f"a {name} on a {colour} background" for name, colour in zip(NAMES, COLOURS, strict=True)]
OTHERS = PROMPTS[1:] + PROMPTS[:1]  # another name and another colour for each picture


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(assets.path("pipeline"), safety_checker=None).to(torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    made = pipe(PROMPTS, num_inference_steps=12, guidance_scale=3, generator=torch.manual_seed(0), output_type="np")
    return torch.from_numpy(made.images).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "clip"},
        {"kind": "clip", "logit_scale": True},
        {"kind": "aesthetic"},
        {"kind": "classifier"},
        {"kind": "classifier", "label": "cat"},
        {"kind": "classifier", "model": "embedded-style", "label": "3d"},
    ],
)
def test_files_are_there_and_a_gradient_reaches_each_picture(fields: dict[str, Any], pictures: Tensor) -> None:
    plugin = plugin_of(**fields)
    plugin.preflight()
    images = pictures.clone().requires_grad_(True)
    score = plugin.build()(images, PROMPTS)
    (grad,) = torch.autograd.grad(score.sum(), images)
    assert score.isfinite().all()
    assert grad.isfinite().all()
    assert (grad.abs().amax((1, 2, 3)) > 0).all()


@pytest.mark.parametrize("kind", ["clip", "classifier"])
def test_the_right_caption_scores_higher(kind: str, pictures: Tensor) -> None:
    reward = plugin_of(kind=kind).build()
    with torch.no_grad():
        right, wrong = reward(pictures, PROMPTS), reward(pictures, OTHERS)
    assert (right > wrong).float().mean() >= 0.75
    assert right.mean() > wrong.mean() + 0.2


def test_clip_sees_the_background(pictures: Tensor) -> None:
    reward = plugin_of(kind="clip").build()
    swapped = [f"a {name} on a {colour} background" for name, colour in zip(NAMES, COLOURS[1:] + COLOURS[:1], strict=True)]
    with torch.no_grad():
        assert (reward(pictures, PROMPTS) > reward(pictures, swapped)).float().mean() >= 0.75


def test_climbing_the_aesthetic_score_raises_it(pictures: Tensor) -> None:
    reward = plugin_of(kind="aesthetic").build()
    images = pictures.clone().requires_grad_(True)
    before = reward(images, PROMPTS)
    (grad,) = torch.autograd.grad(before.sum(), images)
    step = 0.5 * grad / grad.flatten(1).norm(dim=1)[:, None, None, None]
    assert (reward(images + step, PROMPTS) > before).all()


def test_every_embedded_prompt_names_a_class() -> None:
    from raydiff.rewards.classifier import classes_in

    reward = plugin_of(kind="classifier").build()
    for prompt in {*assets.prompts("train"), *assets.prompts("held_out")}:
        (number,) = classes_in(prompt, reward.names)
        assert f" {reward.model.config.id2label[number]} " in f" {prompt} "
