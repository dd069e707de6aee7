"""Adapters: make, save and load them in the format that diffusers reads, with alpha kept."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from raydiff.models.base import Lora

ADAPTER = "default"  # the name of the adapter that is trained
WEIGHTS = "pytorch_lora_weights.safetensors"


def add(denoiser: nn.Module, lora: Lora, seed: int) -> dict[str, nn.Parameter]:
    """Freeze `denoiser`, add an fp32 adapter to it and return the adapter's parameters by name.

    Raises ValueError when no module has one of the target names.
    """
    from peft import LoraConfig

    denoiser.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha or lora.rank, target_modules=list(lora.targets), init_lora_weights="gaussian"
    )
    for target in lora.targets:
        if not any(name == target or name.endswith("." + target) for name, _ in denoiser.named_modules()):
            raise ValueError(f"model.lora.targets: the denoiser has no module named {target!r}; attention has to_q, to_k, to_v")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # every worker starts from the same adapter
        denoiser.add_adapter(config, adapter_name=ADAPTER)
    parameters = {name: p for name, p in denoiser.named_parameters() if "lora_" in name}
    for p in parameters.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    return parameters


@contextmanager
def disabled(denoiser: nn.Module) -> Iterator[None]:
    """Inside, the adapter is off.

    Switching adapters also clears or sets requires_grad; it is put back, or a backward pass after this would silently train
    nothing.
    """
    flags = {name: p.requires_grad for name, p in denoiser.named_parameters()}
    denoiser.disable_adapters()
    try:
        yield
    finally:
        denoiser.enable_adapters()
        for name, p in denoiser.named_parameters():
            p.requires_grad_(flags[name])


def save(denoiser: nn.Module, folder: Path, state: Mapping[str, Tensor], pipeline: type) -> None:
    """Write the adapter whose tensors are `state` ({parameter name: tensor}) for `pipe.load_lora_weights(folder)`."""
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(denoiser, state_dict=dict(state), adapter_name=ADAPTER)
    config = denoiser.peft_config[ADAPTER].to_dict()
    pipeline.save_lora_weights(  # type: ignore[attr-defined]
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata={k: v for k, v in config.items() if _plain(v)}
    )


def check_fits(denoiser: nn.Module, adapter: str | Path) -> None:
    """Raise ValueError when an adapter file was trained on another base model, FileNotFoundError when there is none."""
    from safetensors import safe_open

    file = Path(adapter) / WEIGHTS if Path(adapter).is_dir() else Path(adapter)
    if not file.is_file():
        raise FileNotFoundError(f"adapter {str(adapter)!r}: there is no {WEIGHTS}; give the folder that a run exported")
    shapes = {name: tuple(m.weight.shape) for name, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 -- safe_open is not a mapping
            module, _, part = key.removeprefix("unet.").partition(".lora_")
            shape = tensors.get_slice(key).get_shape()
            base = shapes.get(module)
            if base is None:
                raise ValueError(f"adapter {file} is for another base model: this one has no layer {module!r}")
            inner = shape[1] if part.startswith(("A", "down")) else shape[0]
            if inner != (base[1] if part.startswith(("A", "down")) else base[0]):
                raise ValueError(f"adapter {file} is for another base model: {module} is {base} here, {part} is {tuple(shape)}")


def _plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return isinstance(value, set)
    return True
