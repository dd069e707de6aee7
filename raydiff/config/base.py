"""What every part of the run file is made of: strict tables, plugins that a `kind` names, and paths that are looked for."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    SerializeAsAny,
    ValidationInfo,
    model_validator,
)

from raydiff import credentials

if TYPE_CHECKING:
    from raydiff.config.run import Run


class ConfigError(ValueError):
    """A run file that cannot work: one line per fault, each with the field's dotted path, the value and the way out."""


WHERE_PATHS_ARE = "a relative path in a run file is looked for beside that file, then in the current folder"


def seen_from_here(text: str, folder: Path | None) -> str:
    """A path in a file of `folder`: of what lies there, if it does, as seen from the current folder; else `text`."""
    if folder is None or not text or Path(text).is_absolute() or not os.path.exists(found := folder.absolute() / text):
        return text
    return str(found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found)


def beside(*words: str) -> AfterValidator:
    """Marks a field of text that names a file or folder to be read, or is one of `words`, which name none.

    A relative path that is not beside the run file stays as it is: one from the current folder, a URI or a hub id.
    """

    def located(text: str, info: ValidationInfo) -> str:
        return text if text in words else seen_from_here(text, (info.context or {}).get("folder"))

    return AfterValidator(located)


class Config(BaseModel):
    """Base of every config: frozen, and an unknown key is an error that names the nearest known one; holds no secret."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_keys(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and cls.model_config["extra"] == "forbid":
            unknown = [f"unknown key {key!r}{nearest(key, cls.model_fields)}" for key in data if key not in cls.model_fields]
            if unknown:
                raise ValueError("; ".join(unknown))
        return data

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, data: Any) -> Any:
        """Before any other check: what those say may repeat the value."""
        if secrets := [credentials.fault(field, what) for field, what in credentials.in_tree(data)]:
            raise ValueError("\n".join(secrets))
        return data


class PluginConfig(Config):
    """Base of the configs that a `kind` selects. `kind` is the module's name, and stays in the tree."""

    kind: str

    def check(self, run: Run) -> None:
        """Raise ValueError when this plugin cannot work with the rest of the run. Called while the run is parsed."""

    def preflight(self) -> None:
        """Raise ValueError or OSError when a file or package that this plugin needs is missing. Called before workers start."""

    def files(self) -> dict[str, Path | str]:
        """What decides its results beside its fields, by field, a folder perhaps by its parts: a file or folder; as a string, a
        hub id, "owner/name" or "owner/name@revision". raydiff.contents records what it holds, and compares.

        These are a plugin's own modules; one that reads files adds them: `super().files() | {"weights": Path(self.weights)}`.
        """
        from raydiff.contents import modules

        return modules(type(self))


def plugin(package: str, base: str) -> Any:
    """The field type of a plugin of `package`: a table whose `kind` names the module that holds its class `Plugin`, a subclass
    of the package's `base`."""

    def resolve(value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, Mapping):
            return value
        if "kind" not in value:
            raise ValueError(f'needs kind = "...", one of {", ".join(kinds(package))}, or a module of your own')
        if not _own_code.get():
            _no_code(value)
        return _plugin(package, base, value["kind"]).model_validate(dict(value), context=info.context)

    return Annotated[SerializeAsAny[PluginConfig], BeforeValidator(resolve)]


_own_code = ContextVar("own_code", default=True)


@contextmanager
def no_own_code() -> Iterator[None]:
    """Inside, reading a run, a sweep or rewards refuses a kind that is a module, which is not imported, and a runtime_env."""
    token = _own_code.set(False)
    try:
        yield
    finally:
        _own_code.reset(token)


def _no_code(table: Mapping[str, Any]) -> None:
    """Raise ValueError for a table that names code: a module is imported to be read, and a runtime_env installs packages."""
    if "." in str(table["kind"]):
        raise ValueError(f"kind = {table['kind']!r} is a module, which is code, and --no-own-code refuses it")
    if table.get("runtime_env"):
        raise ValueError(f"runtime_env = {table['runtime_env']!r} runs code, and --no-own-code refuses it")


def _plugin(package: str, base: str, kind: Any) -> Any:
    """The class `Plugin` of a kind. Raises ValueError."""
    known, what = kinds(package), package.rpartition(".")[2].removesuffix("s")
    there = f"there are {', '.join(known)}, and a module of your own is named with its package: my_package.my_{what}"
    own = isinstance(kind, str) and "." in kind and all(part.isidentifier() for part in kind.split("."))
    if kind not in known and not own:
        raise ValueError(f"kind = {kind!r} does not exist{alike(str(kind), known)}; {there}")
    module = kind if own else f"{package}.{kind}"
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"kind = {kind!r} does not exist{alike(kind, known)}; {there}") from None
        raise ValueError(f"kind = {kind!r} cannot be imported: {_one_line(error)}; mend the module") from error
    needed = getattr(importlib.import_module(f"{package}.base"), base)
    if not (isinstance(made := getattr(found, "Plugin", None), type) and issubclass(made, needed)):
        raise ValueError(f"kind = {kind!r} has no class Plugin that is a {package}.base.{base}, so it is no {what}; {there}")
    return made


@functools.cache
def kinds(package: str) -> tuple[str, ...]:
    """The plugins of a package by name: its modules with a class `Plugin`. None of them is imported."""
    found = []
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        spec = importlib.util.find_spec(f"{package}.{module.name}")
        source = spec.loader.get_source(spec.name) if spec and spec.loader else None  # type: ignore[attr-defined]
        if re.search(r"^class Plugin\b", source or "", re.MULTILINE):
            found.append(module.name)
    return tuple(sorted(found))


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


InputPath = Annotated[str, beside("embedded")]
"""The type of a field that names a file or folder to be read; "embedded" is what the package holds."""

if TYPE_CHECKING:  # each value is the Plugin of a module of that package
    from raydiff.methods.base import Method as MethodField
    from raydiff.models.base import ModelConfig as ModelField
    from raydiff.rewards.base import RewardConfig as RewardField
else:
    ModelField = plugin("raydiff.models", "ModelConfig")
    MethodField = plugin("raydiff.methods", "Method")
    RewardField = plugin("raydiff.rewards", "RewardConfig")


def nearest(name: str, known: Iterable[str]) -> str:
    return alike(name, known) or (f"; there are {', '.join(sorted(known))}" if known else "")


def alike(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
