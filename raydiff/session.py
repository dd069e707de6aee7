"""What a run is made of in one process: the model, the method, the rewards and the prompts, and one step of each kind.

`local.fit` and every Ray worker call these same functions in the same order.
Legend: B prompts, G attempts, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from raydiff import sampling
from raydiff.config import Geometry, Run, geometry
from raydiff.core import guard
from raydiff.core.denoise import mix
from raydiff.core.guard import Probe
from raydiff.core.learner import Agreed, Ema, Engine, LossScale, learning_rate_factor, swapped, update
from raydiff.core.log_prob import gaussian_log_prob
from raydiff.core.policy import Calls, checked
from raydiff.core.reward_vjp import Score, weighted_sum
from raydiff.core.rollouts import Rollouts
from raydiff.data.latents import Latents, prepare
from raydiff.data.prompts import read_both, slots, tickets
from raydiff.data.verdicts import Verdicts
from raydiff.pictures import to_bytes


@dataclass(frozen=True)
class Picture:
    """One evaluated sample."""

    index: int
    prompt: str
    seed: int
    rewards: dict[str, float]  # by name, with "total"
    image: Tensor  # (3,H,W) uint8, on the CPU
    moved: dict[str, float] = field(default_factory=dict)  # drift and latent_norm, if it is one of the probe's
    embedding: Tensor | None = None  # (E,) of unit length, on the CPU, where diversity is measured


@dataclass(frozen=True)
class Scores:
    """Who answers when pictures are scored: for training, and for evaluation, which asks for held-out rewards too.

    Rewards that count for nothing in a total are parts with weight 0.
    """

    training: Score
    evaluation: Score

    @classmethod
    def here(cls, run: Run, device: torch.device | str) -> Scores:
        """The run's rewards, built on a device."""
        trained = {name: reward.build(device) for name, reward in run.rewards.named.items()}
        held_out = {name: reward.build(device) for name, reward in run.evaluate.rewards.items()}
        return cls(weighted_sum(trained, weights(run)), weighted_sum({**trained, **held_out}, weights(run)))


def weights(run: Run) -> dict[str, float]:
    """Each reward's factor in the total; 0 for what is only measured."""
    return {**{name: r.weight for name, r in run.rewards.named.items()}, **dict.fromkeys(run.evaluate.rewards, 0.0)}


Gather = Callable[[Any], list[Any]]
"""Every worker's value by rank, on every worker: collective."""


def alone(value: Any) -> list[Any]:
    """The Gather of one process."""
    return [value]


@dataclass
class Session:
    """A run's objects on one device. `denoiser` starts as the model's own; an engine that wraps it is put in its place."""

    run: Run
    device: torch.device | str = "cpu"
    rank: int = 0
    workers: int = 1
    scores: Scores | None = None  # None: the rewards are built here
    gather: Gather = alone
    agreed: Agreed = nullcontext
    ema: Ema | None = field(init=False, default=None)
    pairs: Latents | None = field(init=False, default=None)  # what a method trains on that samples nothing
    verdicts: Verdicts | None = field(init=False, default=None)  # what compares the samples in place of rewards
    probes: dict[int, Probe] = field(init=False, default_factory=dict)  # by the batch of an evaluation

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
        self.advantages = run.method.advantages()
        sampler, scores = run.sampler, self.scores or Scores.here(run, self.device)
        self.policy = sampling.policy(
            self.model, sampler, scores.training, gradient_checkpointing=run.train.gradient_checkpointing
        )
        self.method.check_grid(self.policy.schedule, sampler.eta)
        self.judge = replace(self.policy, score=scores.evaluation, calls=Calls())  # which is not training's cost
        self.loss_scale = LossScale() if run.model.dtype == "float16" else None
        if run.optimizer.ema is not None:
            self.ema = Ema(self.model.trained(), run.optimizer.ema)

    def prepare(self, told: Callable[[int, int], None] = lambda done, pieces: None) -> None:
        """Encode the labelled pairs, where the method trains on them and that is not done yet; read the labels, where they
        compare its samples. Collective, before any update.

        `told` hears how many of the missing pieces are done. Raises PairsError or OSError.
        """
        if self.method.judged:
            self.verdicts = Verdicts.read(str(self.run.pairs.path), split=self.run.pairs.split)
            wanted = tickets(self.run, self.train_prompts, 0)
            for g in range(self.method.attempts):  # nobody's verdict is missed in the middle of the update
                self.verdicts.of([prompt for prompt, _ in wanted], [mix(seed, g) for _, seed in wanted])
        if self.method.labelled:
            config = self.run.pairs, self.model, self.run.evaluate.batch
            self.pairs = prepare(*config, rank=self.rank, workers=self.workers, gather=self.gather, told=told)

    def wrap(self, denoiser: nn.Module) -> None:
        """Let losses and sampling call `denoiser`, an engine around the model's own."""
        self.policy.denoiser = self.judge.denoiser = denoiser

    def optimizer(self) -> tuple[torch.optim.AdamW, LambdaLR]:
        """AdamW over the trained weights, and its learning-rate schedule counted in optimiser steps."""
        o = self.run.optimizer
        adam = torch.optim.AdamW(
            self.model.trained().values(), lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, foreach=False
        )
        each = self.geometry.optimizer_steps
        warmup, steps = o.warmup * each, self.run.train.updates * each
        return adam, LambdaLR(adam, lambda step: learning_rate_factor(step, warmup=warmup, steps=steps, shape=o.schedule))

    def batches(self, step: int) -> Iterator[Rollouts]:
        """This worker's micro-batches of an update, sampled with the current weights or read.

        Micro-batch m of an update goes to worker m mod workers, so the update's batch does not depend on their number.
        """
        for a in range(self.geometry.accumulation):
            yield self.scored(self.sample(step, a * self.workers + self.rank))

    def sample(self, step: int, m: int) -> Rollouts:
        """Micro-batch m of an update, up to the last point the method keeps: G attempts for each of its prompts.

        Prompts, or labelled pairs, and seeds are a function of the run, `step` and `m`, whoever samples.
        """
        if self.method.labelled:
            return self.read(step, m)
        run, attempts, size = self.run, self.method.attempts, self.run.batch.micro
        kept = self.kept(step)
        prompts, base = zip(*tickets(run, self.train_prompts, step)[m * size : (m + 1) * size], strict=True)
        seeds = torch.tensor([[mix(seed, g) for g in range(attempts)] for seed in base])
        flat = [prompt for prompt in prompts for _ in range(attempts)]
        starts = [seed for seed in base for _ in range(attempts)] if self.method.shared_start else None
        steps: list[Tensor] = []  # log-probability of each, (B·G,)

        def record(x: Tensor, mean: Tensor, std: float) -> None:
            steps.append(gaussian_log_prob(x, mean, std))

        _, points = self.policy.sample(
            flat, seeds.flatten().tolist(), starts=starts, last=max(kept), keep=kept,
            observe=record if self.method.needs_log_probs else None,
        )  # fmt: skip
        log_probs = torch.stack(steps, 1).unflatten(0, seeds.shape) if steps else None
        return Rollouts(prompts, seeds, points.unflatten(0, seeds.shape), kept, log_probs=log_probs)

    def read(self, step: int, m: int) -> Rollouts:
        """Micro-batch m of an update of labelled pairs, as rollouts of two attempts that cost no sampling. Collective.

        Raises PairsError, on all workers, for a record that has changed; OSError, on this one, for a disk that does not answer,
        which may pass.
        """
        assert self.pairs is not None, "call prepare() first"
        size = self.run.batch.micro
        rows, base = zip(*slots(self.run, len(self.pairs), step)[m * size : (m + 1) * size], strict=True)
        seeds = torch.tensor([[mix(seed, side) for side in (0, 1)] for seed in base])
        away: OSError | None = None
        with self.agreed():
            try:
                latents, labels, prompts = self.pairs.read(rows, seeds)
            except OSError as error:
                away = error
        if away:
            raise away
        kept = (self.policy.schedule.steps,)
        return Rollouts(
            prompts, seeds, latents[:, :, None].to(self.model.device), kept, {"total": labels.to(self.model.device)}
        )

    def kept(self, step: int) -> tuple[int, ...]:
        """The grid points that an update's samples keep: a function of the run and `step`."""
        return self.method.keep(self.policy.schedule.steps, torch.Generator().manual_seed(mix(self.run.seed, 3, step)))

    @torch.no_grad()
    def scored(self, rollouts: Rollouts) -> Rollouts:
        """The rollouts with rewards, if the method needs them and they have none: "total" alone, where people gave it."""
        if not self.method.needs_rewards or rollouts.rewards is not None:
            return rollouts
        with self.agreed():
            return self._scored(rollouts)

    def _scored(self, rollouts: Rollouts) -> Rollouts:
        if self.verdicts is not None:
            total = self.verdicts.of(rollouts.flat_prompts(), rollouts.flat_seeds())
            return replace(rollouts, rewards={"total": total.to(rollouts.latents).view(rollouts.seeds.shape)})
        clean = rollouts.at(self.policy.schedule.steps)
        total, parts = self.policy.rewards(clean, rollouts.flat_prompts(), rollouts.flat_seeds())
        shape = rollouts.seeds.shape
        return replace(rollouts, rewards={name: r.view(shape) for name, r in {"total": total, **parts}.items()})

    def ready(self, batches: Iterable[Rollouts]) -> Iterable[Rollouts]:
        """This worker's micro-batches of an update, as the loss takes them. Collective where that depends on all rewards.

        Streams micro-batches when possible. Collects them first if an update has several optimiser steps, or the loss of the
        first needs the rewards of the last.
        """
        if self.geometry.optimizer_steps == 1 and self.advantages is None and not self.method.selects:
            return batches
        batches = list(batches)
        if self.advantages is not None:
            return self.weighed(batches)
        return self.counted(batches) if self.method.selects else batches

    def counted(self, batches: list[Rollouts]) -> list[Rollouts]:
        """The micro-batches with the mean count of terms of one, over its optimiser step and all workers.

        What is averaged over a part of the samples, as the pairs that are no ties, then has one denominator, however the batch
        is split.
        """
        shares = self.gather([self.method.terms(b) for b in batches])  # by worker, each its micro-batches
        means = self._means([count for together in zip(*shares, strict=True) for count in together])
        return [replace(b, terms=mean) for b, mean in zip(batches, means, strict=True)]

    def _means(self, counts: Sequence[int]) -> list[float]:
        """For each of this worker's micro-batches the mean count of its optimiser step; `counts` are the whole update's."""
        own, size = self.geometry.step_accumulation, self.geometry.step_accumulation * self.workers
        steps = [counts[start : start + size] for start in range(0, len(counts), size)]
        return [sum(step) / size for step in steps for _ in range(own)]

    def weighed(self, batches: list[Rollouts]) -> list[Rollouts]:
        """The micro-batches with advantages from the rewards of all workers', in the update's order: the same at any number."""
        assert self.advantages is not None
        shares = self.gather([(b.flat_prompts(), b.total().flatten().double().cpu()) for b in batches])
        update = [micro for together in zip(*shares, strict=True) for micro in together]
        weights = self.advantages([p for prompts, _ in update for p in prompts], torch.cat([r for _, r in update]))
        parts = weights.split([len(r) for _, r in update])
        means = self._means([int(w.count_nonzero()) for w in parts])
        mine = parts[self.rank :: self.workers]
        return [
            replace(b, advantages=w.to(b.latents).view(b.seeds.shape), terms=mean)
            for b, w, mean in zip(batches, mine, means, strict=True)
        ]

    def update(self, engine: Engine, step: int, batches: Iterable[Rollouts] | None = None) -> dict[str, float]:
        """One update on this worker's `batches`, or on its own samples: the mean of the method's metrics.

        The optimiser moves `geometry.optimizer_steps` times in it.
        """
        batches = self.ready(self.batches(step) if batches is None else batches)
        epochs, zero = self.geometry.inner_epochs, self.run.train.zero_gradient
        return update(engine, self.method, self.policy, batches, epochs, zero, self.agreed)

    def state(self) -> dict[str, Any]:
        """What later updates depend on beside weights and optimiser, as JSON; the same on every worker."""
        advantages = {} if self.advantages is None else {"advantages": self.advantages.state()}
        return advantages | ({} if self.loss_scale is None else {"loss_scale": self.loss_scale.state()})

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what `state` gave. Raises KeyError when the method needs more than that."""
        if self.advantages is not None:
            self.advantages.restore(state["advantages"])
        if self.loss_scale is not None:
            self.loss_scale.restore(state["loss_scale"])

    def spent(self) -> tuple[Calls, Calls]:
        """What this worker has spent on training and on evaluation so far: it changes with every call of the denoiser."""
        return replace(self.policy.calls), replace(self.judge.calls)

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
            latents = self.judge.sample(prompts, seeds)[0]
            moved = self.moved(start, index, prompts, seeds, latents)
            images = self.model.decode(latents)
            total, parts = checked(self.judge.score, images, prompts, seeds)
            rewards = {"total": total, **parts}
            pixels = to_bytes(images)
            embeddings = self.embed(images).cpu() if self.embed else [None] * len(index)
            pictures += [
                Picture(i, prompts[r], seeds[r], _row(rewards, r), pixels[r], moved.get(i, {}), embeddings[r])
                for r, i in enumerate(share)
            ]
        return pictures

    def moved(
        self, start: int, index: list[int], prompts: list[str], seeds: list[int], latents: Tensor
    ) -> dict[int, dict[str, float]]:
        """How far the probe's pictures of a batch are from the base model's, by index. Every worker makes as many calls."""
        images = self.run.evaluate.drift_images
        if not self.model.has_reference or start * self.workers >= images:
            return {}
        rows = [row for row, i in enumerate(index) if i < images] or [0]
        prompts, seeds = [prompts[row] for row in rows], [seeds[row] for row in rows]
        if start not in self.probes:
            self.probes[start] = Probe.of(self.judge, prompts, seeds)
        probe = self.probes[start]
        measured = {"drift": probe.drift(self.judge, prompts), "latent_norm": probe.latent_norm(latents[rows])}
        return {index[row]: _row(measured, n) for n, row in enumerate(rows) if index[row] < images}

    @cached_property
    def embed(self) -> Callable[[Tensor], Tensor] | None:
        """Images (B,3,H,W) -> (B,E) of unit length, by `evaluate.clip`."""
        if self.run.evaluate.clip is None:
            return None
        from raydiff.rewards.clip import load_clip

        return load_clip(self.run.evaluate.clip, None, "float32").eval().to(self.device)

    def averaged(self) -> Any:
        """Context in which the model holds the weights to evaluate and export: their moving average, if the run has one."""
        return swapped(self.model.trained(), self.ema.average if self.ema else {}) if self.ema else _nothing()


def summary(pictures: list[Picture], prefix: str = "held_out") -> dict[str, float]:
    """Mean of each reward over pictures: {"held_out/total": ..., ...}, and the metrics of `core.guard` that were measured."""
    means = {f"{prefix}/{name}": sum(p.rewards[name] for p in pictures) / len(pictures) for name in pictures[0].rewards}
    probed = [p.moved for p in pictures if p.moved]
    means |= {name: sum(moved[name] for moved in probed) / len(probed) for name in (probed[0] if probed else ())}
    embeddings = [p.embedding for p in pictures if p.embedding is not None]
    return means | ({"diversity": guard.diversity(torch.stack(embeddings))} if len(embeddings) > 1 else {})


def _row(values: dict[str, Tensor], row: int) -> dict[str, float]:
    return {name: float(v[row]) for name, v in values.items()}


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()
