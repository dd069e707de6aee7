"""What a run will do and need, before anything is loaded: geometry, cost, memory, files, cluster.

Nothing here repeats a method's arithmetic: the run's own method goes through `Session.update`, once on a stub of a few
numbers whose calls are counted, and once on the model's shapes (torch's meta device), whose live bytes are.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from raydiff.config import Batch, Evaluate, Geometry, Prompts, Run, geometry
from raydiff.core.denoise import Predict
from raydiff.core.policy import Calls
from raydiff.core.rollouts import Rollouts
from raydiff.core.schedule import Schedule
from raydiff.data.prompts import read_both
from raydiff.models.base import ModelConfig
from raydiff.rewards.base import RewardConfig
from raydiff.session import Session

GIB = 2**30
_DRAWS = 16  # updates to average a method's cost over, where it draws its point
_POINTS = 4  # steps with gradient to trace; what has more is extrapolated from half as many and these


@dataclass(frozen=True)
class Machine:
    """What there is to run on."""

    where: str
    cpus: float
    gpus: float = 0
    memory: int | None = None  # bytes of the whole machine; None: not known
    gpu_memory: int | None = None  # bytes of one GPU


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

    @property
    def states(self) -> int:
        return self.frozen + self.trained + self.gradients + self.optimizer + self.ema

    @property
    def total(self) -> int:
        return self.states + max(self.update, self.evaluation)


@dataclass(frozen=True)
class Plan:
    name: str
    geometry: Geometry
    parameters: dict[str, int]  # by part, with "trained"; empty when the model's config is not at hand
    update: Calls
    evaluation: Calls
    evaluations: int
    total: Calls
    memory: Memory | None
    cpus: float
    gpus: float
    machine: Machine
    problems: tuple[str, ...]
    """Why the run cannot work, each with what to change."""
    notes: tuple[str, ...]
    """What the figures assume, and what could not be known."""


def plan(run: Run, machine: Machine) -> Plan:
    """Look at a run and at a machine, or at a cluster's resources. Loads no weights."""
    workers = run.train.workers
    problems, notes = missing(run), []
    gpu = machine.gpus > 0 if run.train.use_gpu is None else run.train.use_gpu
    cpus, gpus = workers * run.train.cpus_per_worker, float(workers) if gpu else 0.0
    problems += _too_small(run, machine, cpus, gpus)

    update, evaluation = count(run)
    evaluations = 1 + sum(s % run.evaluate.every == 0 or s == run.train.updates for s in range(1, run.train.updates + 1))
    total = Calls(
        *(
            u * run.train.updates + e * evaluations
            for u, e in zip(vars(update).values(), vars(evaluation).values(), strict=True)
        )
    )

    parameters: dict[str, int] = {}
    memory: Memory | None = None
    folder = model_folder(run)
    if folder is None:
        notes.append(
            f"model: {getattr(run.model, 'path', run.model.kind)!r} is neither a folder nor in the Hugging Face cache here:"
            " parameters and memory are not known until it is downloaded"
        )
    elif not any(fault.startswith("model") for fault in problems):
        try:
            parameters, memory = measure(run, folder)
        except ValueError as error:
            problems.append(str(error))
    if memory is not None:
        problems += _too_big(run, machine, memory, gpu)
        notes.append(
            "memory: bytes live at once, traced on the model's shapes with flash-type attention; the allocator's slack (about"
            " a tenth), the CUDA context or the Python process (0.5-1 GiB), DeepSpeed's buckets and the rewards' own weights"
            " and activations come on top"
        )
    return Plan(
        run.name, geometry(run), parameters, update, evaluation, evaluations, total, memory,
        cpus, gpus, machine, tuple(problems), tuple(notes),
    )  # fmt: skip


def missing(run: Run) -> list[str]:
    """What stands in the run's way on disk: missing or broken model folders, prompts, storage; [] when nothing does."""
    parts = {"model": run.model, "method": run.method}
    parts |= {f"rewards.{name}": r for name, r in run.rewards.items()}
    parts |= {f"evaluate.rewards.{name}": r for name, r in run.evaluate.rewards.items()}
    faults = []
    for path, part in parts.items():
        try:
            part.preflight()
        except (ValueError, OSError) as error:
            faults.append(str(error) if str(error).startswith(path) else f"{path}: {error}")
    try:
        read_both(run.prompts)
    except (ValueError, OSError) as error:
        faults.append(str(error) if str(error).startswith("prompts") else f"prompts: {error}")
    if "://" not in run.storage and not _can_write(Path(run.storage)):
        faults.append(f"storage = {run.storage!r}: cannot write there; give another folder")
    return faults


def machine() -> Machine:
    """The cluster that RAY_ADDRESS names, or this machine."""
    if address := os.environ.get("RAY_ADDRESS"):
        import ray

        with contextlib.ExitStack() as stack:
            if not ray.is_initialized():
                ray.init(address=address, logging_level="ERROR", log_to_driver=False)
                stack.callback(ray.shutdown)
            resources = ray.cluster_resources()
        return Machine(f"the cluster at {address}", resources.get("CPU", 0), resources.get("GPU", 0))
    gpus = torch.cuda.device_count()
    return Machine(
        where="this machine",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        gpus=gpus,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpu_memory=torch.cuda.get_device_properties(0).total_memory if gpus else None,
    )


def model_folder(run: Run) -> Path | None:
    """Where the model's config files lie: its folder, or its place in the Hugging Face cache. None: not on this machine."""
    if not hasattr(run.model, "skeleton"):
        return None
    folder = Path(str(run.model.folder()))
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    try:
        found = [
            try_to_load_from_cache(str(run.model.path), f"{part}_config.json" if "/s" in part else f"{part}/config.json",
                                   revision=run.model.revision)
            for part in ("unet", "vae", "text_encoder", "scheduler/scheduler")
        ]  # fmt: skip
    except ValueError:  # not the form of a hub id: preflight has said so
        return None
    return Path(str(found[0])).parents[1] if all(isinstance(f, str) for f in found) else None


# What it costs


def count(run: Run) -> tuple[Calls, Calls]:
    """(calls of an update, calls of an evaluation), counted while the run's own method trains a model of one weight.

    Where a method draws its point, the mean over the run's first updates.
    """
    session = Session(_small(run, _Stub(), micro=1))
    updates = min(_DRAWS, run.train.updates)
    for step in range(updates):
        session.update(_Backward(), step)
    session.evaluate()
    return (
        Calls(**{name: round(run.batch.size * n / updates) for name, n in vars(session.policy.calls).items()}),
        Calls(**{name: run.evaluate.images * n for name, n in (vars(session.judge.calls) | {"reward_queries": 1}).items()}),
    )


class _Stub(ModelConfig):
    kind: str = "stub"

    def build(self, device: torch.device | str = "cpu", *, seed: int = 0, reference: bool = False) -> _StubModel:
        return _StubModel()


class _StubModel:
    """A LatentModel of one weight, whose output is 0."""

    device = torch.device("cpu")
    latent_shape = (1, 1, 1)

    def __init__(self) -> None:
        self.denoiser: nn.Module = nn.Linear(1, 1, bias=False)

    def schedule(self, steps: int, spacing: Any = None, final_alpha: float | None = None) -> Schedule:
        return Schedule.from_config({"num_train_timesteps": max(1000, steps)}, steps, spacing=spacing, final_alpha=final_alpha)

    def predict(self, denoiser: nn.Module, prompts: Sequence[str], guidance: float, detach_negative: bool = False) -> Predict:
        return lambda x, time: 0 * denoiser(x)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1)

    def encode(self, images: Tensor) -> Tensor:
        return images[:, :1]

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        yield

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.denoiser.named_parameters())


class _Mean(RewardConfig):
    kind: str = "mean"

    def build(self, device: torch.device | str = "cpu") -> Any:
        return lambda images, prompts: images.mean((1, 2, 3))


class _Backward:
    """An engine that accumulates gradients and moves nothing."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        pass


def _small(run: Run, model: Any, micro: int, **sampler: Any) -> Run:
    """The run with another model, one micro-batch an update, one picture an evaluation, and rewards without weights."""
    return run.model_copy(
        update={
            "model": model,
            "batch": Batch(size=micro, micro=micro),
            "train": run.train.model_copy(update={"workers": 1}),
            "optimizer": run.optimizer.model_copy(update={"ema": None}),
            "sampler": run.sampler.model_copy(update=sampler),
            "prompts": Prompts(train=("a",), held_out=("b",)),
            "rewards": {"mean": _Mean()},
            "evaluate": Evaluate(images=1, batch=1),
        }
    )


# What it holds in memory


def measure(run: Run, folder: Path) -> tuple[dict[str, int], Memory]:
    """(parameters by part, bytes by use of one worker). Raises ValueError for LoRA targets that the model lacks."""
    skeleton = run.model.skeleton(folder, reference=run.method.needs_reference)
    Schedule.from_config(skeleton.pipe.scheduler.config, run.sampler.steps)  # refuses more steps than the model has
    trained = skeleton.trained()
    names = {id(p) for p in trained.values()}
    count = sum(p.numel() for p in trained.values())
    parts = {name: sum(p.numel() for p in part.parameters() if id(p) not in names) for name, part in skeleton.parts().items()}
    frozen = sum(
        _bytes(t) for part in skeleton.parts().values() for t in [*part.parameters(), *part.buffers()] if id(t) not in names
    )
    workers, stage = run.train.workers, run.train.zero_stage

    def share(since: int) -> int:
        return -(-4 * count // (workers if stage >= since else 1))

    flat_copy = share(1) if stage else 0  # ZeRO's optimiser steps on a flat fp32 copy of its share
    return {**{k: n for k, n in parts.items() if n}, "trained": count}, Memory(
        frozen=frozen,
        trained=share(3),
        gradients=share(2),
        optimizer=2 * share(1) + flat_copy,
        ema=4 * count if run.optimizer.ema is not None else 0,
        update=_peak_of_update(run, skeleton),
        evaluation=_peak_of_evaluation(run, skeleton),
    )


def _peak_of_update(run: Run, skeleton: Any) -> int:
    """Live bytes at the worst moment of one micro-batch. Many steps with gradient: linear from two smaller numbers of them."""

    def points(steps: int) -> int:
        return steps - min(run.method.keep(steps, torch.Generator().manual_seed(0)))

    def trace(steps: int) -> int:
        session = _Traced(_small(run, SimpleNamespace(build=lambda *_, **__: skeleton), run.batch.micro, steps=steps), "meta")
        for p in skeleton.trained().values():
            p.grad = torch.zeros_like(p)  # stays; it has a line of its own
        with _Shapes(), _fused_attention(), _Live([*_tensors(skeleton)]) as live:
            session.update(_Backward(), 0)
        return live.peak

    steps = run.sampler.steps
    half = _POINTS // 2
    if points(steps) <= _POINTS or points(_POINTS) != _POINTS or points(half) != half:
        return trace(steps)
    fewer, more = trace(half), trace(_POINTS)
    return more + (more - fewer) * (points(steps) - _POINTS) // (_POINTS - half)


def _peak_of_evaluation(run: Run, skeleton: Any) -> int:
    size = min(run.evaluate.batch, -(-run.evaluate.images // run.train.workers))
    with torch.no_grad(), _fused_attention(), _Live([*_tensors(skeleton)]) as live:
        x = torch.empty(size, *skeleton.latent_shape, device="meta")
        skeleton.predict(skeleton.denoiser, ["a"] * size, run.sampler.guidance)(x, torch.empty(size, device="meta"))
        skeleton.decode(x)
    return live.peak


class _Traced(Session):
    """A session on the meta device, where the walk to the kept points, which has no graph, is left out."""

    def sample(self, prompts: tuple[str, ...], base: tuple[int, ...], kept: tuple[int, ...]) -> Rollouts:
        seeds = torch.zeros(len(prompts), self.method.attempts, dtype=torch.int64)
        latents = torch.empty(*seeds.shape, len(kept), *self.model.latent_shape, device="meta")
        return Rollouts(prompts, seeds, latents, kept)


class _Live(TorchDispatchMode):
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


# What cannot work


def _too_small(run: Run, machine: Machine, cpus: float, gpus: float) -> list[str]:
    """Workers that the machine or cluster cannot hold."""
    workers, each, faults = run.train.workers, run.train.cpus_per_worker, []
    if cpus > machine.cpus:
        fewer = int(machine.cpus // each)
        remedy = (
            f"set train.workers to {fewer}" if fewer else f"set train.cpus_per_worker to {machine.cpus / workers:g} or less"
        )
        faults.append(f"train.workers = {workers} × train.cpus_per_worker = {each:g}: {cpus:g} CPUs, and {machine.where} has"
                      f" {machine.cpus:g}: {remedy}, or use a larger cluster")  # fmt: skip
    if gpus > machine.gpus:
        remedy = f"set train.workers to {machine.gpus:g}" if machine.gpus else "set train.use_gpu to false"
        faults.append(f"train.workers = {workers} with a GPU each, and {machine.where} has {machine.gpus:g}: {remedy},"
                      " or use a larger cluster")  # fmt: skip
    return faults


def _too_big(run: Run, machine: Machine, memory: Memory, gpu: bool) -> list[str]:
    """Workers whose memory does not fit, with the batch that would."""
    if gpu:
        room, where = machine.gpu_memory, "a GPU"
    else:
        room, where = machine.memory and machine.memory // run.train.workers, f"a worker's share of {machine.where}"
    if room is None or memory.total <= room:
        return []
    faults = []
    for peak, field, value in (
        (memory.update, "batch.micro", run.batch.micro), (memory.evaluation, "evaluate.batch", run.evaluate.batch),
    ):  # fmt: skip
        if memory.states + peak <= room:
            continue
        fits = max(0, (room - memory.states) * value // peak)
        if field == "batch.micro":
            fits = max((m for m in range(1, fits + 1) if run.batch.size % (m * run.train.workers) == 0), default=0)
        cheaper = " or train.gradient_checkpointing to true" if not run.train.gradient_checkpointing else ""
        remedy = f"set {field} to {fits}" if fits else f'set model.dtype to "bfloat16"{cheaper}, or use a larger machine'
        faults.append(
            f"{field} = {value} needs about {gib(memory.states + peak)} of memory, and {where} has {gib(room)}: {remedy}"
        )
    return faults


def _can_write(folder: Path) -> bool:
    """Whether the folder, or the nearest one above that exists, can be written to."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder.is_dir() and os.access(folder, os.W_OK)


# How it is shown


def render(plan: Plan) -> Any:
    """A rich renderable: the figures as tables, then problems and notes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_row("run", plan.name)
    facts.add_row("batch", str(plan.geometry))
    if plan.parameters:
        others = ", ".join(f"{name} {_millions(n)}" for name, n in plan.parameters.items() if name != "trained")
        facts.add_row("trained", f"{plan.parameters['trained']:,} parameters (frozen: {others})")
    needs = f"{plan.cpus:g} CPUs" + (f", {plan.gpus:g} GPUs" if plan.gpus else "")
    facts.add_row("needs", f"{needs}; {plan.machine.where} has {plan.machine.cpus:g} CPUs, {plan.machine.gpus:g} GPUs")

    cost = Table(title="cost, in pictures", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(("", "an update", f"an evaluation, {plan.evaluations} of them", "the run")):
        cost.add_column(column, justify="right" if i else "left")
    for name, label in (
        ("images", "sampled"), ("reward_queries", "reward queries"),
        ("unet_forward", "denoiser forward"), ("unet_backward", "denoiser backward"),
    ):  # fmt: skip
        cost.add_row(label, *(f"{getattr(calls, name):,}" for calls in (plan.update, plan.evaluation, plan.total)))

    parts: list[Any] = [facts, Text(), cost]
    if plan.memory is not None:
        m = plan.memory
        memory = Table(title="memory of a worker", title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
        memory.add_column()
        memory.add_column(justify="right")
        for label, size in (
            ("frozen weights", m.frozen), ("trained weights", m.trained), ("gradients", m.gradients), ("Adam", m.optimizer),
            ("moving average", m.ema), ("peak of a micro-batch", m.update), ("peak of an evaluation batch", m.evaluation),
            ("in all", m.total),
        ):  # fmt: skip
            memory.add_row(label, gib(size))
        parts += [Text(), memory]
    parts += [Text(f"\nnote: {note}", style="dim") for note in plan.notes]
    parts += [Text(f"\ncannot work: {problem}", style="bold red") for problem in plan.problems]
    return Group(*parts)


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def _millions(n: int) -> str:
    return f"{n / 1e6:.1f} M"
