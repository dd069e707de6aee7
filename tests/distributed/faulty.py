"""The tiny Stable Diffusion, whose copy in a generator a test can kill, or make deaf to new weights."""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import nn

from raydiff.core.denoise import Predict
from raydiff.models import stable_diffusion
from tests.distributed.steered import first, note


class Plugin(stable_diffusion.Plugin):
    kind: Literal["tests.distributed.faulty"] = "tests.distributed.faulty"  # type: ignore[assignment]
    die_once: str | None = None
    """A file that does not exist yet: the generator that makes it is killed, at its `die_at`-th micro-batch."""
    die_at: int = 3
    sabotage: Literal["none", "copies", "deaf"] = "none"
    """"copies": what is written goes to copies that are thrown away. "deaf": the network keeps computing with its first weights,
    and says it holds the new ones."""

    places: str | None = None
    """A folder that gets a file named by each process's role and node."""

    def build(self, *args: Any, **kwargs: Any) -> stable_diffusion.StableDiffusion:
        model = super().build(*args, **kwargs)
        generating = any(frame.function == "load" and "generate.py" in frame.filename for frame in inspect.stack())
        note(self.places, "generator" if generating else "learner")
        return _Faulty(model, self) if generating else model


class _Faulty(stable_diffusion.StableDiffusion):
    def __init__(self, model: stable_diffusion.StableDiffusion, config: Plugin) -> None:
        self.__dict__.update(model.__dict__)
        self.config, self.calls = config, 0
        self.shown: dict[str, nn.Parameter] = {name: nn.Parameter(p.detach().clone()) for name, p in self._trained.items()}

    def trained(self) -> dict[str, nn.Parameter]:
        if not self.calls:  # until then it is honest, or its fingerprint would tell
            return super().trained()
        if self.config.sabotage == "copies":
            return {name: nn.Parameter(p.detach().clone()) for name, p in self._trained.items()}
        return self.shown if self.config.sabotage == "deaf" else super().trained()

    def predict(self, denoiser: nn.Module, prompts: Sequence[str], guidance: float, detach_negative: bool = False) -> Predict:
        self.calls += 1
        if self.config.die_once and self.calls >= self.config.die_at and first(Path(self.config.die_once)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().predict(denoiser, prompts, guidance, detach_negative)
