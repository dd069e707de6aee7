"""A float64 policy small enough for finite differences: a two-layer network on 2x4x4 latents, a smooth decoder and reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from raydiff.core.denoise import Predict, guided
from raydiff.core.log_prob import gaussian_log_prob
from raydiff.core.policy import Policy
from raydiff.core.reward_vjp import weighted_sum
from raydiff.core.rollouts import Rollouts
from raydiff.core.schedule import Schedule
from raydiff.models.base import ModelConfig

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "set_alpha_to_one": True}


class Network(nn.Module):
    """out = W2 tanh(W1 x + time + prompt), plus `delta`: what training changes. delta = 0 is the reference."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(2, 6, 3, padding=1).double()
        self.outer = nn.Conv2d(6, 2, 3, padding=1).double()
        self.delta = nn.Parameter(0.1 * torch.randn(2, 6, 1, 1, dtype=torch.float64))
        self.on = True

    def forward(self, x: Tensor, time: Tensor, prompt: Tensor) -> Tensor:
        h = torch.tanh(self.inner(x.double()) + (time / 1000 + prompt).double()[:, None, None, None])
        out = self.outer(h)
        return out + nn.functional.conv2d(h, self.delta) if self.on else out


class Model:
    """A LatentModel whose images have 3 channels, each a smooth function of the latent."""

    latent_shape = (2, 4, 4)
    picture_size = 4
    has_reference = True
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.denoiser = Network()
        self.denoiser.inner.requires_grad_(False)
        self.denoiser.outer.requires_grad_(False)

    def schedule(self, steps: int, spacing: Any, final_alpha: float | None) -> Schedule:
        return Schedule.from_config({**SD, "set_alpha_to_one": False}, steps, spacing=spacing, final_alpha=final_alpha)

    def predict(self, denoiser: nn.Module, prompts: Sequence[str], guidance: float, detach_negative: bool = False) -> Predict:
        codes = torch.tensor([len(p) / 10 for p in prompts], dtype=torch.float64)
        if guidance == 1:
            return lambda x, time: denoiser(x, time, codes)
        both = torch.cat([torch.zeros_like(codes), codes])
        return guided(lambda x, time: denoiser(x, time, both), guidance, detach_negative=detach_negative)

    def passes(self, guidance: float) -> int:
        return 1 if guidance == 1 else 2

    def decode(self, latents: Tensor) -> Tensor:
        return torch.sigmoid(torch.stack([latents[:, 0], latents[:, 1], latents.sum(1)], 1))

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.denoiser.on = False
        try:
            yield
        finally:
            self.denoiser.on = True

    def trained(self) -> dict[str, nn.Parameter]:
        return {"delta": self.denoiser.delta}

    def parts(self) -> dict[str, nn.Module]:
        return {"network": self.denoiser}

    def settings(self) -> dict[str, Any]:
        return {}


class Tiny(ModelConfig):
    """The model of a run whose numbers are compared to more digits than float32 has."""

    kind: str = "tests.core.tiny"

    def build(self, device: torch.device | str = "cpu", **_: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Model()


def smooth_reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    target = torch.linspace(0.2, 0.9, images.shape[-1], dtype=images.dtype)
    return -((images[:, 0] - target) ** 2 + (images[:, 1] * images[:, 2]) ** 2).mean((1, 2))


def make_policy(
    *, steps: int = 4, guidance: float = 3.0, eta: float = 0.0, checkpointing: bool = True, final_alpha: float | None = 1.0
) -> Policy:
    torch.manual_seed(0)
    model = Model()
    return Policy(
        model=model,  # type: ignore[arg-type]
        denoiser=model.denoiser,
        schedule=model.schedule(steps, "trailing", final_alpha),
        score=weighted_sum({"smooth": smooth_reward}, {"smooth": 1.0}),
        guidance=guidance,
        eta=eta,
        gradient_checkpointing=checkpointing,
    )


def gradient(loss: Tensor, policy: Policy) -> Tensor:
    """d loss / d delta, flattened."""
    return torch.autograd.grad(loss, policy.model.trained()["delta"])[0].flatten()


def make_rollouts(
    policy: Policy, prompts: Sequence[str], attempts: int, *, first_seed: int = 0, rewards: Tensor | None = None
) -> Rollouts:
    """Whole trajectories of `attempts` that share x_T, with the log-probability of each step; rewards (B,G), or the policy's."""
    flat = [prompt for prompt in prompts for _ in range(attempts)]
    seeds = first_seed + torch.arange(len(flat))
    starts = [first_seed + 1000 + b for b in range(len(prompts)) for _ in range(attempts)]
    steps: list[Tensor] = []
    keep = range(policy.schedule.steps + 1)

    def record(x: Tensor, mean: Tensor, std: float) -> None:
        steps.append(gaussian_log_prob(x, mean, std) if std else torch.zeros(len(x)))

    clean, points = policy.sample(flat, seeds.tolist(), starts=starts, keep=keep, observe=record)
    shape = (len(prompts), attempts)
    total = policy.rewards(clean, flat, seeds.tolist())[0].detach().view(shape) if rewards is None else rewards
    log_probs = torch.stack(steps, 1).unflatten(0, shape)
    points = points.double().unflatten(0, shape)
    return Rollouts(tuple(prompts), seeds.view(shape), points, tuple(keep), {"total": total}, log_probs)
