"""From rewards to preferred pairs, and the loss on them that every preference method shares.

Legend: B prompts, G attempts per prompt, K named rewards, P pairs. An attempt's row is its place in the B·G of `Rollouts.at`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Which = Literal["best_worst", "all"]
Rule = Literal["total", "pareto"]


@dataclass(frozen=True)
class Pairs:
    """P pairs of attempts at one prompt. Where `decided` is False neither wins, and which is called winner means nothing."""

    winner: Tensor  # (P,) rows
    loser: Tensor  # (P,) rows
    decided: Tensor  # (P,) bool

    def rows(self) -> tuple[Tensor, Tensor]:
        """The attempts that a pair needs, ascending, and where winners then losers stand among them: (R,), (2P,)."""
        rows, place = torch.cat([self.winner, self.loser]).unique(return_inverse=True)
        return rows, place

    def to(self, device: torch.device | str) -> Pairs:
        return Pairs(self.winner.to(device), self.loser.to(device), self.decided.to(device))


def preferred_pairs(
    rewards: Mapping[str, Tensor], which: Which = "best_worst", rule: Rule = "total", min_margin: float = 0.0
) -> Pairs:
    """Pairs from rewards by name, (B,G) each with "total", on the CPU.

    "best_worst" takes the attempts of the largest and the smallest total, P = B; "all" each two, P = B·G(G-1)/2. `rule` then
    says which of the two wins, if any. Raises ValueError for G = 1.
    """
    rewards = {name: r.detach().cpu() for name, r in rewards.items()}
    total = rewards["total"]
    prompts, attempts = total.shape
    if attempts < 2:
        raise ValueError("one attempt for a prompt makes no pair: set method.attempts to 2 or more")
    if which == "best_worst":
        order = total.argsort(dim=1, descending=True, stable=True)
        first, second = order[:, :1], order[:, -1:]
    else:
        first, second = torch.combinations(torch.arange(attempts)).T.expand(prompts, -1, -1).unbind(1)
    prompt = torch.arange(prompts)[:, None]
    sign = preference(rewards, rule, min_margin)[prompt, first, second].flatten()
    first, second = (first + prompt * attempts).flatten(), (second + prompt * attempts).flatten()
    return Pairs(torch.where(sign < 0, second, first), torch.where(sign < 0, first, second), sign != 0)


def preference(rewards: Mapping[str, Tensor], rule: Rule, min_margin: float) -> Tensor:
    """(B,G,G) of 1 where the first attempt beats the second, -1 where it loses, 0 for a tie.

    "total": a total larger by more than `min_margin`. "pareto": no named reward smaller and one larger (D3PO's official code).
    """
    if rule == "total":
        margin = rewards["total"][:, :, None] - rewards["total"][:, None, :]
        return margin.sign().int() * (margin.abs() > min_margin)
    named = torch.stack([r for name, r in rewards.items() if name != "total"])  # (K,B,G)
    one, other = named[:, :, :, None], named[:, :, None, :]
    dominates = ((one >= other).all(0) & (one > other).any(0)).int()
    return dominates - dominates.transpose(1, 2)


def logistic_loss(inside: Tensor) -> Tensor:
    """-log σ(inside), (P,): the negative log-likelihood that the winner wins (Bradley & Terry 1952)."""
    return -F.logsigmoid(inside)


def mean_over(values: Tensor, mask: Tensor, count: float | None = None) -> Tensor:
    """Mean of the values (P,) where the mask is set; where it never is, 0 with a graph.

    `count` stands for the mask's own where these values are a part of what is averaged: the mean count of a part. The mean over
    the parts is then the mean over all their values, however they are distributed.
    """
    return (values * mask).sum() / (mask.sum().clamp(min=1) if count is None else count or 1)


def accuracy(inside: Tensor, decided: Tensor) -> Tensor:
    """Share of pairs that the policy's implicit reward orders as labelled: scalar. A tie, in either, counts one half."""
    return torch.where(decided, (inside.detach().sign() + 1) / 2, 0.5).mean()
