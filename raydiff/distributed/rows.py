"""Rollouts as columns of a Ray Data block: one row per prompt, tensors with a leading row axis.

| column | per row |
|---|---|
| ticket | which micro-batch of the run this is |
| prompt, seeds (G,), kept (N,), latents (G,N,C,h,w) fp32 | as in Rollouts |
| log_probs (G,S), reward/NAME (G,) | where the method needs them |
| images (G,3,H,W) fp32 | on the way to the reward pool only |
| version, digest, probe | of the weights that sampled |
| denoiser_forward | denoiser calls that the row cost |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydiff.core.rollouts import Rollouts

Columns = dict[str, np.ndarray]
_REWARD = "reward/"


def to_columns(rollouts: Rollouts, ticket: int, **same: Any) -> Columns:
    """Columns of a block; `same` are values that all its rows share."""
    n = len(rollouts)
    columns = {
        "prompt": np.array(rollouts.prompts, dtype=object),
        "seeds": rollouts.seeds.cpu().numpy(),
        "latents": rollouts.latents.float().cpu().numpy(),
        **{_REWARD + name: r.float().cpu().numpy() for name, r in (rollouts.rewards or {}).items()},
    }
    if rollouts.log_probs is not None:
        columns["log_probs"] = rollouts.log_probs.float().cpu().numpy()
    shared = {"ticket": ticket, "kept": rollouts.kept, "version": rollouts.version, "digest": rollouts.digest, **same}
    return columns | {name: np.repeat(np.asarray(value)[None], n, axis=0) for name, value in shared.items()}


def to_rollouts(columns: Mapping[str, np.ndarray], device: torch.device | str = "cpu") -> Rollouts:
    """The inverse of `to_columns`. Arrow's arrays are read-only, so tensors are copies."""

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(columns[name])).to(device)

    rewards = {name.removeprefix(_REWARD): tensor(name) for name in columns if name.startswith(_REWARD)}
    return Rollouts(
        prompts=tuple(str(prompt) for prompt in columns["prompt"]),
        seeds=tensor("seeds").cpu(),
        latents=tensor("latents"),
        kept=tuple(int(i) for i in columns["kept"][0]),
        rewards=rewards or None,
        log_probs=tensor("log_probs") if "log_probs" in columns else None,
        version=int(columns["version"][0]),
        digest=str(columns["digest"][0]),
    )


def with_rewards(columns: Columns, rewards: Mapping[str, np.ndarray]) -> Columns:
    """The columns with rewards {name: (B,G)} in the place of the pictures that they were given to."""
    rest = {name: column for name, column in columns.items() if name != "images"}
    return rest | {_REWARD + name: np.asarray(r, np.float32) for name, r in rewards.items()}
