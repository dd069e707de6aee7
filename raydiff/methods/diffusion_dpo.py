"""Diffusion-DPO: prefer winners by denoising them better than the model from before training does, and losers worse
(Wallace et al. 2024, arXiv 2311.12908, eq. 14).

Legend: B prompts, G attempts, P pairs, R attempts that are in a pair.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from raydiff.core.denoising import noised
from raydiff.core.learner import Metrics
from raydiff.core.policy import Policy
from raydiff.core.preferences import Pairs, Which, accuracy, logistic_loss, mean_over, preferred_pairs
from raydiff.core.rollouts import Rollouts
from raydiff.methods.base import PairMethod, UsualBeta


class Plugin(PairMethod):
    """Needs pairs: fresh samples that rewards compare, or a data set's, as rollouts with "total" 1 and 0, or twice 0.5."""

    kind: Literal["diffusion_dpo"] = "diffusion_dpo"
    attempts: int = Field(2, ge=2)
    beta: float = Field(5000.0, gt=0)
    """Strength of the pull to the reference, in the official code's convention: with errors that are means over the latent,
    inside = -beta/2·(difference of policy errors - difference of reference errors). Useful learning rates go as 1/beta."""
    pairs: Which = "best_worst"
    """One pair per prompt, its best sample against its worst, or every two samples."""
    min_margin: float = Field(0.0, ge=0)
    """Totals that differ by no more are a tie. Ties are dropped."""
    caption_dropout: float = Field(0.2, ge=0, le=1)
    """Probability that both captions of a pair become the empty one."""
    objective: Literal["dpo", "ipo"] = "dpo"
    """Logistic loss, or IPO's squared distance of the log-ratio to 1/(2·beta), times beta² (Azar et al. 2023, eq. 17)."""

    @property
    def usual_beta(self) -> UsualBeta:
        return UsualBeta(
            1,
            100_000,
            "the factor of squared errors that are means over the latent, published as 2000 to 5000 (multiply one of summed"
            " errors by 2·C·h·w, and one without the half by 2)",
        )

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def selects(self) -> bool:
        return not self.labelled  # a dataset's ties were left out before

    def terms(self, batch: Rollouts) -> int:
        return int(self.compared(batch).decided.sum())

    def compared(self, batch: Rollouts) -> Pairs:
        assert batch.rewards is not None
        return preferred_pairs(batch.rewards, self.pairs, min_margin=self.min_margin)

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]:
        """Step, noise and dropout are one draw a prompt, for both sides of a pair and for policy and reference alike."""
        clean, prompts, seeds = batch.at(policy.schedule.steps), batch.flat_prompts(), batch.loss_seeds(shared=True)
        pairs = self.compared(batch)
        rows, place = pairs.rows()
        chosen = rows.tolist()
        noisy = noised(policy, clean[chosen], [prompts[r] for r in chosen], [seeds[r] for r in chosen], self.caption_dropout)
        ours = noisy.error(policy)
        with torch.no_grad(), policy.model.reference():
            reference = noisy.error(policy)
        pairs, place = pairs.to(ours.device), place.to(ours.device)

        def difference(error: Tensor) -> Tensor:
            winner, loser = error[place].chunk(2)
            return winner - loser

        inside = -0.5 * self.beta * (difference(ours) - difference(reference))
        per_pair = logistic_loss(inside) if self.objective == "dpo" else (inside - 0.5).square()
        return mean_over(per_pair, pairs.decided, batch.terms), {
            "implicit_accuracy": accuracy(inside, pairs.decided),
            "policy_error": ours.detach().mean(),
            "reference_error": reference.mean(),  # a policy error that drifts away from it is the alarm
            "margin": mean_over(inside.detach(), pairs.decided, batch.terms),
            "pairs_used": pairs.decided.float().mean(),
            **({} if self.labelled else {"reward/total": batch.total().mean()}),  # of labels, always 0.5
        }
