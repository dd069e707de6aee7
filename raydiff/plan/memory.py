"""What a run holds in memory: `Session.update` on the model's shapes (torch's meta device), whose live bytes are counted."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raydiff.config import Run
from raydiff.core.rollouts import Rollouts
from raydiff.plan.cost import Backward, small
from raydiff.session import Session

GIB = 2**30
_POINTS = 4  # steps with gradient to trace; what has more is extrapolated from half as many and these


@dataclass(frozen=True)
class Memory:
    """Bytes of one worker. A peak is what is live at once beyond the weights and states."""

    frozen: int
    trained: int
    gradients: int
    optimizer: int
    ema: int
    update: int  # peak of one micro-batch
    evaluation: int  # peak of one evaluation batch
    generator: int  # peak of what a generator samples at once

    @property
    def states(self) -> int:
        return self.frozen + self.trained + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> int:
        return self.states + max(self.update, self.evaluation)

    @property
    def of_generator(self) -> int:
        """Bytes of one generator, which trains nothing."""
        return self.frozen + self.trained + self.generator


@dataclass(frozen=True)
class Model:
    """A run's model, by its configs alone."""

    parameters: dict[str, int]  # by part, with "trained"
    memory: Memory
    latent: int  # values of one
    picture: int  # values of one


def measure(run: Run, folder: Path) -> Model:
    """Build the model without its weights, of a run in which `preflight.faults` finds none."""
    skeleton = run.model.skeleton(folder, reference=run.method.needs_reference, checkpointing=run.train.gradient_checkpointing)
    trained = skeleton.trained()
    names = {id(p) for p in trained.values()}
    count = sum(p.numel() for p in trained.values())
    parts = {name: sum(p.numel() for p in part.parameters() if id(p) not in names) for name, part in skeleton.parts().items()}
    frozen = sum(
        _bytes(t) for part in skeleton.parts().values() for t in [*part.parameters(), *part.buffers()] if id(t) not in names
    )
    workers, stage = run.pools.train.replicas, run.train.zero_stage

    def share(since: int) -> int:
        return -(-4 * count // (workers if stage >= since else 1))

    flat_copy = share(1) if stage else 0  # ZeRO's optimiser steps on a flat fp32 copy of its share
    memory = Memory(
        frozen=frozen,
        trained=share(3),
        gradients=share(2),
        optimizer=2 * share(1) + flat_copy,
        ema=4 * count if run.optimizer.ema is not None else 0,
        update=_peak_of_update(run, skeleton),
        evaluation=_peak_of_sampling(run, skeleton, min(run.evaluate.batch, -(-run.evaluate.images // workers))),
        generator=_peak_of_sampling(run, skeleton, run.batch.micro * run.method.attempts),
    )
    latent = torch.empty(1, *skeleton.latent_shape, device="meta")
    with torch.no_grad():
        picture = skeleton.decode(latent).numel()
    return Model({**{k: n for k, n in parts.items() if n}, "trained": count}, memory, latent.numel(), picture)


def _peak_of_update(run: Run, skeleton: Any) -> int:
    """Live bytes at the worst moment of one micro-batch. Many steps with gradient: linear from two smaller numbers of them."""

    def points(steps: int) -> int:
        return steps - min(run.method.keep(steps, torch.Generator().manual_seed(0)))

    def trace(steps: int) -> int:
        session = _Traced(
            small(run, SimpleNamespace(build=lambda *_, **__: skeleton, dtype=run.model.dtype), run.batch.micro, steps=steps),
            "meta",
        )
        for p in skeleton.trained().values():
            p.grad = torch.zeros_like(p)  # stays; it has a line of its own
        with _Shapes(), _fused_attention(), Live([*_tensors(skeleton)]) as live:
            session.update(Backward(), 0)
        return live.peak

    steps = run.sampler.steps
    half = _POINTS // 2
    if points(steps) <= _POINTS or points(_POINTS) != _POINTS or points(half) != half:
        return trace(steps)
    fewer, more = trace(half), trace(_POINTS)
    return more + (more - fewer) * (points(steps) - _POINTS) // (_POINTS - half)


def _peak_of_sampling(run: Run, skeleton: Any, size: int) -> int:
    """Live bytes at the worst moment of a batch without a graph."""
    with torch.no_grad(), _fused_attention(), Live([*_tensors(skeleton)]) as live:
        x = torch.empty(size, *skeleton.latent_shape, device="meta")
        skeleton.predict(skeleton.denoiser, ["a"] * size, run.sampler.guidance)(x, torch.empty(size, device="meta"))
        skeleton.decode(x)
    return live.peak


class _Traced(Session):
    """A session on the meta device, where the walk to the kept points, which has no graph, is left out."""

    def sample(self, step: int, m: int) -> Rollouts:
        kept, seeds = self.kept(step), torch.zeros(self.run.batch.micro, self.method.attempts, dtype=torch.int64)
        latents = torch.empty(*seeds.shape, len(kept), *self.model.latent_shape, device="meta")
        rollouts = Rollouts(("a",) * len(seeds), seeds, latents, kept)
        if self.method.needs_rewards:  # with values, as losses decide by them
            rollouts = replace(rollouts, rewards={"total": torch.zeros(seeds.shape)})
        if self.method.needs_log_probs:
            steps = self.policy.schedule.steps
            rollouts = replace(rollouts, log_probs=torch.empty(*seeds.shape, steps, device="meta"))
        return rollouts


class Live(TorchDispatchMode):
    """Bytes of storages that operations made and that something still holds, the graph included: now, and at the peak."""

    def __init__(self, before: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in before}  # a view of a weight makes nothing new

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self._sizes:
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, key)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


class _Shapes(TorchFunctionMode):
    """Lets code run on meta tensors: a truth value is True, a number 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.__bool__, Tensor.__float__) and args[0].is_meta:
            return func is Tensor.__bool__ or 0.0
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention keeps what flash attention keeps; on the meta device torch would choose the kernel with the whole matrix."""
    real = nn.functional.scaled_dot_product_attention
    nn.functional.scaled_dot_product_attention = lambda q, k, v, *_, **__: _Attention.apply(q, k, v)
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = real


class _Attention(torch.autograd.Function):
    """Shapes of fused attention: query, key, value and output are kept, the matrix of weights never is."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


def _tensors(skeleton: Any) -> Iterator[Tensor]:
    for part in skeleton.parts().values():
        yield from part.parameters()
        yield from part.buffers()
        yield from (p.grad for p in part.parameters() if p.grad is not None)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
