"""Adapters: make, save and load them in the format that diffusers reads, with alpha kept."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raydiff.models.base import Lora

ADAPTER = "default"  # the name of the adapter that is trained
WEIGHTS = "pytorch_lora_weights.safetensors"


def add(denoiser: Any, lora: Lora, seed: int) -> dict[str, nn.Parameter]:
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
def disabled(denoiser: Any) -> Iterator[None]:
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


def save(denoiser: Any, folder: Path, state: Mapping[str, Tensor], pipeline: Any) -> None:
    """Write the adapter whose tensors are `state` ({parameter name: tensor}) for `pipe.load_lora_weights(folder)`."""
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(denoiser, state_dict=dict(state), adapter_name=ADAPTER)
    # Sets are sorted, or two exports of the same weights would be different files.
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in denoiser.peft_config[ADAPTER].to_dict().items()}
    pipeline.save_lora_weights(
        folder, unet_lora_layers=layers, unet_lora_adapter_metadata={k: v for k, v in config.items() if _plain(v)}
    )
    _in_order(folder / WEIGHTS)


def _in_order(file: Path) -> None:
    """Sort the metadata of a safetensors file, which its writer leaves in any order: 8 bytes of length, JSON, tensors."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def attach(denoiser: Any, adapters: Sequence[tuple[str | Path, float]]) -> None:
    """Let `denoiser`, a pipeline's UNet, run as W0 + Σ_j λ_j·ΔW_j of adapters [(folder, λ), ...] (arXiv 2309.17400, §5.3).

    The deltas are summed, never A and B apart. They are added up in the order of the files' digests, so the order given changes
    no bit; at λ = 0 an adapter is left out. Raises what `check_fits` raises.
    """
    for folder, _ in adapters:
        check_fits(denoiser, folder)
    used = sorted((digest(folder), weight, str(folder)) for folder, weight in adapters if weight != 0)
    names = [f"{ADAPTER}_{i}" for i in range(len(used))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        for name, (_, _, folder) in zip(names, used, strict=True):
            file = weights_file(folder)
            denoiser.load_lora_adapter(str(file.parent), weight_name=file.name, adapter_name=name, prefix="unet")
    if used:
        denoiser.set_adapters(names, [weight for _, weight, _ in used])


def merge(denoiser: Any, adapters: Sequence[str | Path]) -> None:
    """Add adapters to the weights of `denoiser` for good, as `attach` sums them. Raises what `attach` raises."""
    if adapters:
        attach(denoiser, [(folder, 1.0) for folder in adapters])
        denoiser.fuse_lora()
        denoiser.unload_lora()


def load(denoiser: Any, adapter: str | Path) -> None:
    """Put an exported adapter's weights into the adapter that `add` made: evaluate a trained one, or go on from it.

    Raises ValueError when its rank, targets or scale are not those of this adapter.
    """
    from safetensors import safe_open

    check_fits(denoiser, adapter)
    own = {name: p for name, p in denoiser.named_parameters() if "lora_" in name}
    with safe_open(weights_file(adapter), "pt") as tensors:
        given = {
            key.removeprefix("unet.").removesuffix(".weight") + f".{ADAPTER}.weight": tensors.get_tensor(key)
            for key in tensors.keys()  # noqa: SIM118 -- safe_open is not a mapping
        }
        config = json.loads((tensors.metadata() or {}).get("lora_adapter_metadata", "{}"))
    mine = denoiser.peft_config[ADAPTER]
    alpha = config.get("unet.lora_alpha", mine.lora_alpha)
    if {n: t.shape for n, t in given.items()} != {n: p.shape for n, p in own.items()} or alpha != mine.lora_alpha:
        raise ValueError(
            f"adapter {str(adapter)!r} has another rank, alpha or targets than model.lora"
            f" (rank {mine.r}, alpha {mine.lora_alpha}): set model.lora to the adapter's"
        )
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def weights_file(adapter: str | Path) -> Path:
    """The file of an adapter, which is named by its folder or by itself. Raises FileNotFoundError."""
    file = Path(adapter) / WEIGHTS if Path(adapter).is_dir() else Path(adapter)
    if not file.is_file():
        raise FileNotFoundError(f"adapter {str(adapter)!r}: there is no {WEIGHTS}; give the folder that a run exported")
    return file


def digest(adapter: str | Path) -> str:
    """SHA-256 of an adapter's file."""
    return hashlib.sha256(weights_file(adapter).read_bytes()).hexdigest()


def check_fits(denoiser: nn.Module, adapter: str | Path) -> None:
    """Raise ValueError when an adapter's file is broken or for another base model, FileNotFoundError when there is none."""
    from safetensors import SafetensorError, safe_open

    file = weights_file(adapter)
    shapes = {
        name.removesuffix(".base_layer"): tuple(m.weight.shape)
        for name, m in denoiser.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }
    try:
        with safe_open(file, "pt") as tensors:
            given = {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 -- not a mapping
    except SafetensorError as error:
        raise ValueError(f"adapter {file} is broken: {error}") from None
    for key, shape in given.items():
        module, lora, part = key.removeprefix("unet.").partition(".lora_")
        if not lora:
            raise ValueError(f"adapter {file}: {key!r} is no LoRA tensor in diffusers' format")
        if module not in shapes:
            raise ValueError(f"adapter {file} is for another base model: this one has no layer {module!r}")
        base, down = shapes[module], part.startswith(("A", "down"))
        if shape[down] != base[down]:  # A is (rank, in), B is (out, rank)
            raise ValueError(f"adapter {file} is for another base model: {module} is {base} here, lora_{part} is {shape}")


def _plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
