"""What holds for each differentiable reward."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raydiff.core.reward_vjp import score_and_grad, weighted_sum, with_remote_gradient
from tests.rewards.conftest import PROMPTS, plugin_of

NAMES = [
    *("jpeg", "jpeg incompressible", "mirror", "mirror top_bottom", "anti_rotation", "border", "centre"),
    *("clip", "clip logit", "aesthetic", "classifier", "classifier label"),
]
every_reward = pytest.mark.parametrize("name", NAMES)
Picture = Callable[..., Tensor]


def built(plugin: Any, dtype: torch.dtype = torch.float64) -> Any:
    reward = plugin.build()
    return reward.to(dtype) if isinstance(reward, nn.Module) else reward


def gradient(reward: Any, images: Tensor, prompts: Sequence[str] = PROMPTS) -> Tensor:
    images = images.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(reward(images, prompts).sum(), images)
    return grad


def test_names_are_those_of_the_fixture(plugins: dict[str, Any]) -> None:
    assert set(NAMES) == set(plugins)


@every_reward
def test_gradient_is_that_of_finite_differences(name: str, plugins: dict[str, Any], picture: Picture) -> None:
    reward, images, step = built(plugins[name]), picture(), 1e-6
    grad = gradient(reward, images)
    for pixel in [(0, 0, 0, 0), (0, 1, 10, 13), (1, 2, 1, 22), (2, 1, 12, 2), (2, 0, 23, 11)]:
        ahead, behind = images.clone(), images.clone()
        ahead[pixel] += step
        behind[pixel] -= step
        slope = (reward(ahead, PROMPTS) - reward(behind, PROMPTS)).sum() / (2 * step)
        torch.testing.assert_close(grad[pixel], slope, rtol=1e-5, atol=1e-6 * grad.abs().max().item())


@every_reward
@pytest.mark.parametrize("side", [32, 512])
def test_gradient_is_finite_and_reaches_each_image(name: str, side: int, plugins: dict[str, Any], picture: Picture) -> None:
    images = picture(height=side).float()
    grad = gradient(built(plugins[name], torch.float32), images)
    assert grad.isfinite().all()
    assert (grad.abs().amax((1, 2, 3)) > 0).all()


@every_reward
@pytest.mark.parametrize("level", [0.0, 1.0])
def test_gradient_is_finite_on_a_flat_picture(name: str, level: float, plugins: dict[str, Any]) -> None:
    assert gradient(built(plugins[name], torch.float32), torch.full((3, 3, 24, 24), level)).isfinite().all()


@every_reward
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_is_fp32(name: str, dtype: torch.dtype, plugins: dict[str, Any], picture: Picture) -> None:
    reward, images = plugins[name].build(), picture().to(dtype)
    score = reward(images, PROMPTS)
    assert score.dtype == torch.float32
    assert score.shape == (3,)
    assert gradient(reward, images).dtype == dtype


@every_reward
def test_each_image_is_scored_on_its_own(name: str, plugins: dict[str, Any], picture: Picture) -> None:
    reward, images, order = built(plugins[name]), picture(), [2, 0, 1]
    together = reward(images, PROMPTS)
    alone = torch.cat([reward(images[i : i + 1], [prompt]) for i, prompt in enumerate(PROMPTS)])
    shuffled = reward(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shuffled, together[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["clip", "aesthetic", "classifier"])
def test_weights_are_frozen(name: str, plugins: dict[str, Any], picture: Picture) -> None:
    reward = plugins[name].build()
    images = picture().float().requires_grad_(True)
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None
    assert not any(module.training for module in reward.modules())
    assert all(not p.requires_grad and p.grad is None for p in reward.parameters())


@pytest.fixture
def decoder() -> nn.Module:
    """Latents (B,4,12,12) -> images (B,3,24,24)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Upsample(scale_factor=2), nn.Sigmoid()).double()


def assert_remote_is_local(score: Any, decoder: nn.Module) -> None:
    latents = torch.randn(3, 4, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gradients = []
    for scored in (score, with_remote_gradient(score_and_grad(score))):
        total, parts = scored(decoder(latents), PROMPTS)
        loss = -(total * torch.tensor([0.5, 2.0, 1.0])).mean()
        gradients.append((total.detach(), *torch.autograd.grad(loss, list(decoder.parameters()))))
        assert all(part.shape == (3,) and not part.requires_grad for part in parts.values())
    for local, remote in zip(*gradients, strict=True):
        assert (local - remote).norm() <= 1e-10 * local.norm()
        assert local.norm() > 0


@every_reward
def test_remote_gradient_is_local_backpropagation(name: str, plugins: dict[str, Any], decoder: nn.Module) -> None:
    assert_remote_is_local(weighted_sum({name: built(plugins[name])}, {name: 1.0}), decoder)


def test_remote_gradient_of_a_weighted_sum(plugins: dict[str, Any], decoder: nn.Module) -> None:
    weights = {name: 0.3 * (-1) ** i * (i + 1) for i, name in enumerate(NAMES)}
    assert_remote_is_local(weighted_sum({name: built(plugins[name]) for name in NAMES}, weights), decoder)


@every_reward
def test_config_survives_json(name: str, plugins: dict[str, Any]) -> None:
    plugin = plugins[name]
    assert plugin_of(**json.loads(json.dumps(plugin.model_dump(mode="json")))) == plugin
    assert plugin.differentiable
    plugin.preflight()
