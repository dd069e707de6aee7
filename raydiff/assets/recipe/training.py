"""One training loop for every stage: it resumes, averages over processes and keeps an EMA.

Processes average their weights every few steps (local SGD). On a few CPU cores this beats threads within one
operation, for the layers here are small, and it needs no GPU.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn

AVERAGE_EVERY = 10
LOG_EVERY = 100
SAVE_EVERY_S = 60.0

Loss = Callable[[Generator, int], tuple[Tensor, dict[str, float]]]  # (rng, step) -> loss, metrics


@dataclass(frozen=True)
class Schedule:
    steps: int
    learning_rate: float
    weight_decay: float = 1e-3
    warmup: int = 100
    cooldown: float = 0.3
    """Share of the steps over which the rate falls to nearly nothing."""
    ema: float = 0.999

    def rate(self, step: int) -> float:
        falling = (self.steps - step) / (self.cooldown * self.steps)
        return self.learning_rate * min(1.0, (step + 1) / self.warmup, max(0.02, falling))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def spawn(stage: Callable[[Path], None], work: Path, count: int) -> None:
    """Runs `stage(work)` in `count` processes that can average their weights, or right here if one is enough."""
    if count == 1:
        return stage(work)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_join, (count, f"file://{folder}/store", stage, work), nprocs=count)


def _join(number: int, count: int, store: str, stage: Callable[[Path], None], work: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=count)
    stage(work)
    dist.destroy_process_group()


def train(modules: Mapping[str, nn.Module], loss: Loss, schedule: Schedule, checkpoint: Path) -> None:
    """Trains `modules` in place and leaves the EMA of their weights in them.

    The random numbers of a step depend on its number alone, so a run that was killed goes on from `checkpoint` as if
    nothing had happened.
    """
    every = nn.ModuleDict(modules)
    parameters = [p for p in every.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=schedule.weight_decay, betas=(0.9, 0.99))
    first, ema = resume(every, optimizer, checkpoint)
    started = saved = time.monotonic()
    means: dict[str, float] = {}
    every.train()
    for step in range(first, schedule.steps):
        rng = Generator().manual_seed(step * workers() + rank())
        torch.manual_seed(step * workers() + rank())  # for layers that draw by themselves: dropout, the VAE's sample
        value, metrics = loss(rng, step)
        optimizer.param_groups[0]["lr"] = schedule.rate(step)
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % AVERAGE_EVERY == 0 or step == schedule.steps - 1:
            average(every)
        follow(ema, every, min(schedule.ema, (1 + step) / (10 + step)))
        for key, metric in {"loss": value.item(), **metrics}.items():
            means[key] = metric + 0.98 * (means.get(key, metric) - metric)
        if rank() == 0 and step % LOG_EVERY == 0:
            report(step, time.monotonic() - started, means)
        if rank() == 0 and (time.monotonic() - saved > SAVE_EVERY_S or step == schedule.steps - 1):
            saved = time.monotonic()
            save({"step": step + 1, "weights": every.state_dict(), "ema": ema, "optimizer": optimizer}, checkpoint)
    every.load_state_dict(ema)
    every.eval()


def resume(every: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Path) -> tuple[int, dict[str, Tensor]]:
    """Loads the checkpoint where there is one; the first step to do, and the EMA."""
    if not checkpoint.exists():
        average(every)  # every process starts from the same weights
        return 0, {key: value.clone() for key, value in every.state_dict().items()}
    state = torch.load(checkpoint, weights_only=True)
    every.load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["ema"]


def save(state: dict, checkpoint: Path) -> None:
    """Writes beside the checkpoint and then renames, so that a kill in between leaves the old one whole."""
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    part = checkpoint.with_suffix(".part")
    torch.save({**state, "optimizer": state["optimizer"].state_dict()}, part)
    os.replace(part, checkpoint)


@torch.no_grad()
def average(module: nn.Module) -> None:
    """The mean over the processes of all weights and running statistics."""
    if workers() == 1:
        return
    tensors = [value for value in module.state_dict().values() if value.is_floating_point()]
    flat = torch.cat([value.flatten() for value in tensors])
    dist.all_reduce(flat)
    flat /= workers()
    for value, mean in zip(tensors, flat.split([value.numel() for value in tensors]), strict=True):
        value.copy_(mean.view_as(value))


@torch.no_grad()
def follow(ema: dict[str, Tensor], module: nn.Module, decay: float) -> None:
    if rank() != 0:
        return
    now = module.state_dict()
    moving = [key for key, value in now.items() if value.is_floating_point()]
    torch._foreach_lerp_([ema[key] for key in moving], [now[key] for key in moving], 1 - decay)


def report(step: int, seconds: float, means: dict[str, float]) -> None:
    rounded = {key: float(f"{value:.4g}") for key, value in means.items()}
    print(json.dumps({"step": step, "seconds": round(seconds), **rounded}), flush=True)
