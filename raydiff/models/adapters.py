"""Adapter files of other tools, read by diffusers' own converters into one form, or refused with the first tensor that does
not fit.

Legend: r rank, in and out a layer's channels; a convolution's tensors have its kernel too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raydiff.models.checkpoint import FLOATS

WEIGHTS = "pytorch_lora_weights.safetensors"
_KOHYA = "lora_unet_"
_OTHERS = {  # what a tensor's name tells that is no plain LoRA of a UNet
    r"^(text_encoder|lora_te)": "adapts a text encoder, and raydiff runs adapters of the UNet only: export it without",
    r"^(transformer\.|lora_transformer)": "is for a transformer, and raydiff runs UNets only",
    r"^base_model\.model\.": "is in PEFT's own format, whose alpha is in another file: write it with pipe.save_lora_weights",
    r"dora_scale|lora_magnitude_vector": "is DoRA, whose norms diffusers leaves out",
    r"\.hada_": "is LoHa, which diffusers does not read",
    r"\.lokr_": "is LoKr, which is no sum of low-rank matrices",
    r"\.lora_mid\.": "is LoCon with a Tucker core, which diffusers does not read",
    r"\.bias$": "is a bias, and an adapter's sum has none",
}
_FIXED = {  # metadata that says nothing of what the adapter computes, or is read below
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout", "peft_version", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "use_rslora",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """ΔW = alpha/r · up · down."""

    down: Tensor  # (r, in)
    up: Tensor  # (out, r)
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def weights_file(adapter: str | Path) -> Path:
    """The file of an adapter, which is named by its folder or by itself. Raises FileNotFoundError."""
    file = Path(adapter) / WEIGHTS if Path(adapter).is_dir() else Path(adapter)
    if not file.is_file():
        raise FileNotFoundError(f"adapter {str(adapter)!r}: there is no {WEIGHTS}; give the folder that a run exported")
    return file


def read(denoiser: Any, adapter: str | Path, *, values: bool = True) -> dict[str, Layer]:
    """The layers of an adapter's file by the name of the module that they change. Without `values`, on the meta device.

    Reads what diffusers writes and wrote (with the prefix `unet.`, or without it) and kohya's format, alpha included. Raises
    ValueError for a broken file, one for another base model, and one with a tensor that would not land; FileNotFoundError
    when there is none.
    """
    file = weights_file(adapter)
    tensors, metadata = _open(file, values)
    try:
        alphas = {key.removesuffix(".alpha"): _number(key, tensors.pop(key)) for key in [*tensors] if key.endswith(".alpha")}
        origin = {id(tensor): key for key, tensor in tensors.items()}
        halves = _halves(_in_peft_format(tensors, denoiser.config), origin)
        declared = _declared(metadata)
        shapes = _shapes(denoiser)
        layers = {}
        for module, half in halves.items():
            down, up = _pair(module, half, shapes, origin)
            alpha = _alpha_of(origin[id(down)], alphas)
            layers[module] = Layer(down, up, declared(module, len(down)) if alpha is None else alpha)
        if alphas:
            raise ValueError(f": {sorted(alphas)[0] + '.alpha'!r} belongs to no layer of the file")
    except ValueError as error:
        raise ValueError(f"adapter {file}{error}") from None
    return layers


def _open(file: Path, values: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
    """({key: tensor}, metadata). Without values, only those of alpha are read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as content:
            keys = sorted(content.keys())
            kinds = {key: content.get_slice(key).get_dtype() for key in keys if not key.endswith(".alpha")}
            tensors = {
                key: content.get_tensor(key)
                if values or key.endswith(".alpha")
                else torch.empty(content.get_slice(key).get_shape(), device="meta")
                for key in keys
            }
            metadata = content.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"adapter {file} is broken: {error}") from None
    if not tensors:
        raise ValueError(f"adapter {file} holds no tensors")
    if strange := [key for key, kind in kinds.items() if kind not in FLOATS]:
        raise ValueError(
            f"adapter {file}: {strange[0]!r} is stored as {kinds[strange[0]]}; {', '.join(sorted(FLOATS))} are read"
        )
    return tensors, metadata


def _in_peft_format(tensors: Mapping[str, Tensor], unet_config: Any) -> dict[str, Tensor]:
    """{module.lora_A.weight or module.lora_B.weight: tensor} by diffusers' converters, which rename and change no value."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    for key in tensors:
        for pattern, reason in _OTHERS.items():
            if re.search(pattern, key):
                raise ValueError(f": {key!r} {reason}")
    named = dict(tensors)
    if all(key.startswith(_KOHYA) for key in named):
        _check_kohya(named)
        named = StableDiffusionPipeline.lora_state_dict(named, unet_config=unet_config)[0]
    bare = [key for key in named if not key.startswith("unet.")]
    if 0 < len(bare) < len(named):
        raise ValueError(f": {bare[0]!r} does not begin with 'unet.', as others do, so diffusers would leave it out")
    return convert_unet_state_dict_to_peft({key.removeprefix("unet."): tensor for key, tensor in named.items()})


def _check_kohya(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError where diffusers' converter would stop at a key."""
    for key in tensors:
        stem, _, part = key.partition(".")
        other = {"lora_down.weight": "lora_up.weight", "lora_up.weight": "lora_down.weight"}.get(part)
        if other is None:
            raise ValueError(f": {key!r} is no LoRA tensor that diffusers reads")
        if f"{stem}.{other}" not in tensors:
            raise ValueError(f": {key!r} has no {other} beside it")


def _halves(tensors: Mapping[str, Tensor], origin: Mapping[int, str]) -> dict[str, dict[str, Tensor]]:
    """{module: {"A": tensor, "B": tensor}}"""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+)\.lora_([AB])\.weight", key)
        if match is None:
            raise ValueError(f": {origin[id(tensor)]!r} is no LoRA tensor in a format that diffusers reads")
        if (half := found.setdefault(match[1], {})).setdefault(match[2], tensor) is not tensor:
            raise ValueError(f": {origin[id(tensor)]!r} and {origin[id(half[match[2]])]!r} are for the same layer")
    if (landed := sum(map(len, found.values()))) != len(origin):
        raise ValueError(f": only {landed} of its {len(origin)} tensors have layers of their own: some are named twice")
    return found


def _pair(
    module: str, half: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], origin: Mapping[int, str]
) -> tuple[Tensor, Tensor]:
    """(down, up) of a module. Raises ValueError unless both are there and fit it."""
    if module not in shapes:
        key = origin[id(next(iter(half.values())))]
        raise ValueError(f" is for another base model: this one has no layer {module!r}, which {key!r} is for")
    if len(half) != 2:
        raise ValueError(f": {origin[id(next(iter(half.values())))]!r} has no other half")
    base, down, up = shapes[module], half["A"], half["B"]
    rank = down.shape[0] if down.dim() else 0
    wanted = {"A": (rank, *base[1:]), "B": (base[0], rank, *(1 for _ in base[2:]))}
    for name, tensor in (("A", down), ("B", up)):
        if tuple(tensor.shape) != wanted[name] or rank == 0:
            raise ValueError(f" is for another base model: {module} is {base} here, lora_{name} is {tuple(tensor.shape)}")
    return down, up


def _shapes(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """Weights that an adapter can change, by module; adapters that are attached do not count."""
    return {
        name.removesuffix(".base_layer"): tuple(module.weight.shape)
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }


def _number(key: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not math.isfinite(value := float(tensor)):
        raise ValueError(f": {key!r} is not one finite number")
    return value


def _alpha_of(key: str, alphas: dict[str, float]) -> float | None:
    """Take the alpha whose name is the front of a tensor's key; None: there is none."""
    stem = key
    while "." in stem:
        stem = stem.rpartition(".")[0]
        if stem in alphas:
            return alphas.pop(stem)
    return None


def _declared(metadata: Mapping[str, str]) -> Any:
    """(module, rank) -> alpha as a file's metadata say; where they say nothing, alpha = rank, as diffusers has it.

    Raises ValueError for metadata of what is no plain LoRA, or that are at odds with the tensors.
    """
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    try:
        given = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        config = {k.removeprefix("unet."): v for k, v in given.items() if k.startswith("unet.") or "." not in k}
    except (ValueError, AttributeError):
        raise ValueError(": its lora_adapter_metadata are broken") from None
    plain = LoraConfig().to_dict()
    for field, value in config.items():
        if field not in _FIXED and value != plain.get(field) and value:
            raise ValueError(f": its metadata have {field} = {value!r}, which raydiff does not run")
    if (start := config.get("init_lora_weights", True)) not in (True, False, "gaussian", "orthogonal"):
        raise ValueError(f": its metadata have init_lora_weights = {start!r}, which changes the base model too")
    alpha, rank = (metadata.get(f"ss_network_{name}") for name in ("alpha", "dim"))
    if not config and alpha is not None and rank is not None and float(alpha) != float(rank):
        said = f": kohya's metadata have network_alpha = {alpha} of {rank}, and the alpha tensors are missing"
    else:
        said = ""

    def of(module: str, rank: int) -> float:
        if said:
            raise ValueError(said)
        patterns = config.get("alpha_pattern") or {}
        alpha = patterns.get(get_pattern_key(patterns.keys(), module), config.get("lora_alpha", rank))
        return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)

    return of
