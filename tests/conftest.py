"""Shared fixtures: a tiny random Stable Diffusion folder, and runs on it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from raydiff.config import Run
from tests.tiny import make_pipeline


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a CUDA device, tests marked gpu are skipped, and say so."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A StableDiffusionPipeline folder with random weights: 8×8 latents, 16×16 pictures."""
    return make_pipeline(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_run(tiny_pipeline: Path) -> Callable[..., Run]:
    """tiny_run("draft_k", {"method.k": 2}): a run on the tiny model that takes seconds, with dotted changes."""
    from raydiff.config import override

    base = Run.model_validate(
        {
            "name": "tiny",
            "model": {"kind": "stable_diffusion", "path": str(tiny_pipeline), "lora": {"rank": 2}},
            "method": {"kind": "draft_k"},
            "rewards": {"blue": {"kind": "colour"}},
            "prompts": {"train": ["a cat", "a dog", "an ant", "a bee", "a fox"], "held_out": ["a pig", "a cow"]},
            "sampler": {"steps": 4, "guidance": 2.0},
            "batch": {"size": 4, "micro": 2},
            "optimizer": {"lr": 1e-2},
            "train": {"updates": 3, "checkpoint_every": 1},
            "evaluate": {"images": 4, "every": 2, "grid": 4},
        }
    )

    def make(method: str = "draft_k", changes: dict[str, Any] | None = None) -> Run:
        return override(base, {"method": {"kind": method}, **(changes or {})})

    return make
