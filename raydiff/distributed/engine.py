"""DeepSpeed around the denoiser: an Engine whose weights, moments and gradients can be had whole at every ZeRO stage."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from raydiff.config import Run, geometry
from raydiff.core import learner
from raydiff.core.learner import advance, after_gradient
from raydiff.session import Session

Kind = Literal["parameters", "exp_avg", "exp_avg_sq", "gradients"]


def deepspeed_config(run: Run, workers: int, *, persistence_threshold: int | None = None) -> dict[str, Any]:
    """DeepSpeed's config. There is no bf16 section, as it would cast an fp32 adapter; the optimiser is the session's.

    `persistence_threshold`: parameters with fewer elements stay whole under ZeRO-3; None takes DeepSpeed's 100 000, which
    leaves a tiny model's parameters all whole.
    """
    batch = geometry(run, workers)
    # DeepSpeed's batch is what one optimiser step takes.
    zero: dict[str, Any] = {"stage": run.train.zero_stage}
    if run.train.zero_stage:
        # The defaults allocate 2 GB a bucket, whatever the adapter's size.
        zero |= {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
    if run.train.zero_stage == 3 and persistence_threshold is not None:
        zero["stage3_param_persistence_threshold"] = persistence_threshold
    return {
        "train_batch_size": batch.size // batch.minibatches,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.step_accumulation,
        # Without ZeRO the engine below clips: DeepSpeed's clipping cannot skip a step.
        "gradient_clipping": run.optimizer.max_grad_norm if run.train.zero_stage else 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": zero,
    }


class ZeroEngine:
    """The Engine of one worker. Methods that say "collective" must be called on every rank."""

    def __init__(
        self,
        session: Session,
        *,
        weights: Mapping[str, Tensor] | None = None,
        persistence_threshold: int | None = None,
    ) -> None:
        """Wrap the session's denoiser; torch.distributed must be up. Collective. `weights` replace the trained ones."""
        self.session, self.trained = session, session.model.trained()
        self.stage: int = session.run.train.zero_stage
        if weights is not None:
            with torch.no_grad():  # before DeepSpeed copies and partitions them
                for name, p in self.trained.items():
                    p.copy_(weights[name])
        self.adam, self.scheduler = session.optimizer()
        config = deepspeed_config(session.run, session.workers, persistence_threshold=persistence_threshold)
        self.deepspeed = _initialize(session.model.denoiser, self.adam, config)
        self.loss_scale = session.loss_scale
        session.wrap(self.deepspeed)

    def backward(self, loss: Tensor) -> None:
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        if self.stage and self.loss_scale:
            self.deepspeed.optimizer.override_loss_scale(scale)  # ZeRO multiplies the loss, and divides what it clips
        self.deepspeed.backward(loss if self.stage else scale * loss)

    def step(self) -> float | None:
        """Collective. Below ZeRO-1 the gradients are whole on every worker; from there on DeepSpeed knows their norm, and skips
        a step whose gradient is not finite by itself."""
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
            return None
        if self.stage == 0:
            norm = self._clipped()
            taken = after_gradient(norm, self.loss_scale)
            if not taken:
                for p in self.trained.values():
                    p.grad = None  # Adam leaves these alone
            self.deepspeed.step()
        else:
            self.deepspeed.step()
            norm = float(self.deepspeed.get_global_grad_norm())
            taken = after_gradient(norm, self.loss_scale)
        advance(self.scheduler, self.loss_scale)
        return norm if taken else math.inf

    def _clipped(self) -> float:
        """The norm of the gradients, which are divided by the loss scale and then clipped."""
        parameters = [p for p in self.trained.values() if p.grad is not None]
        if self.loss_scale:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], self.loss_scale.scale)
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.session.run.optimizer.max_grad_norm))

    @property
    def lr(self) -> float:
        """The learning rate of the next optimiser step."""
        return float(self.scheduler.get_last_lr()[0])

    def full(self, kind: Kind) -> dict[str, Tensor]:
        """Whole fp32 tensors by parameter name, on the CPU. Collective.

        Moments exist after the first update; gradients between the last micro-batch's backward and its step.
        """
        return {name: self._one(p, kind).detach().float().cpu().clone() for name, p in self.trained.items()}

    def weights(self) -> Mapping[str, Tensor]:
        """The trained weights, whole, on the model's device; below ZeRO-3 the live parameters themselves. Collective."""
        return {name: self._one(p, "parameters") for name, p in self.trained.items()} if self.stage == 3 else self.trained

    @contextmanager
    def swapped(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the model computes with `values`; after it, with what it had before. Collective."""
        if self.stage < 3:
            with learner.swapped(self.trained, values):
                yield
            return
        before = self.full("parameters")
        self._scatter(values)
        try:
            yield
        finally:
            self._scatter(before)

    def restore(self, moments: Mapping[str, Mapping[str, Tensor]], updates: int) -> None:
        """Put back Adam's moments {"exp_avg": {name: tensor}, ...} and the count of updates done. The session's own state must
        be there before. Collective."""
        from deepspeed.utils import safe_set_full_optimizer_state

        steps = updates * self.session.geometry.optimizer_steps
        skipped = self.loss_scale.skipped if self.loss_scale else 0  # which Adam did not see
        self._make_moments()
        for kind, tensors in moments.items():
            for name, p in self.trained.items():
                value = tensors[name].to(self.session.model.device)
                if self.stage == 0:
                    self.adam.state[p][kind].copy_(value)
                else:
                    safe_set_full_optimizer_state(p, value, kind)
        for state in self.adam.state.values():
            state["step"].fill_(steps - skipped)
        self.scheduler.last_epoch = steps - 1
        self.scheduler.step()
        self.deepspeed.global_steps = steps

    def _one(self, p: Tensor, kind: Kind) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state

        if kind == "parameters":
            return safe_get_full_fp32_param(p) if self.stage == 3 else p
        if kind == "gradients":
            return safe_get_full_grad(p)
        return self.adam.state[p][kind] if self.stage == 0 else safe_get_full_optimizer_state(p, kind)

    def _scatter(self, values: Mapping[str, Tensor]) -> None:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.trained.values()), modifier_rank=0), torch.no_grad():
            if self.session.rank == 0:
                for name, p in self.trained.items():
                    p.copy_(values[name])

    def _make_moments(self) -> None:
        """Adam's moments exist only after a step: make one at learning rate 0 with zero gradients."""
        groups, policy = self.adam.param_groups, self.session.policy
        for group in groups:
            group["lr"] = 0.0
        noise = torch.zeros(1, *self.session.model.latent_shape, device=self.session.model.device)
        time = policy.schedule.time(0, noise)
        predict = self.session.model.predict(self.deepspeed, [""], 1)
        for _ in range(self.session.geometry.step_accumulation):
            self.deepspeed.backward(predict(noise, time).sum() * 0)
            self.deepspeed.step()


def _initialize(denoiser: torch.nn.Module, adam: Any, config: dict[str, Any]) -> Any:
    """Without the learning rate's schedule, which DeepSpeed would not advance where it skips a step."""
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # DeepSpeed would compile this one, which serves inference only, and without a compiler fail.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed.initialize(model=denoiser, optimizer=adam, config=config)[0]
