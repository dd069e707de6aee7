"""What is compared: tasks, methods with their tuned settings, and how these were found. Read from a TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from raydiff.config import Config, ConfigError, Run, override, with_none

FILE = Path(__file__).with_name("settings.toml")


class Task(Config):
    """A reward to raise, and how far."""

    title: str
    rewards: dict[str, Any]
    """What is trained on, as `[rewards.NAME]` of a run file."""
    thresholds: tuple[float, ...] = Field(min_length=1)
    """Mean held-out rewards whose price is compared, ascending; chosen before the comparison is run."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if list(self.thresholds) != sorted(set(self.thresholds)):
            raise ValueError(f"thresholds = {list(self.thresholds)} must ascend")
        return self


class Contender(Config):
    """A method with its settings."""

    method: dict[str, Any]
    tuned: dict[str, Any]
    """Fields of the run by dotted path, as one of `candidates` has them."""
    candidates: tuple[dict[str, Any], ...] = Field(min_length=1)
    """All that was tried."""
    updates: int = Field(ge=1)
    every: int = Field(ge=1)
    """Updates between evaluations."""

    @model_validator(mode="after")
    def _was_tried(self) -> Self:
        if self.tuned not in self.candidates:
            raise ValueError(f"tuned = {self.tuned} is none of the candidates; only what was tried can be chosen")
        return self


class Tuning(Config):
    """The budget that every candidate of every method gets."""

    task: str
    seed: int
    """Not one of those compared."""
    passes: int = Field(ge=1)
    """Of the denoiser, an image each; a backward pass counts as two. No candidate has more updates than in the comparison."""
    evaluations: int = Field(8, ge=1)
    """The least of a run with as many updates, evenly spaced; where the last update falls between, one more follows it."""


class Keep(Config):
    """What must be left of a held-out reward for a threshold to count as reached: its mean is at least so much."""

    reward: str
    least: float


class GradientNorm(Config):
    """The table of DRaFT-K's gradient norms."""

    ks: tuple[int, ...]
    steps: int = Field(ge=1)
    """Of the sampler, which is DDIM here."""
    prompts: int = Field(ge=1)


class Quick(Config):
    """A rehearsal: everything is made, and nothing can be concluded from it."""

    share: float = Field(gt=0, le=1)
    """Of each method's updates."""
    seeds: int = Field(ge=1)


class Settings(Config):
    """The whole comparison."""

    base: dict[str, Any]
    """Fields that all runs share, as in a run file."""
    tasks: dict[str, Task]
    methods: dict[str, Contender]
    seeds: tuple[int, ...]
    reference: str
    """The method that the others are divided by."""
    alignment: tuple[str, ...]
    """Names of the held-out rewards that stand beside the trained one."""
    keep: Keep
    gradient_norm: GradientNorm
    tuning: Tuning
    quick: Quick

    @model_validator(mode="after")
    def _fair(self) -> Self:
        tried = {name: len(method.candidates) for name, method in self.methods.items()}
        if len(set(tried.values())) > 1:
            raise ValueError(f"methods: each must be tuned with the same number of candidates; there are {tried}")
        if self.reference not in self.methods:
            raise ValueError(f"reference = {self.reference!r} is none of the methods {', '.join(self.methods)}")
        if self.tuning.task not in self.tasks:
            raise ValueError(f"tuning.task = {self.tuning.task!r} is none of the tasks {', '.join(self.tasks)}")
        if self.tuning.seed in self.seeds:
            raise ValueError(f"tuning.seed = {self.tuning.seed} is one of the seeds that are compared; take another")
        for task in self.tasks:
            for method in self.methods:
                self.run(task, method, self.seeds[0])
        return self

    def run(self, task: str, method: str, seed: int, changes: Mapping[str, Any] | None = None) -> Run:
        """One run of the comparison, with `changes` by dotted path on top. Raises ConfigError."""
        contender = self.methods[method]
        tree = {**self.base, "name": f"{task}-{method}-{seed}", "seed": seed, "rewards": self.tasks[task].rewards}
        fields = {"train.updates": contender.updates, "evaluate.every": contender.every, **contender.tuned}
        return override(Run.model_validate(tree | {"method": contender.method}), fields | dict(changes or {}))

    def rehearsal(self) -> Settings:
        """The same comparison in a few minutes."""
        methods = {}
        for name, m in self.methods.items():
            updates = max(2, round(m.updates * self.quick.share))
            methods[name] = m.model_copy(update={"updates": updates, "every": max(1, updates // 3)})
        norms = self.gradient_norm.model_copy(update={"prompts": 2})
        short = {"seeds": self.seeds[: self.quick.seeds], "gradient_norm": norms}
        return self.model_copy(update={"methods": methods, **short})


def load(path: str | Path = FILE) -> Settings:
    """Raises ConfigError."""
    try:
        return Settings.model_validate(with_none(tomllib.loads(Path(path).read_text())))
    except FileNotFoundError:
        raise ConfigError(f"settings {str(path)!r} do not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ConfigError("\n".join(f"{path}: {line}" for line in lines)) from None
