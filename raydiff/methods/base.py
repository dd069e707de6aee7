"""What every method file provides. A method is its own frozen config: fields, and pure functions of them."""

from __future__ import annotations

import torch
from torch import Tensor

from raydiff.config import PluginConfig, Run
from raydiff.core.learner import Metrics
from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts


class Method(PluginConfig):
    """Which points of a trajectory to keep, and the loss on them."""

    @property
    def attempts(self) -> int:
        """G, samples per prompt."""
        return 1

    @property
    def needs_reference(self) -> bool:
        """Whether the loss calls `policy.model.reference()`; full fine-tuning then keeps a frozen copy."""
        return False

    @property
    def needs_rewards(self) -> bool:
        """Whether rollouts are scored before the loss, the rewards as black boxes; the clean end must be kept then."""
        return False

    @property
    def needs_log_probs(self) -> bool:
        """Whether rollouts carry the log-probability of each step under the weights that sampled it."""
        return False

    def check(self, run: Run) -> None:
        if run.generation.where == "pool" and max(self.keep(run.sampler.steps, torch.Generator())) == 0:
            raise ValueError(
                f'generation.where = "pool": method.kind = {self.kind!r} differentiates all {run.sampler.steps} steps here,'
                ' which leaves a pool nothing to do; set generation.where to "learner", or differentiate fewer steps (draft_k)'
            )

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
