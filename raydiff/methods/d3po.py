"""D3PO: preferences between sampled trajectories, applied to each of their steps (Yang et al. 2024, arXiv 2311.13231, eq. 14).

Legend: B prompts, G attempts, P pairs, R attempts that are in a pair, D numbers of a latent.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.config import Run
from raydiff.core.learner import Metrics
from raydiff.core.log_prob import log_ratio, transition_log_prob
from raydiff.core.policy import Policy
from raydiff.core.preferences import Pairs, Rule, Which, accuracy, logistic_loss, mean_over, preferred_pairs
from raydiff.core.rollouts import Rollouts
from raydiff.methods.base import TrajectoryMethod, UsualBeta


class Plugin(TrajectoryMethod):
    """-log σ(beta·(l_winner - l_loser)) at each step, with l = log π_θ/π_reference of the step, clamped."""

    kind: Literal["d3po"] = "d3po"
    attempts: int = Field(2, ge=2)
    beta: float = Field(0.1, gt=0)
    """Published for the mean over D: with `log_prob_reduction = "sum"` the same strength is beta/D."""
    clip: float = Field(0.1, gt=0, lt=1)
    """l is clamped to [log(1 - clip), log(1 + clip)]; beyond it a step has no gradient."""
    pairs: Which = "best_worst"
    """One pair per prompt, its best sample against its worst, or every two samples."""
    preference: Rule = "total"
    """The larger total wins, or Pareto dominance: no reward smaller and one larger, else a tie."""
    source: Literal["rewards", "labels"] = "rewards"
    """What compares the samples: rewards, or people, who labelled in `pairs.path` what `raydiff pairs to-label` drew. People
    labelled the first update's pictures, so the run has exactly one update; set the number of its optimiser steps with
    `minibatches` and `inner_epochs`."""
    ties: Literal["drop", "keep"] = "drop"
    """Leave ties out of the mean, or count each as log 2 without a gradient, as the official code does."""

    @property
    def usual_beta(self) -> UsualBeta:
        if self.log_prob_reduction == "sum":
            return UsualBeta(1e-8, 1, 'the factor of log-ratios that are sums over the latent: that of "mean" divided by D')
        return UsualBeta(1e-3, 100, "the factor of log-ratios that are means over the latent, published as 0.1")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def judged(self) -> bool:
        return self.source == "labels"

    @property
    def shared_start(self) -> bool:
        return True

    def check(self, run: Run) -> None:
        super().check(run)
        if self.judged and run.pairs.path is None:
            raise ValueError(
                'pairs.path is not set, and method.source = "labels" reads labels from it; `raydiff pairs to-label` makes it'
            )
        if self.judged and run.train.updates > 1:
            raise ValueError(
                f'train.updates = {run.train.updates}: method.source = "labels" allows one, whose pictures people labelled;'
                " set it to 1, and the number of optimiser steps with method.minibatches"
            )
        if self.judged and self.preference != "total":
            raise ValueError(
                'method.preference = "pareto" compares several rewards, and a label is one number: set it to "total"'
            )
        if not self.judged and run.pairs.path is not None:
            raise ValueError(f'pairs.path = {run.pairs.path!r} is not used: set method.source to "labels", or leave it out')
        for name, reward in run.rewards.named.items():
            if self.preference == "pareto" and reward.weight <= 0:
                raise ValueError(
                    f'rewards.{name}.weight = {reward.weight}: method.preference = "pareto" takes each reward as it is, larger'
                    f' being better; set method.preference to "total", or move the reward to evaluate.rewards.{name}'
                )

    @property
    def selects(self) -> bool:
        return True

    def terms(self, batch: Rollouts) -> int:
        return int(self.compared(batch).decided.sum())

    def compared(self, batch: Rollouts) -> Pairs:
        assert batch.rewards is not None
        return preferred_pairs(batch.rewards, self.pairs, self.preference)

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]:
        """One graph over all steps: with gradient checkpointing each adds a few latents to it, not a network's activations."""
        pairs = self.compared(batch)
        rows, place = pairs.rows()
        chosen, prompts = rows.tolist(), batch.flat_prompts()
        predict, steps = policy.predict([prompts[r] for r in chosen]), self.steps(batch)

        def log_prob(i: Tensor) -> Tensor:
            x, x_next = batch.at(i)[chosen], batch.at(i + 1)[chosen]
            return transition_log_prob(predict, policy.schedule, i[chosen], x, x_next, policy.eta)

        with torch.no_grad(), policy.model.reference():  # all at once: switching adapters walks the whole network
            reference = [log_prob(i) for i in steps]
        size = math.prod(policy.model.latent_shape)
        ratio = torch.stack(
            [log_ratio(log_prob(i), base, size, self.log_prob_reduction) for i, base in zip(steps, reference, strict=True)]
        )  # (steps,R)
        clamped = ratio.clamp(math.log(1 - self.clip), math.log(1 + self.clip))
        winner, loser = clamped[:, place.to(ratio.device)].chunk(2, 1)
        decided = pairs.decided.to(ratio.device)
        inside = self.beta * (winner - loser) * decided  # (steps,P); 0 for a tie
        per_pair = logistic_loss(inside).mean(0)
        loss = per_pair.mean() if self.ties == "keep" else mean_over(per_pair, decided, batch.terms)
        return loss, {
            "implicit_accuracy": accuracy(inside.mean(0), decided),
            "margin": mean_over(inside.detach().mean(0), decided, batch.terms),
            "clipped": (ratio.detach() != clamped.detach()).float().mean(),
            "log_ratio": ratio.detach().mean(),
            "pairs_used": decided.float().mean(),
            **({} if self.judged else {"reward/total": batch.total().mean()}),  # of labels, always 0.5
        }
