"""A sweep file: a recipe, the fields to vary, and how to search. Imports pydantic only."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from raydiff import config
from raydiff.config import Config, ConfigError, Run, override, seen_from_here, with_none

_MOST = 256  # combinations of an axis's values that are validated; beyond, each axis by itself
_OWN = ("name", "storage", "tracking")  # fields that the sweep sets
_POPULATIONS = ("pbt", "pb2", "population")


class Axis(Config):
    """The values of one field: exactly one of these."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """Drawn evenly. A value may be a table, e.g. a whole method."""
    grid: tuple[Any, ...] | None = Field(None, min_length=1)
    """Each of them, with whatever the other axes draw."""
    uniform: tuple[float, float] | None = None
    loguniform: tuple[float, float] | None = None
    randint: tuple[int, int] | None = None
    """From the first to below the second."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(self._given) != 1:
            raise ValueError("an axis is one of choice, grid, uniform, loguniform, randint, e.g. {choice = [1, 2, 5]}")
        if self.values is None:
            low, high = self.ends
            if not low < high:
                raise ValueError(f"{self.kind} = [{low:g}, {high:g}]: the first must be the smaller")
            if self.kind == "loguniform" and low <= 0:
                raise ValueError(f"loguniform = [{low:g}, {high:g}]: both must be positive")
        return self

    @property
    def kind(self) -> str:
        return self._given[0]

    @property
    def _given(self) -> list[str]:
        return [name for name in type(self).model_fields if getattr(self, name) is not None]

    @property
    def values(self) -> tuple[Any, ...] | None:
        """Of a finite axis."""
        return self.choice or self.grid

    @property
    def ends(self) -> tuple[float, float]:
        """Of a range."""
        found = self.uniform or self.loguniform or self.randint
        assert found is not None
        return found

    def probes(self) -> tuple[Any, ...]:
        """Values to validate: all of a finite axis, the ends of a range and a number between."""
        if self.values is not None:
            return self.values
        low, high = self.ends
        if self.kind == "randint":
            return tuple(sorted({int(low), int(high) - 1}))
        return low, math.sqrt(low * high) if self.kind == "loguniform" else low + 0.618 * (high - low), high


class Scheduler(Config):
    """Stops trials that fall behind, by Ray Tune's own schedulers, counted in reward queries."""

    kind: Literal["asha", "median"]
    grace: int = Field(ge=1)
    """Reward queries that each trial gets at least."""
    reduction: int = Field(3, ge=2)
    """ASHA lets one in so many go on at each rung."""

    @field_validator("kind", mode="before")
    @classmethod
    def _no_population(cls, kind: Any) -> Any:
        if str(kind).lower().startswith(_POPULATIONS):
            raise ValueError(
                "population-based training hands weights from trial to trial through Tune's checkpoints, and a trial here keeps"
                ' its own, in its workers; use "asha" or "median"'
            )
        return kind


class Penalty(Config):
    """What over-optimisation costs the objective."""

    metric: str = "drift"
    weight: float = Field(gt=0)


class Sweep(Config):
    """Many runs of one recipe. The objective, to be raised, is ± `metric` - penalty.weight × penalty.metric."""

    name: str = Field("sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    recipe: str
    """The run file that all trials share."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Fields of it to set anew, by dotted path."""
    content: Run | None = None
    """What the recipe held, with `set`, when the sweep was made. The file is not read again: this goes with the sweep to its
    trials and to sweep.json. A sweep file has no such key."""
    folder: str | None = None
    """That of the sweep file, where relative paths in `set` and `space` are looked for first. A sweep file has no such key."""
    space: dict[str, Axis] = Field(min_length=1)
    """The fields to vary, by dotted path."""
    search: Literal["random", "grid", "optuna"] = "random"
    trials: int | None = Field(None, ge=1)
    """Trials to draw; with search = "grid" all combinations, and none is given. A `grid` axis multiplies them."""
    seed: int = Field(0, ge=0)
    """Of the search."""
    metric: str = "held_out/total"
    mode: Literal["max", "min"] = "max"
    penalty: Penalty | None = None
    scheduler: Scheduler | None = None
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at once; None: as many as the cluster has room for."""

    @model_validator(mode="before")
    @classmethod
    def _reads_the_recipe(cls, data: Any, info: ValidationInfo) -> Any:
        if not isinstance(data, Mapping) or "content" in data or not isinstance(data.get("recipe"), str):
            return data
        values = data.get("set", {})
        if not isinstance(values, Mapping):
            return data
        for path, value in values.items():
            if isinstance(value, Mapping) and "kind" not in value:
                raise ValueError(
                    f'{path} is a table and would replace the whole of the recipe\'s: quote the path, "{path}.FIELD" = ...'
                )
        folder = (info.context or {}).get("folder")
        data = {**data, "recipe": seen_from_here(data["recipe"], folder), "folder": folder and str(folder)}
        return {**data, "content": override(config.load(data["recipe"]), values, folder=folder)}

    @model_validator(mode="after")
    def _can_work(self) -> Self:
        self._axes_suit_the_search()
        base = self.base()
        for path in self.space:
            if path.split(".")[0] in _OWN:
                raise ValueError(f"space.{path!r}: a sweep gives each trial its own; vary another field")
        measured = {f"held_out/{name}" for name in ("total", *base.rewards.named, *base.evaluate.rewards)}
        measured |= {"drift", "latent_norm"} if base.evaluate.drift_images else set[str]()
        measured |= {"diversity"} if base.evaluate.clip else set[str]()
        for field, metric in (("metric", self.metric), ("penalty.metric", self.penalty.metric if self.penalty else None)):
            if metric is not None and metric not in measured:
                raise ValueError(f"{field} = {metric!r} is not measured; there are {', '.join(sorted(measured))}")
        self.examples()
        return self

    def _axes_suit_the_search(self) -> None:
        ranges = [path for path, axis in self.space.items() if axis.values is None]
        if self.search == "grid":
            if ranges:
                raise ValueError(f'search = "grid" needs lists, and space.{ranges[0]!r} is a range: use choice or grid')
            if self.trials is not None:
                raise ValueError(
                    f'trials = {self.trials}: search = "grid" runs all {self.count} combinations; leave trials out'
                )
        elif self.trials is None:
            raise ValueError(f'trials is missing: search = "{self.search}" needs to know how many to draw')
        if self.search == "optuna" and (grids := [path for path, axis in self.space.items() if axis.grid]):
            raise ValueError(f'search = "optuna" draws each value itself, and space.{grids[0]!r} is a grid: use choice')

    @property
    def count(self) -> int:
        """Trials in all."""
        multiplied = [a.values for a in self.space.values() if a.values and (a.grid or self.search == "grid")]
        return (self.trials or 1) * math.prod(len(values) for values in multiplied)

    def base(self) -> Run:
        """The recipe, as it was when the sweep was made."""
        assert self.content is not None
        return self.content

    def run(self, values: Mapping[str, Any]) -> Run:
        """A trial's run. Raises ConfigError."""
        return override(self.base(), values, folder=Path(self.folder) if self.folder else None)

    def examples(self) -> list[Run]:
        """Runs from all over the space, every listed value among them. Raises ConfigError with each value that cannot work."""
        found, faults = [], dict[str, None]()
        for values in self._probes():
            try:
                run = self.run(values)
                _check_beta(run, self.space)
                found.append(run)
            except ConfigError as error:
                where = ", ".join(f"{path} = {json.dumps(value)}" for path, value in values.items())
                faults |= {f"space: {where}: {error}": None}
        if faults:
            raise ConfigError("\n".join(list(faults)[:5] + [f"... and {len(faults) - 5} more"] * (len(faults) > 5)))
        return found

    def _probes(self) -> Iterator[dict[str, Any]]:
        axes = {path: axis.probes() for path, axis in self.space.items()}
        if math.prod(map(len, axes.values())) <= _MOST:
            yield from (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))
            return
        first = {path: values[0] for path, values in axes.items()}
        yield from ({**first, path: value} for path, values in axes.items() for value in values)

    def objective(self, row: Mapping[str, float]) -> float:
        """What a trial is judged by, of a row of metrics with an evaluation. Raises ConfigError for a metric that it lacks."""
        wanted = [self.metric] + ([self.penalty.metric] if self.penalty else [])
        if lacking := [name for name in wanted if name not in row]:
            raise ConfigError(f"{lacking[0]!r} was not measured; there are {', '.join(sorted(row))}")
        value = row[self.metric] if self.mode == "max" else -row[self.metric]
        return value - (self.penalty.weight * row[self.penalty.metric] if self.penalty else 0)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """A sweep from a TOML file; `path=value` overrides are of the recipe. Relative paths are looked for as in a recipe. Raises
    ConfigError."""
    try:
        tree = with_none(tomllib.loads(Path(path).read_text()))
    except FileNotFoundError:
        raise ConfigError(f"sweep {str(path)!r} does not exist") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    for key in ("content", "folder"):
        if key in tree:
            raise ConfigError(f"{path}: unknown key {key!r}; a sweep file names its recipe")
    given = config.parsed(overrides)
    if given:
        tree["set"] = {**tree.get("set", {}), **given}
    sweep = config.validated(tree, Sweep, folder=Path(path).parent.resolve())
    return sweep.model_copy(update={"content": override(sweep.base(), given)})  # again, as their paths are not the file's


def _check_beta(run: Run, space: Mapping[str, Axis]) -> None:
    """Raise ConfigError for a β that is usual for one method but not for the run's own."""
    usual, beta = run.method.usual_beta, getattr(run.method, "beta", None)
    if usual is None or beta is None or not any(path == "method" or path.startswith("method.") for path in space):
        return
    if not usual.low <= beta <= usual.high:
        raise ConfigError(
            f"method.beta = {beta:g} is not usual for {run.method.kind}, where it is {usual.meaning}:"
            f" set it between {usual.low:g} and {usual.high:g}"
        )
