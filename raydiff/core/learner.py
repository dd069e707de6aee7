"""Optimisation: what a method's loss is handed to.

An Engine is what a DeepSpeedEngine already is; TorchEngine is its twin for one process.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts

Metrics = dict[str, Tensor]
Agreed = Callable[[], AbstractContextManager[None]]
"""Around what one worker may refuse, and all then must."""


class Loss(Protocol):
    """The part of a method that learning needs: a pure loss."""

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]: ...


class LossScale:
    """Dynamic loss scaling: float16 has no numbers below 6e-8, and the gradients of one picture's pixels are smaller
    (Micikevicius et al. 2018, arXiv 1710.03740, §3.2).

    The loss is multiplied by `scale`, and the gradient divided by it. The first scale is searched from the largest down, on the
    samples of the first update, which is repeated. After that a step whose scaled gradient overflows is skipped at half the
    scale from then on; after `GROWTH` good steps it is doubled.
    """

    MOST, LEAST, GROWTH, SEARCH = 2.0**32, 2.0**-10, 100, 16

    def __init__(self) -> None:
        self.scale, self.found, self.good, self.skipped = self.MOST, False, 0, 0

    def overflowed(self) -> None:
        """After a step whose gradient was not finite. Raises FloatingPointError when that cannot be the scale's fault."""
        if self.scale <= self.LEAST:
            raise FloatingPointError(_not_finite("not finite at any loss scale"))
        self.scale, self.good = self.scale / (2 if self.found else self.SEARCH), 0
        self.skipped += int(self.found)

    def fitted(self) -> None:
        """After a step whose gradient was finite."""
        self.found, self.good = True, self.good + 1
        if self.good >= self.GROWTH:
            self.scale, self.good = min(2 * self.scale, self.MOST), 0

    def vanished(self) -> bool:
        """After a gradient that was exactly 0 and should not be: whether a larger scale can be tried."""
        larger = self.scale < self.MOST
        self.scale, self.good = min(256 * self.scale, self.MOST), 0
        return larger

    def state(self) -> dict[str, float]:
        """As JSON."""
        return vars(self).copy()

    def restore(self, state: Mapping[str, float]) -> None:
        vars(self).update(state)


class Engine(Protocol):
    """`backward` and `step` once per micro-batch; the optimiser moves when as many as it accumulates are complete."""

    loss_scale: LossScale | None

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""

    def backward(self, loss: Tensor) -> object: ...

    def step(self) -> float | None:
        """The norm of the accumulated gradient before clipping when the optimiser's turn has come, else None; inf when the step
        was skipped, as the scaled gradient overflowed.

        Raises FloatingPointError, before any weight moves, when the gradient is not finite and no scale can be blamed.
        """


class TorchEngine:
    """Plain torch in one process: gradient accumulation, clipping by the global norm, learning-rate schedule."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        scheduler: LambdaLR,
        accumulation: int,
        max_grad_norm: float,
        loss_scale: LossScale | None = None,
    ) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.accumulation, self.max_grad_norm, self.loss_scale = accumulation, max_grad_norm, loss_scale
        self._done = 0

    @property
    def lr(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def backward(self, loss: Tensor) -> None:
        scale = self.loss_scale.scale if self.loss_scale else 1.0
        (scale * loss / self.accumulation).backward()

    def step(self) -> float | None:
        self._done += 1
        if self._done % self.accumulation:
            return None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.loss_scale:
            torch._foreach_div_([p.grad for p in parameters], self.loss_scale.scale)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        taken = after_gradient(norm, self.loss_scale)
        if taken:
            self.optimizer.step()
        advance(self.scheduler, self.loss_scale)
        self.optimizer.zero_grad(set_to_none=True)
        return norm if taken else math.inf


def after_gradient(norm: float, loss_scale: LossScale | None) -> bool:
    """Whether the step with a gradient of this norm is taken; the scale learns from it. Raises FloatingPointError."""
    finite = math.isfinite(norm)
    if loss_scale is None and not finite:
        raise FloatingPointError(_not_finite(f"{norm}"))
    if loss_scale:
        (loss_scale.fitted if finite else loss_scale.overflowed)()
    return finite


def advance(scheduler: LambdaLR, loss_scale: LossScale | None) -> None:
    """The learning rate's next step. Skipped steps count, so that updates and schedule stay together; those of the search for
    the first scale are repeated, and do not."""
    if loss_scale is not None and not loss_scale.found:
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # where the first step was skipped
        scheduler.step()


def _not_finite(norm: str) -> str:
    return (
        f"the gradient's norm is {norm}, though the loss is finite: the step is refused. A reward, or a layer, has no gradient"
        " at some picture, as a square root has none at 0"
    )


def update(
    engine: Engine,
    method: Loss,
    policy: Policy,
    batches: Iterable[Rollouts],
    epochs: int = 1,
    zero_gradient: Literal["refuse", "accept"] = "refuse",
    agreed: Agreed = nullcontext,
) -> dict[str, float]:
    """`epochs` passes over an update's micro-batches: the mean of each metric. The engine says when the optimiser moves.

    `agreed` is entered around each loss: where several workers train, one's fault is then all workers', before any of them
    waits in its backward pass.

    Raises FloatingPointError when a loss or a gradient is not finite, before it reaches the weights, and, unless that is
    accepted, when the gradient of the whole update is exactly 0, though its samples differ.
    """
    scale = engine.loss_scale
    batches = batches if epochs == 1 and scale is None else list(batches)
    history, norms, decided = _passes(engine, method, policy, batches, epochs, agreed)
    while scale is not None and not scale.found and norms:
        history, norms, decided = _passes(engine, method, policy, batches, epochs, agreed)
    vanished = decided and norms and max(norms) == 0
    if vanished and not (scale and scale.vanished()) and zero_gradient == "refuse":
        raise FloatingPointError(
            "the gradient of the whole update is exactly 0, so that nothing is learned from it: the rewards do not depend on"
            " the pictures, all their weights are 0, every step is beyond method.clip, or the gradient is too small for"
            " model.dtype; mend that, or set"
            ' train.zero_gradient to "accept"'
        )
    return averages(history) | of_steps(norms, scale)


def _passes(
    engine: Engine, method: Loss, policy: Policy, batches: Iterable[Rollouts], epochs: int, agreed: Agreed
) -> tuple[list[Metrics], list[float], bool]:
    """The metrics of each micro-batch, the gradient's norm at each optimiser step, and whether any samples differ."""
    history: list[Metrics] = []
    norms: list[float] = []
    decided = False
    for epoch in range(epochs):
        for batch in batches:
            with agreed():
                loss, metrics = method.loss(policy, replace(batch, epoch=epoch))
                _require_finite(loss, batch)
            engine.backward(loss)
            norm = engine.step()
            norms += [] if norm is None else [norm]
            decided |= batch.terms != 0
            history.append({"loss": loss.detach(), **metrics})
    return history, norms, decided


def averages(history: Sequence[Metrics]) -> dict[str, float]:
    """The mean of each metric over micro-batches."""
    return {name: float(torch.stack([m[name].double() for m in history]).mean()) for name in history[0]}


def of_steps(norms: Sequence[float], loss_scale: LossScale | None) -> dict[str, float]:
    """What an update's optimiser steps report: the mean norm of those that were taken, and what was skipped so far."""
    taken = [norm for norm in norms if math.isfinite(norm)]
    norm = {"grad_norm": sum(taken) / len(taken)} if taken else {}
    return norm | ({"loss_scale": loss_scale.scale, "skipped_steps": float(loss_scale.skipped)} if loss_scale else {})


def _require_finite(loss: Tensor, batch: Rollouts) -> None:
    """Raise FloatingPointError when the loss of a micro-batch is not finite."""
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError(f"loss is {loss.item()} for prompts {list(batch.prompts)}, seeds {batch.flat_seeds()}")


def learning_rate_factor(
    step: int, *, warmup: int, steps: int, shape: Literal["constant", "linear", "cosine"] = "constant"
) -> float:
    """Factor on the learning rate at an optimiser step counted from 0: a linear rise over `warmup`, then the shape down to 0
    after `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    if shape == "linear":
        return 1 - progress
    return 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1.0


class Ema:
    """Exponential moving average of named parameters, in fp32.

    The decay of update t is min(decay, (1 + t) / (10 + t)): early averages forget the start.
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, p in parameters.items():
            self.average[name].lerp_(p.detach().float(), 1 - decay)


@contextmanager
@torch.no_grad()
def swapped(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the parameters hold `values`; after it, what they held before."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for name, p in parameters.items():
        p.copy_(values[name])
    try:
        yield
    finally:
        for name, p in parameters.items():
            p.copy_(before[name])
