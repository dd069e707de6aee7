"""A run from a file and overrides, and back: TOML, JSON, dotted paths."""

from __future__ import annotations

import json
import secrets
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from raydiff import credentials
from raydiff.config.base import Config, ConfigError, nearest, no_own_code
from raydiff.config.run import Rewards, Run

T = TypeVar("T", bound=BaseModel)


class _OnlyRewards(Config):
    rewards: Rewards


def load(path: str | Path, overrides: Sequence[str] = (), *, own_code: bool = True) -> Run:
    """A run from a TOML file (or the JSON of a run) and `path=value` overrides. Raises ConfigError.

    TOML has no null: there as in overrides, the word "none" is None. A relative path of what is read is looked for beside the
    file, then in the current folder; one in an override in the current folder only. A recipe is code: a kind may be any module,
    which reading imports. Without `own_code` it is read as in `no_own_code`.
    """
    _refuse_secrets(f"recipe={path}")
    path = Path(path)
    try:
        text = path.read_text()
        tree = json.loads(text) if path.suffix == ".json" else with_none(tomllib.loads(text))
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.toml"))
        raise ConfigError(f"recipe {str(path)!r} does not exist{nearest(path.name, near)}") from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from None
    given = parsed(overrides)
    with nullcontext() if own_code else no_own_code():
        run: Run = validated(_with(tree, given), folder=path.parent.resolve())
        return override(run, given)  # again, as their paths are not the file's


def rewards(kinds: Mapping[str, str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Rewards {name: kind} without a run, with overrides like `rewards.NAME.FIELD=value`. Raises ConfigError."""
    tree = {"rewards": {name: {"kind": kind} for name, kind in kinds.items()}}
    return dict(validated(_with(tree, parsed(overrides)), _OnlyRewards).rewards.named)


def fresh_name(name: str) -> str:
    """The name of a run or sweep that starts now, which no other has: one never continues another by accident."""
    return f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def override(run: Run, values: Mapping[str, Any], *, folder: Path | None = None) -> Run:
    """The run with some dotted paths set anew, e.g. {"method.k": 2}; everything is validated again. Raises ConfigError.

    `folder`: of the file that `values` stand in, where what they name is looked for first.
    """
    tree = run.model_dump(mode="json")
    if folder is not None:
        located: Run = validated(_with(tree, values), folder=folder)
        seen = located.model_dump(mode="json")
        values = {path: value if (found := _at(seen, path)) is None else found for path, value in values.items()}
    return validated(_with(tree, values))


def flat(run: Run) -> dict[str, Any]:
    """{dotted path: scalar}, what MLflow logs. Lists are one value."""

    def walk(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            yield prefix, value

    return dict(walk("", run.model_dump(mode="json")))


def dump(run: Run) -> str:
    """The run as TOML, which `load` reads back to the same run."""

    def without_null(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_null(inner) for key, inner in value.items()}
        return "none" if value is None else value

    return tomli_w.dumps(without_null(run.model_dump(mode="json")))


def validated(
    tree: Mapping[str, Any],
    kind: type[T] = Run,  # type: ignore[assignment]
    *,
    folder: Path | None = None,
) -> T:
    """The tree as a config; `folder` is that of the file that it stands in. Raises ConfigError."""
    try:
        return kind.model_validate(tree, context={"folder": folder})
    except ValidationError as error:
        raise ConfigError("\n".join(_line(e) for e in error.errors(include_url=False))) from None


def _line(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    given = "" if isinstance(error["input"], Mapping | BaseModel) else f" (got {error['input']!r})"
    return f"{path}: {message}{given}" if path else message


def parsed(overrides: Sequence[str]) -> dict[str, Any]:
    """`path=value` overrides as {dotted path: value}. Raises ConfigError."""
    return dict(_parse(item) for item in overrides)


def _parse(item: str) -> tuple[str, Any]:
    """`path=value`, the value in TOML's syntax; a bare word is a string."""
    _refuse_secrets(item)
    path, equals, text = item.partition("=")
    if not equals or not path:
        raise ConfigError(f"override {item!r} is not path=value, e.g. method.k=2")
    try:
        return path.strip(), with_none(tomllib.loads(f"v = {text}")["v"])
    except tomllib.TOMLDecodeError:
        return path.strip(), None if text == "none" else text


def _refuse_secrets(argument: str) -> None:
    try:
        credentials.refuse_arguments([argument])
    except ValueError as error:
        raise ConfigError(str(error)) from None


def with_none(value: Any) -> Any:
    """A TOML value in which the word "none" is None."""
    if isinstance(value, dict):
        return {key: with_none(inner) for key, inner in value.items()}
    return None if value == "none" else value


def _with(tree: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the tree with dotted paths set; tables on the way are made, and validation judges the result."""
    copy = json.loads(json.dumps(tree))
    for path, value in deepcopy(dict(values)).items():
        *tables, leaf = path.split(".")
        node = copy
        for table in tables:
            node = node.setdefault(table, {})
            if not isinstance(node, dict):
                raise ConfigError(f"{path}: {table!r} is a value, not a table")
        node[leaf] = value
    return copy


def _at(tree: Any, path: str) -> Any:
    """What stands at a dotted path; None also where a table that was set later does not have it."""
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
