"""A float64 policy small enough for finite differences: a two-layer network on 2x4x4 latents, a smooth decoder and reward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raydiff.core.denoise import Predict, guided
from raydiff.core.policy import Policy
from raydiff.core.reward_vjp import weighted_sum
from raydiff.core.schedule import Schedule

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
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.denoiser = Network()
        self.denoiser.inner.requires_grad_(False)
        self.denoiser.outer.requires_grad_(False)

    def predict(self, denoiser: nn.Module, prompts: Sequence[str], guidance: float, detach_negative: bool = False) -> Predict:
        codes = torch.tensor([len(p) / 10 for p in prompts], dtype=torch.float64)
        if guidance == 1:
            return lambda x, time: denoiser(x, time, codes)
        both = torch.cat([torch.zeros_like(codes), codes])
        return guided(lambda x, time: denoiser(x, time, both), guidance, detach_negative=detach_negative)

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


def smooth_reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
    target = torch.linspace(0.2, 0.9, images.shape[-1], dtype=images.dtype)
    return -((images[:, 0] - target) ** 2 + (images[:, 1] * images[:, 2]) ** 2).mean((1, 2))


def make_policy(
    *, steps: int = 4, guidance: float = 3.0, eta: float = 0.0, checkpointing: bool = True, seed: int = 0
) -> Policy:
    torch.manual_seed(0)
    model = Model()
    return Policy(
        model=model,  # type: ignore[arg-type]
        denoiser=model.denoiser,
        schedule=Schedule.from_config(SD, steps, spacing="trailing", final_alpha=1.0),
        score=weighted_sum({"smooth": smooth_reward}, {"smooth": 1.0}),
        guidance=guidance,
        eta=eta,
        gradient_checkpointing=checkpointing,
    )


def gradient(loss: Tensor, policy: Policy) -> Tensor:
    """d loss / d delta, flattened."""
    return torch.autograd.grad(loss, policy.model.trained()["delta"])[0].flatten()
