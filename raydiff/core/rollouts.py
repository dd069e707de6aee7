"""Rollouts: what sampling hands to learning.

Legend: B prompts, G attempts per prompt, N kept points, C h w latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raydiff.core.denoise import mix

_LOSS = 0x105  # keeps what a loss draws apart from the sampler's noise


@dataclass(frozen=True)
class Rollouts:
    """G sampled trajectories for each of B prompts; one prompt is one row of a dataset."""

    prompts: tuple[str, ...]  # B
    seeds: Tensor  # (B,G) int64: a loss draws from them too, so a row that is met in two updates has other seeds in each
    latents: Tensor  # (B,G,N,C,h,w) fp32: half precision would move log-ratios by more than their clip
    kept: tuple[int, ...]  # N grid points, ascending
    rewards: Mapping[str, Tensor] | None = None  # by name, with "total": (B,G) each
    log_probs: Tensor | None = None  # (B,G,S) of each step under the weights that sampled it, summed over C,h,w
    advantages: Tensor | None = None  # (B,G) weight of each attempt's term, from the rewards of the whole update
    terms: float | None = None  # that the loss averages over: the mean count of a micro-batch of the same optimiser step
    epoch: int = 0  # which of its update's passes this is: a loss draws anew in each
    version: int = 0  # of the weights that sampled
    digest: str = ""

    def __post_init__(self) -> None:
        b, g = self.seeds.shape
        assert len(self.prompts) == b, f"{len(self.prompts)} prompts, seeds {tuple(self.seeds.shape)}"
        assert self.latents.shape[:3] == (b, g, len(self.kept)), f"latents {tuple(self.latents.shape)}, kept {self.kept}"
        assert self.rewards is None or all(r.shape == (b, g) for r in self.rewards.values())
        assert self.log_probs is None or self.log_probs.shape[:2] == (b, g)
        assert self.advantages is None or self.advantages.shape == (b, g)

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, point: int | Tensor) -> Tensor:
        """Latents of grid point `point`, one row per attempt: (B·G,C,h,w). A tensor (B·G,) has a point for each row."""
        latents = self.latents.flatten(0, 1)
        if isinstance(point, int):
            return latents[:, self.kept.index(point)]
        place = torch.tensor([self.kept.index(i) for i in point.tolist()], device=latents.device)
        return latents[torch.arange(len(latents), device=latents.device), place]

    def flat_prompts(self) -> list[str]:
        """The prompt of each attempt, B·G of them, in the order of `at`."""
        return [prompt for prompt in self.prompts for _ in range(self.seeds.shape[1])]

    def total(self) -> Tensor:
        """The total reward of each attempt, (B,G)."""
        assert self.rewards is not None, "these rollouts were not scored"
        return self.rewards["total"]

    def flat_seeds(self) -> list[int]:
        return self.seeds.flatten().tolist()

    def loss_seeds(self, *, shared: bool) -> list[int]:
        """A seed for what a loss draws for each attempt, B·G; `shared`: the same for all attempts of a prompt."""
        seeds = self.seeds[:, :1].expand_as(self.seeds) if shared else self.seeds
        return [mix(seed, self.epoch, _LOSS) for seed in seeds.flatten().tolist()]

    def select(self, rows: Sequence[int]) -> Rollouts:
        index = torch.as_tensor(rows, dtype=torch.long)
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in index.tolist()),
            seeds=self.seeds[index],
            latents=self.latents[index],
            rewards=None if self.rewards is None else {name: r[index] for name, r in self.rewards.items()},
            log_probs=None if self.log_probs is None else self.log_probs[index],
            advantages=None if self.advantages is None else self.advantages[index],
        )

    def to(self, device: torch.device | str) -> Rollouts:
        return replace(
            self,
            seeds=self.seeds.to(device),
            latents=self.latents.to(device),
            rewards=None if self.rewards is None else {name: r.to(device) for name, r in self.rewards.items()},
            log_probs=None if self.log_probs is None else self.log_probs.to(device),
            advantages=None if self.advantages is None else self.advantages.to(device),
        )

    @staticmethod
    def cat(parts: Sequence[Rollouts]) -> Rollouts:
        """One batch of several. Raises ValueError unless points, parts and the weights' version are the same."""
        first = parts[0]

        def kind(p: Rollouts) -> Any:
            parts = p.rewards and tuple(p.rewards), p.log_probs is None, p.advantages is None
            return p.kept, p.version, p.digest, p.epoch, p.terms, *parts

        if any(kind(p) != kind(first) for p in parts):
            raise ValueError("rollouts with other points or parts, or from other weights, cannot be one batch")
        return replace(
            first,
            prompts=sum((p.prompts for p in parts), ()),
            seeds=torch.cat([p.seeds for p in parts]),
            latents=torch.cat([p.latents for p in parts]),
            rewards=first.rewards and {name: torch.cat([p.rewards[name] for p in parts]) for name in first.rewards},  # type: ignore[index]
            log_probs=None if first.log_probs is None else torch.cat([p.log_probs for p in parts]),  # type: ignore[misc]
            advantages=None if first.advantages is None else torch.cat([p.advantages for p in parts]),  # type: ignore[misc]
        )
