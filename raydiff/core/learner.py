"""Optimisation: what a method's loss is handed to.

An Engine is what a DeepSpeedEngine already is; TorchEngine is its twin for one process.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts

Metrics = dict[str, Tensor]


class Loss(Protocol):
    """The part of a method that learning needs: a pure loss."""

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]: ...


class Engine(Protocol):
    """`backward` and `step` once per micro-batch; the optimiser moves when as many as it accumulates are complete."""

    def backward(self, loss: Tensor) -> object: ...

    def step(self) -> object: ...


class TorchEngine:
    """Plain torch in one process: gradient accumulation, clipping by the global norm, learning-rate schedule."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: LambdaLR, accumulation: int, max_grad_norm: float) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.accumulation, self.max_grad_norm = accumulation, max_grad_norm
        self.grad_norm = float("nan")  # of the last optimiser step, before clipping
        self._done = 0

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()

    def step(self) -> None:
        self._done += 1
        if self._done % self.accumulation:
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.grad_norm = float(nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)


def update(engine: Engine, method: Loss, policy: Policy, batches: Iterable[Rollouts], epochs: int = 1) -> dict[str, float]:
    """`epochs` passes over an update's micro-batches: the mean of each metric. The engine says when the optimiser moves.

    Raises FloatingPointError when a loss is not finite, before it reaches the weights.
    """
    batches = batches if epochs == 1 else list(batches)
    history: list[Metrics] = []
    for epoch in range(epochs):
        for batch in batches:
            loss, metrics = method.loss(policy, replace(batch, epoch=epoch))
            require_finite(loss, batch)
            engine.backward(loss)
            engine.step()
            history.append({"loss": loss.detach(), **metrics})
    return {name: float(torch.stack([m[name].float() for m in history]).mean()) for name in history[0]}


def require_finite(loss: Tensor, batch: Rollouts) -> None:
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
