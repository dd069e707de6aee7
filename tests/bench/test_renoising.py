"""The gradients whose variance is split are those of training, and the split is that of a known mixture."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from raydiff.bench.renoising import _gradients, variances
from raydiff.config import Run, override
from raydiff.plan.cost import Backward
from raydiff.session import Session


def test_variances_of_a_known_mixture() -> None:
    """Pictures of variance 4 and copies of variance 9, for each of 3 weights."""
    draw = torch.Generator().manual_seed(0)
    centres, copies = 2 * torch.randn(4000, 1, 3, generator=draw), 3 * torch.randn(4000, 8, 3, generator=draw)
    between, within = variances(centres + copies)
    assert between == pytest.approx(12, rel=0.05)
    assert within == pytest.approx(27, rel=0.02)
    assert variances(copies[:2])[0] >= 0


@pytest.fixture
def saturated(tiny_run: Callable[..., Run], tiny_pipeline: Path, tmp_path: Path) -> Run:
    """A run of three re-noised copies whose decoder puts most pixels beyond 0 and 1."""
    shutil.copytree(tiny_pipeline, tmp_path / "model")
    vae = AutoencoderKL.from_pretrained(tmp_path / "model" / "vae")
    vae.decoder.conv_out.weight.data *= 20
    vae.save_pretrained(tmp_path / "model" / "vae")
    changes = {"model.path": str(tmp_path / "model"), "batch": {"size": 1, "micro": 1}}
    return override(tiny_run("draft_lv", changes), {"method.n": 3, "method.include_original": False})


def test_gradients_of_saturated_pixels_are_those_of_training(saturated: Run) -> None:
    """The copies' mean is the gradient of DRaFT-LV's own loss: a saturated pixel lets the loss through, not the reward."""
    session = Session(saturated)
    pixels = torch.stack([picture.image for picture in session.evaluate()])  # bytes
    assert ((pixels == 0) | (pixels == 255)).float().mean() > 0.5
    found = _gradients(saturated, pictures=2, copies=3)
    for step, copies in enumerate(found):
        expected = _trained(session, step)
        assert expected.norm() > 0
        torch.testing.assert_close(copies.mean(0), expected, rtol=1e-3, atol=1e-3 * float(expected.norm()))


def _trained(session: Session, step: int) -> Tensor:
    """The gradient of an update."""
    weights = list(session.model.trained().values())
    for weight in weights:
        weight.grad = None
    session.update(Backward(), step)
    return torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
