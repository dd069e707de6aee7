"""What every method file provides. A method is its own frozen config: fields, and pure functions of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from raydiff.config import PluginConfig, Run
from raydiff.core.advantages import Advantages
from raydiff.core.learner import Metrics
from raydiff.core.log_prob import Reduction
from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts
from raydiff.core.schedule import Schedule


class UsualBeta(NamedTuple):
    """What a method's β means, and the range in which it has been useful."""

    low: float
    high: float
    meaning: str


class Method(PluginConfig):
    """Which points of a trajectory to keep, and the loss on them."""

    attempts: int = Field(1, ge=1)
    """Group size G: samples per prompt."""
    inner_epochs: int = Field(1, ge=1)
    """Passes over the samples of an update. More than one trains on samples of slightly older weights."""
    minibatches: int = Field(1, ge=1)
    """Optimiser steps in a pass; must divide the micro-batches of each worker."""

    @property
    def usual_beta(self) -> UsualBeta | None:
        """A β outside it is warned of, and refused by sweeps. None: there is none, or it depends on the rewards' scale."""
        return None

    @property
    def needs_reference(self) -> bool:
        """Whether the loss calls `policy.model.reference()`; full fine-tuning then keeps a frozen copy."""
        return False

    @property
    def needs_rewards(self) -> bool:
        """Whether rollouts are scored before the loss, the rewards as black boxes; the clean end must be kept then."""
        return False

    @property
    def labelled(self) -> bool:
        """Whether it trains on the labelled pairs of `[pairs]`, and samples nothing."""
        return False

    @property
    def judged(self) -> bool:
        """Whether labels of `[pairs]`, in place of rewards, compare the samples of the only update."""
        return False

    @property
    def needs_log_probs(self) -> bool:
        """Whether rollouts carry the log-probability of each step under the weights that sampled it."""
        return False

    @property
    def shared_start(self) -> bool:
        """Whether the attempts of a prompt start from one x_T; the noise of later steps is each attempt's own."""
        return False

    @property
    def selects(self) -> bool:
        """Whether the loss is a mean over a part of the samples that their rewards choose: `terms` then counts it."""
        return False

    def terms(self, batch: Rollouts) -> int:
        """How many terms of a scored micro-batch the loss is a mean over."""
        raise NotImplementedError

    def advantages(self) -> Advantages | None:
        """What turns the rewards of a whole update, over all workers, into `Rollouts.advantages`; a run keeps one for good.
        None: the loss needs none."""
        return None

    def check(self, run: Run) -> None:
        usual, beta = self.usual_beta, getattr(self, "beta", None)
        if usual and beta is not None and not usual.low <= beta <= usual.high:
            where = f"is outside {usual.low:g} to {usual.high:g}"
            warnings.warn(f"method.beta = {beta:g} {where}: here it is {usual.meaning}", stacklevel=2)
        if run.generation.where == "pool" and max(self.keep(run.sampler.steps, torch.Generator())) == 0:
            raise ValueError(
                f'generation.where = "pool": method.kind = {self.kind!r} differentiates all {run.sampler.steps} steps here,'
                ' which leaves a pool nothing to do; set generation.where to "learner", or differentiate fewer steps (draft_k)'
            )

    def check_grid(self, schedule: Schedule, eta: float) -> None:
        """Raise ValueError when this method cannot work on the sampling grid that the model gave."""

    def keep(self, steps: int, rng: torch.Generator) -> tuple[int, ...]:
        """Grid points 0..steps to keep; sampling stops at the last one. `rng` is the same on every worker."""
        raise NotImplementedError

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]:
        """Scalar loss with a graph to the denoiser's trained weights, and detached scalar metrics."""
        raise NotImplementedError


class RewardGradientMethod(Method):
    """A method that backpropagates through the reward: every trained-on reward must be differentiable."""

    kl: float = 0.0
    """DRaFT+ (NeMo): weight of the mean squared difference between the guided outputs of the policy and of the model from
    before training, over the steps with gradient. 0 turns it off and saves its forward passes."""

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    def check(self, run: Run) -> None:
        super().check(run)
        if self.kl < 0:
            raise ValueError(f"method.kl = {self.kl} is negative; use 0 or more")
        for name, reward in run.rewards.named.items():
            if not reward.differentiable:
                raise ValueError(
                    f"rewards.{name}: kind = {reward.kind!r} has no gradient, and method.kind = {self.kind!r} needs one:"
                    f" choose a differentiable reward, move it to evaluate.rewards.{name} to measure it only"
                )


class CleanMethod(Method):
    """A method that trains on clean latents, labelled or scored: it noises them anew, and asks for no sampler step."""

    caption_dropout: float = Field(0.0, ge=0, le=1)
    """Probability that a sample's caption becomes the empty one: guidance needs a trained unconditional prediction."""

    @property
    def needs_rewards(self) -> bool:
        return True

    def keep(self, steps: int, rng: torch.Generator) -> tuple[int, ...]:
        return (steps,)


class PairMethod(CleanMethod):
    """A method that can do with labelled pairs: rollouts of two attempts whose rewards are the label and its complement."""

    source: Literal["rollouts", "dataset"] = "rollouts"
    """"rollouts": samples that the rewards compare. "dataset": the labelled pairs of `pairs.path`, a group of two each; an
    update then takes `batch.size` pairs."""

    @property
    def labelled(self) -> bool:
        return self.source == "dataset"

    @model_validator(mode="before")
    @classmethod
    def _two_sides(cls, data: Any) -> Any:
        labelled = isinstance(data, Mapping) and data.get("source") == "dataset"
        return {"attempts": 2, **data} if labelled else data

    def check(self, run: Run) -> None:
        super().check(run)
        if self.labelled and run.pairs.path is None:
            raise ValueError('pairs.path is not set, and method.source = "dataset" trains on it; `raydiff pairs` makes one')
        if not self.labelled and run.pairs.path is not None:
            raise ValueError(
                f'pairs.path = {run.pairs.path!r} is not used: set method.source to "dataset", or leave the path out'
            )
        if self.labelled and self.attempts != 2:
            raise ValueError(f"method.attempts = {self.attempts}: a labelled pair has two sides; set it to 2, or leave it out")
        if self.labelled and run.generation.where == "pool":
            raise ValueError(
                'generation.where = "pool": method.source = "dataset" samples nothing, which leaves a pool nothing to do;'
                ' set generation.where to "learner"'
            )


class TrajectoryMethod(Method):
    """A method that scores the sampler's own steps, each of which must have a density.

    A grid that ends in sigma = 0 is refused: its last step is deterministic, and leaving it out would train every step but the
    one that lands on the picture, without saying so.
    """

    timestep_fraction: float = Field(1.0, gt=0, le=1)
    """Share of each trajectory's steps to train on. The steps are drawn anew for each prompt of an update, and are the same for
    all samples of the prompt."""
    log_prob_reduction: Reduction = "mean"
    """What a step's log-ratio is: divided by the D numbers of a latent, as the published constants assume, or the true sum."""

    @property
    def needs_rewards(self) -> bool:
        return True

    def keep(self, steps: int, rng: torch.Generator) -> tuple[int, ...]:
        return tuple(range(steps + 1))

    def steps(self, batch: Rollouts) -> Tensor:
        """The steps i -> i+1 to train on, ascending for each attempt: (n,B·G)."""
        steps = len(batch.kept) - 1

        def of(seed: int) -> Tensor:
            order = torch.randperm(steps, generator=torch.Generator().manual_seed(seed))
            return order[: math.ceil(self.timestep_fraction * steps)].sort().values

        return torch.stack([of(seed) for seed in batch.loss_seeds(shared=True)], 1)

    def check(self, run: Run) -> None:
        super().check(run)
        if run.sampler.eta == 0:
            raise ValueError(
                f"sampler.eta = 0 samples without noise, and method.kind = {self.kind!r} needs the density of each step:"
                " set sampler.eta to 1"
            )
        if run.sampler.final_alpha == 1:
            raise ValueError(
                f"sampler.final_alpha = 1 makes the last step deterministic, and method.kind = {self.kind!r} needs its density:"
                ' set sampler.final_alpha to "none", the model\'s own'
            )

    def check_grid(self, schedule: Schedule, eta: float) -> None:
        still = [i for i in range(schedule.steps) if schedule.std(i, torch.empty(0), eta) == 0]
        if not still:
            return
        if schedule.output == "flow":
            raise ValueError(
                f"method.kind = {self.kind!r} needs the density of each step, and the grid of a flow-matching model always"
                ' ends in a deterministic one: set method.kind to "draft_k" or "diffusion_dpo", or take another kind of model'
            )
        last = float(schedule.alpha[-2]) ** 2  # a final alpha-bar between this and 1 leaves each step a density
        raise ValueError(
            f"method.kind = {self.kind!r} needs the density of each step, and on the model's own grid step {still[0]} of"
            f' {schedule.steps} is deterministic: set sampler.spacing to "trailing" and sampler.final_alpha to'
            f" {(3 + last) / 4:.6g}"
        )
