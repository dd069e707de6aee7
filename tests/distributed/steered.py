"""A reward like `colour` whose worker a test can slow down, kill, or make return NaN."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from raydiff.core.reward_vjp import Reward
from raydiff.rewards.base import RewardConfig


class Plugin(RewardConfig):
    kind: Literal["tests.distributed.steered"] = "tests.distributed.steered"
    pause: float = 0.0
    """Seconds a call takes longer."""
    die_once: str | None = None
    """A file that does not exist yet: the worker that makes it is killed, in its `die_at`-th call with a gradient."""
    die_at: int = 3
    hang_once: str | None = None
    """A file that does not exist yet: the call with a gradient that makes it never ends."""
    raise_once: str | None = None
    """A file that does not exist yet: the call that makes it raises."""
    raise_for: str | None = None
    """A prompt whose reward always raises."""
    die_for: str | None = None
    """A prompt whose every call kills the worker."""
    nan_for: str | None = None
    """A prompt whose reward is NaN."""

    places: str | None = None
    """A folder that gets a file named by each process's role and node."""

    def build(self, device: torch.device | str = "cpu") -> Reward:
        calls = 0
        note(self.places, "reward")

        def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
            nonlocal calls
            time.sleep(self.pause)
            calls += images.requires_grad
            if self.die_once and calls == self.die_at and first(Path(self.die_once)):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.hang_once and images.requires_grad and first(Path(self.hang_once)):
                time.sleep(10_000)
            if self.die_for in prompts:
                os.kill(os.getpid(), signal.SIGKILL)
            if (self.raise_once and first(Path(self.raise_once))) or self.raise_for in prompts:
                raise RuntimeError("the judge is asleep")
            nan = torch.tensor([float("nan") if prompt == self.nan_for else 0.0 for prompt in prompts])
            return -(images - images.new_tensor((0.1, 0.3, 0.9))[:, None, None]).square().mean((1, 2, 3)) + nan

        return reward


def note(folder: str | None, role: str) -> None:
    """Leave a file that says on which node this process runs."""
    if folder:
        import ray

        (Path(folder) / f"{role}-{ray.get_runtime_context().get_node_id()}").touch()


def first(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True
