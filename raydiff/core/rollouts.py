"""Rollouts: what sampling hands to learning.

Legend: B prompts, G attempts per prompt, N kept points, C h w latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollouts:
    """G sampled trajectories for each of B prompts; one prompt is one row of a dataset."""

    prompts: tuple[str, ...]  # B
    seeds: Tensor  # (B,G) int64: with the weights' version, they determine the latents
    latents: Tensor  # (B,G,N,C,h,w) fp32: half precision would move log-ratios by more than their clip
    kept: tuple[int, ...]  # N grid points, ascending
    rewards: Tensor | None = None  # (B,G)
    version: int = 0  # of the weights that sampled
    digest: str = ""

    def __post_init__(self) -> None:
        b, g = self.seeds.shape
        assert len(self.prompts) == b, f"{len(self.prompts)} prompts, seeds {tuple(self.seeds.shape)}"
        assert self.latents.shape[:3] == (b, g, len(self.kept)), f"latents {tuple(self.latents.shape)}, kept {self.kept}"
        assert self.rewards is None or self.rewards.shape == (b, g)

    def __len__(self) -> int:
        return len(self.prompts)

    def at(self, point: int) -> Tensor:
        """Latents of grid point `point`, one row per attempt: (B·G,C,h,w)."""
        return self.latents[:, :, self.kept.index(point)].flatten(0, 1)

    def flat_prompts(self) -> list[str]:
        """The prompt of each attempt, B·G of them, in the order of `at`."""
        return [prompt for prompt in self.prompts for _ in range(self.seeds.shape[1])]

    def flat_seeds(self) -> list[int]:
        return self.seeds.flatten().tolist()

    def select(self, rows: Sequence[int]) -> Rollouts:
        index = torch.as_tensor(rows, dtype=torch.long)
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in index.tolist()),
            seeds=self.seeds[index],
            latents=self.latents[index],
            rewards=None if self.rewards is None else self.rewards[index],
        )

    def to(self, device: torch.device | str) -> Rollouts:
        rewards = None if self.rewards is None else self.rewards.to(device)
        return replace(self, seeds=self.seeds.to(device), latents=self.latents.to(device), rewards=rewards)

    @staticmethod
    def cat(parts: Sequence[Rollouts]) -> Rollouts:
        """One batch of several. Raises ValueError unless they kept the same points and share one weights version."""
        first = parts[0]
        if any((p.kept, p.version, p.digest) != (first.kept, first.version, first.digest) for p in parts):
            raise ValueError("rollouts that kept other points, or came from other weights, cannot be one batch")
        rewards = None if first.rewards is None else torch.cat([p.rewards for p in parts])  # type: ignore[misc]
        return replace(
            first,
            prompts=sum((p.prompts for p in parts), ()),
            seeds=torch.cat([p.seeds for p in parts]),
            latents=torch.cat([p.latents for p in parts]),
            rewards=rewards,
        )
