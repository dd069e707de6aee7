"""From the rewards of a whole update to the weight of each attempt's term.

Legend: N attempts of an update, over all its prompts and all workers. Everything is float64 on the CPU, so that every worker
computes the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor


class Advantages(Protocol):
    def __call__(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """The update's N prompts and total rewards (N,) -> (N,). Called once an update, alike on every worker."""

    def state(self) -> Any:
        """What later updates depend on, as JSON."""

    def restore(self, state: Any) -> None:
        """Take up what `state` gave."""


@dataclass
class PerPrompt:
    """(r - mean) / (std + 1e-6), statistics of the prompt's last `history` rewards, the present ones among them.

    Until a prompt has `min_count` of them, the statistics of the update (DDPO's official tracker: Black et al. 2024,
    arXiv 2305.13301, §4.3). Standard deviations are the population's.
    """

    history: int
    min_count: int
    past: dict[str, deque[float]] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self.past.setdefault(prompt, deque(maxlen=self.history)).append(reward)
        return torch.stack([standardised(r, self._among(p, rewards)) for p, r in zip(prompts, rewards, strict=True)])

    def _among(self, prompt: str, rewards: Tensor) -> Tensor:
        past = self.past[prompt]
        return rewards if len(past) < max(1, self.min_count) else torch.tensor(past, dtype=rewards.dtype)

    def state(self) -> dict[str, list[float]]:
        return {prompt: list(past) for prompt, past in self.past.items()}

    def restore(self, state: Mapping[str, Sequence[float]]) -> None:
        self.past = {prompt: deque(past, maxlen=self.history) for prompt, past in state.items()}


@dataclass(frozen=True)
class OfUpdate:
    """A function of the update's rewards alone: (N,) -> (N,)."""

    weigh: Callable[[Tensor], Tensor]

    def __call__(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        return self.weigh(rewards)

    def state(self) -> None:
        return None

    def restore(self, state: None) -> None:
        pass


def standardised(reward: Tensor, among: Tensor) -> Tensor:
    """How many standard deviations `reward` lies above the mean of `among` (N,)."""
    return (reward - among.mean()) / (among.std(correction=0) + 1e-6)
