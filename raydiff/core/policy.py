"""The policy: everything that a loss may call, with the denoiser that the engine trains.

Legend: B images, C h w latent, H W pixels, S sampler steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from raydiff.core.denoise import Noise, Observe, Predict, checkpointed, denoise, seeded_noise
from raydiff.core.reward_vjp import Parts, RewardError, Score
from raydiff.core.schedule import Schedule


class LatentModel(Protocol):
    """What sampling and losses call of a text-to-image latent diffusion model; `models.base.Model` has the rest.

    Everything but the trained weights is frozen and in eval mode.
    """

    denoiser: nn.Module  # the one module that an engine wraps
    device: torch.device
    latent_shape: tuple[int, int, int]  # C, h, w
    picture_size: int  # H = W

    @property
    def has_reference(self) -> bool:
        """Whether reference() can be had."""

    def passes(self, guidance: float) -> int:
        """Calls of the network that one guided prediction takes."""

    def schedule(self, steps: int, spacing: str | None, final_alpha: float | None) -> Schedule: ...

    def predict(self, denoiser: nn.Module, prompts: Sequence[str], guidance: float, detach_negative: bool = False) -> Predict:
        """The network under B prompts, guided; `denoiser` is `self.denoiser` or an engine around it."""

    def decode(self, latents: Tensor) -> Tensor:
        """(B,C,h,w) -> (B,3,H,W) in [0,1], differentiable."""

    def reference(self) -> AbstractContextManager[None]:
        """Inside, the denoiser has the weights from before training."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters to optimise, by the name that a checkpoint gives them."""


@dataclass
class Calls:
    """What a run has spent, in images: the denominators of sample efficiency. Guidance counts twice."""

    images: int = 0  # sampled
    reward_queries: int = 0
    denoiser_forward: int = 0  # with checkpointing's recomputation
    denoiser_backward: int = 0

    def __add__(self, other: Calls) -> Calls:
        return Calls(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class NonFiniteReward(ValueError):
    """A reward was NaN or infinite: the step is refused before it can reach the weights."""


class RewardFailed(ValueError):
    """A reward raised, again after being asked again, or answered with what cannot be used."""


@dataclass
class Policy:
    model: LatentModel
    denoiser: nn.Module
    schedule: Schedule
    score: Score
    guidance: float
    eta: float = 0.0
    detach_negative: bool = False
    gradient_checkpointing: bool = True
    calls: Calls = field(default_factory=Calls)

    @cached_property
    def training_schedule(self) -> Schedule:
        """Every step of the noise process that the network was trained on, from the noisiest."""
        return self.model.schedule(self.schedule.train_steps, "trailing", None)

    def predict(
        self, prompts: Sequence[str], *, guidance: float | None = None, once: bool = False, reference: bool = False
    ) -> Predict:
        """Predict under B prompts, guided as the run says or as given: counted, and recomputed in the backward pass if the run
        says so. `once` promises a single call with gradient, where recomputation would save nothing. `reference`: by the
        weights from before training, wherever it is called and recomputed."""
        guidance = self.guidance if guidance is None else guidance
        predict = self.model.predict(self.denoiser, prompts, guidance, self.detach_negative)
        passes = self.model.passes(guidance)

        def counted(x: Tensor, time: Tensor) -> Tensor:
            self.calls.denoiser_forward += passes * len(x)
            with self.model.reference() if reference else nullcontext():
                out = predict(x, time)
            if out.requires_grad:
                out.register_hook(lambda _: self._count_backward(passes * len(x)))
            return out

        return checkpointed(counted) if self.gradient_checkpointing and not once else counted

    def _count_backward(self, passes: int) -> None:
        self.calls.denoiser_backward += passes

    def noise(self, seeds: Sequence[int]) -> Noise:
        return seeded_noise(seeds, self.model.latent_shape, self.model.device)

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        starts: Sequence[int] | None = None,
        last: int | None = None,
        keep: Sequence[int] = (),
        observe: Observe | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Walk from noise to grid point `last` (default: the clean end) without a graph: (latents, kept) of `denoise`.

        x_T comes from `starts`, the noise of later steps from `seeds`, which stand in for `starts` where there are none.
        """
        noise = self.noise(seeds)
        start = noise(-1) if starts is None else self.noise(starts)(-1)
        self.calls.images += len(prompts)
        return denoise(
            self.predict(prompts), self.schedule, start, last=last, eta=self.eta, keep=keep, noise=noise, observe=observe
        )

    def rewards(self, latents: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Parts]:
        """Decode (B,C,h,w) and score: total (B,) with gradient, and the named parts.

        Raises NonFiniteReward or RewardFailed naming reward, prompt and seed.
        """
        self.calls.reward_queries += len(prompts)
        return checked(self.score, self.model.decode(latents), prompts, seeds)


def checked(score: Score, images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> tuple[Tensor, Parts]:
    """`score` of images (B,3,H,W), whose errors name the prompt and the seed.

    Raises NonFiniteReward, and RewardFailed when a reward raised or answered with what cannot be used.
    """
    try:
        total, parts = score(images, prompts)
    except RewardError as error:
        whose = "" if error.row is None else f" for prompt {prompts[error.row]!r}, seed {seeds[error.row]}"
        raise RewardFailed(f"reward {error.name!r} failed{whose}: {error.message}") from error
    for name, values in {**parts, "total": total.detach()}.items():
        if not bool(torch.isfinite(values).all()):
            row = int((~torch.isfinite(values)).nonzero()[0])
            raise NonFiniteReward(
                f"reward {name!r} is {values[row].item()} for prompt {prompts[row]!r}, seed {seeds[row]}:"
                " the step is refused; mend the reward, or leave that prompt out"
            )
    return total, parts
