"""What a run is made of in one process: the model, the method, the rewards and the prompts, and one step of each kind.

`local.fit` and every Ray worker call these same functions in the same order.
Legend: B prompts, G attempts, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from raydiff.config import Geometry, Run, geometry
from raydiff.core.denoise import mix
from raydiff.core.learner import Ema, Engine, learning_rate_factor, swapped, update
from raydiff.core.policy import Calls, Policy
from raydiff.core.reward_vjp import weighted_sum
from raydiff.core.rollouts import Rollouts
from raydiff.data.prompts import read_both, tickets


@dataclass(frozen=True)
class Picture:
    """One evaluated sample."""

    index: int
    prompt: str
    seed: int
    rewards: dict[str, float]  # by name, with "total"
    image: Tensor  # (3,H,W) uint8, on the CPU


@dataclass
class Session:
    """A run's objects on one device. `denoiser` starts as the model's own; an engine that wraps it is put in its place."""

    run: Run
    device: torch.device | str = "cpu"
    rank: int = 0
    workers: int = 1
    ema: Ema | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        run = self.run
        self.geometry: Geometry = geometry(run, self.workers)
        self.train_prompts, self.held_out_prompts = read_both(run.prompts)
        self.model = run.model.build(
            self.device,
            seed=mix(run.seed, 0),
            reference=run.method.needs_reference,
            checkpointing=run.train.gradient_checkpointing,
        )
        self.method = run.method
        sampler = run.sampler
        self.policy = Policy(
            model=self.model,
            denoiser=self.model.denoiser,
            schedule=self.model.schedule(sampler.steps, sampler.spacing, sampler.final_alpha),
            score=_score(run.rewards, self.device),
            guidance=sampler.guidance,
            eta=sampler.eta,
            detach_negative=sampler.detach_negative,
            gradient_checkpointing=run.train.gradient_checkpointing,
        )
        # Evaluation asks for more rewards and must not count as training's cost.
        self.judge = replace(
            self.policy, score=_score({**run.rewards, **run.evaluate.rewards}, self.device, list(run.rewards)), calls=Calls()
        )
        if run.optimizer.ema is not None:
            self.ema = Ema(self.model.trained(), run.optimizer.ema)

    def wrap(self, denoiser: nn.Module) -> None:
        """Let losses and sampling call `denoiser`, an engine around the model's own."""
        self.policy.denoiser = self.judge.denoiser = denoiser

    def optimizer(self) -> tuple[torch.optim.AdamW, LambdaLR]:
        """AdamW over the trained weights, and its learning-rate schedule counted in updates."""
        o = self.run.optimizer
        adam = torch.optim.AdamW(
            self.model.trained().values(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, foreach=False
        )
        updates = self.run.train.updates
        return adam, LambdaLR(adam, lambda step: learning_rate_factor(step, warmup=o.warmup, updates=updates, shape=o.schedule))

    def batches(self, step: int) -> Iterator[Rollouts]:
        """This worker's micro-batches of an update, sampled with the current weights up to the last point the method keeps.

        Micro-batch m of an update goes to worker m mod workers, so the update's batch does not depend on their number.
        """
        run, steps = self.run, self.policy.schedule.steps
        kept = self.method.keep(steps, torch.Generator().manual_seed(mix(run.seed, 3, step)))
        slots = tickets(run, self.train_prompts, step)
        for a in range(self.geometry.accumulation):
            start = (a * self.workers + self.rank) * run.batch.micro
            prompts, base = zip(*slots[start : start + run.batch.micro], strict=True)
            yield self.sample(prompts, base, kept)

    def sample(self, prompts: tuple[str, ...], base: tuple[int, ...], kept: tuple[int, ...]) -> Rollouts:
        """Rollouts of G attempts for each prompt; the attempts' seeds follow from the ticket's."""
        attempts = self.method.attempts
        seeds = torch.tensor([[mix(seed, g) for g in range(attempts)] for seed in base])
        flat = [prompt for prompt in prompts for _ in range(attempts)]
        _, points = self.policy.sample(flat, seeds.flatten().tolist(), last=max(kept), keep=kept)
        return Rollouts(prompts, seeds, points.unflatten(0, seeds.shape), kept)

    def update(self, engine: Engine, step: int) -> dict[str, float]:
        """One optimiser update: the mean of the method's metrics over this worker's micro-batches."""
        return update(engine, self.method, self.policy, self.batches(step))

    @torch.no_grad()
    def evaluate(self) -> list[Picture]:
        """This worker's share of the held-out pictures, by index: the same prompts and seeds at every call.

        Every worker makes as many calls, with a picture to discard if need be: ZeRO-3 gathers weights in each of them.
        """
        config, mine = self.run.evaluate, range(self.rank, self.run.evaluate.images, self.workers)
        pictures: list[Picture] = []
        for start in range(0, -(-config.images // self.workers), config.batch):
            share = list(mine[start : start + config.batch])
            index = share or [0]
            prompts = [self.held_out_prompts[i % len(self.held_out_prompts)] for i in index]
            seeds = [mix(config.seed, i) for i in index]
            images = self.model.decode(self.judge.sample(prompts, seeds)[0])
            total, parts = self.judge.score(images, prompts)
            rewards = {"total": total, **parts}
            pixels = (images * 255).round().byte().cpu()
            pictures += [
                Picture(i, prompts[row], seeds[row], {name: float(r[row]) for name, r in rewards.items()}, pixels[row])
                for row, i in enumerate(share)
            ]
        return pictures

    def averaged(self) -> Any:
        """Context in which the model holds the weights to evaluate and export: their moving average, if the run has one."""
        return swapped(self.model.trained(), self.ema.average if self.ema else {}) if self.ema else _nothing()


def summary(pictures: list[Picture], prefix: str = "held_out") -> dict[str, float]:
    """Mean of each reward over pictures: {"held_out/total": ..., ...}."""
    return {f"{prefix}/{name}": sum(p.rewards[name] for p in pictures) / len(pictures) for name in pictures[0].rewards}


def _score(rewards: Mapping[str, Any], device: torch.device | str, counted: list[str] | None = None) -> Any:
    """Weighted sum of built rewards; those outside `counted` are parts with weight 0."""
    weights = {name: r.weight if counted is None or name in counted else 0.0 for name, r in rewards.items()}
    return weighted_sum({name: r.build(device) for name, r in rewards.items()}, weights)


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()
