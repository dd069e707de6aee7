"""What is held in memory has one digest in all processes, and another when any of it differs."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raydiff import fingerprint
from raydiff.config import Run
from raydiff.models import stable_diffusion

Build = Callable[[], stable_diffusion.StableDiffusion]


@pytest.fixture
def build(tiny_run: Callable[..., Run]) -> Build:
    return lambda: tiny_run().model.build(seed=3)  # type: ignore[no-any-return]


def swap_words(model: Any) -> None:
    tokenizer = model.pipe.tokenizer
    tokenizer.add_tokens(["porcupine"])


def shift(module: nn.Module) -> None:
    with torch.no_grad():
        next(p for p in module.parameters() if not p.requires_grad).view(-1)[-1] += 1e-6


CHANGES: dict[str, Callable[[Any], Any]] = {
    "tokenizer's settings": swap_words,
    "text_encoder": lambda model: shift(model.pipe.text_encoder),
    "vae": lambda model: shift(model.pipe.vae),
    "unet": lambda model: shift(model.pipe.unet),
    "scheduler's settings": lambda model: model.pipe.scheduler.register_to_config(beta_end=0.013),
    "vae's settings": lambda model: model.pipe.vae.register_to_config(scaling_factor=0.2),
}


@pytest.mark.parametrize("part", CHANGES)
def test_any_part_that_differs_is_named(build: Build, part: str) -> None:
    model, other = build(), build()
    ours = fingerprint.of_model(model)
    assert fingerprint.of_model(other) == ours
    CHANGES[part](other)
    theirs = fingerprint.of_model(other)
    assert [name for name in ours if theirs[name] != ours[name]] == [part]


def test_neither_trained_weights_nor_use_count(build: Build) -> None:
    model = build()
    before = fingerprint.of_model(model)
    model.embed(["a", "a longer prompt than the one before"], 2.0)
    model.decode(torch.zeros(1, *model.latent_shape))
    with torch.no_grad():
        for p in model.trained().values():
            p.add_(1)
    assert fingerprint.of_model(model) == before


class Judge:
    """A reward that is an object with a module and a tensor."""

    def __init__(self) -> None:
        self.network, self.scale, self.name = nn.Linear(2, 1), torch.ones(3), "judge"


def enclosed() -> Any:
    network, factor = nn.Linear(2, 1), torch.ones(1)
    return lambda images, prompts: factor * network(images)


def test_rewards_of_each_form() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    judge, function = Judge(), enclosed()
    found = [fingerprint.of_reward(reward) for reward in (module, judge, function)]
    other = copy.deepcopy(module)
    other[1].running_mean += 1  # type: ignore[operator]
    assert fingerprint.of_reward(other) != found[0]
    judge.scale *= 2
    assert fingerprint.of_reward(judge) != found[1]
    assert fingerprint.of_reward(enclosed()) != found[2]  # drawn anew
    assert fingerprint.of_reward(function) == found[2]


def test_the_folders_name_does_not_count(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    run = tiny_run(changes={"model.train": "full"})
    shutil.copytree(run.model.path, tmp_path / "elsewhere")
    moved = run.model.model_copy(update={"path": str(tmp_path / "elsewhere")})
    assert fingerprint.of_model(moved.build(seed=4)) == fingerprint.of_model(run.model.build(seed=3))
