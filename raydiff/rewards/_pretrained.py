"""Reward models in transformers' folder format: find them, say which file is missing or broken, load them frozen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import torch

from raydiff import assets
from raydiff.models import checkpoint

Dtype = Literal["float32", "float16", "bfloat16"]

CONFIG = ("config.json",)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PROCESSOR = ("preprocessor_config.json", "processor_config.json")
TOKENIZER = ("tokenizer.json", "vocab.json")


def source(model: str, **embedded: str) -> str:
    """What `from_pretrained` takes for a `model` field: a hub id, a folder, or the asset that a name stands for.

    Raises FileNotFoundError when `model` can only be a folder and is none.
    """
    if model in embedded:
        return str(assets.path(embedded[model]))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return str(folder)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", model):
        raise FileNotFoundError(f"model = {model!r}: there is no such folder")
    return model


def located(model: str, **embedded: str) -> Path | str:
    """A `model` field as `PluginConfig.files` gives it: a folder, or a hub id. Raises as `source` does."""
    name = source(model, **embedded)
    return Path(name) if Path(name).is_dir() else name


def check_folder(name: str, *needed: tuple[str, ...]) -> None:
    """Raise when a local folder lacks a file (of each tuple one is enough) or holds one that cannot be read.

    A name that is no folder is a hub id, which is looked up when the model is built.
    """
    folder = Path(name)
    if not folder.is_absolute() and not folder.is_dir():
        return
    for names in needed:
        if not any((folder / file).is_file() for file in names):
            raise FileNotFoundError(f"{folder / names[0]} is missing" + (f" (or {names[1]})" if names[1:] else ""))
    for file in folder.glob("*.json"):
        tree = read_json(file)
        if file.name == WEIGHTS[1] and (lost := sorted({s for s in tree["weight_map"].values() if not (folder / s).exists()})):
            raise FileNotFoundError(f"{folder / lost[0]} is missing, a part of {file.name}")
    for file in folder.glob("*.safetensors"):
        check_safetensors(file)


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is broken: {error}") from None


def check_safetensors(file: Path) -> None:
    """Raise when the header is no header, or promises more bytes than the file has: a copy that was cut off."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} is broken: {error}") from None


def check_weights(model_class: Any, name: str) -> None:
    """Raise ValueError when the weights in a local folder are not those of its config's network, tensor for tensor.

    A name that is no folder is a hub id, whose weights `load_frozen` compares. Reads headers only.
    """
    from transformers import AutoConfig

    if Path(name).is_dir():
        config = AutoConfig.from_pretrained(name)
        weights = checkpoint.of_folder(Path(name), WEIGHTS[0].removesuffix(".safetensors"))
        checkpoint.compare_transformers(weights, _concrete(model_class, config, name), config)


def _concrete(model_class: Any, config: Any, name: str) -> Any:
    """The class itself, or what an `AutoModelFor...` makes of a config."""
    if (kinds := getattr(model_class, "_model_mapping", None)) is None:
        return model_class
    if type(config) not in kinds:
        raise ValueError(f"{name} is of type {config.model_type!r}, and there is no {model_class.__name__} of it")
    return kinds[type(config)]


def load_frozen(model_class: Any, name: str, dtype: Dtype = "float32") -> Any:
    """A transformers model in eval mode without gradients on its weights.

    Raises ValueError when a weight is missing or extra: transformers would go on with random numbers, or without it.
    """
    check_weights(model_class, name)
    with checkpoint.quiet():
        model, info = model_class.from_pretrained(
            name, use_safetensors=True, dtype=getattr(torch, dtype), output_loading_info=True
        )
    checkpoint.check_loading(name, info)
    return model.eval().requires_grad_(False)
