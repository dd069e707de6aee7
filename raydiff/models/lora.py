"""Adapters: make, save and load them in the format that diffusers reads, with alpha folded in."""

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

from raydiff.models.adapters import WEIGHTS, Layer, read, weights_file
from raydiff.models.base import Lora

__all__ = ["WEIGHTS", "add", "attach", "check_fits", "digest", "disabled", "load", "merge", "save", "weights_file"]

ADAPTER = "default"  # the name of the adapter that is trained


def add(denoiser: Any, lora: Lora, seed: int) -> dict[str, nn.Parameter]:
    """Freeze `denoiser`, add an fp32 adapter to it and return the adapter's parameters by name.

    Raises ValueError when no module has one of the target names, or one that has cannot take an adapter.
    """
    from peft import LoraConfig

    denoiser.requires_grad_(False)
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.rank, target_modules=list(lora.targets), init_lora_weights="gaussian"
    )  # alpha is folded into B, here and at export, since not every reader knows of one
    for target in lora.targets:
        if not any(name == target or name.endswith("." + target) for name, _ in denoiser.named_modules()):
            raise ValueError(f"model.lora.targets: the denoiser has no module named {target!r}; attention has to_q, to_k, to_v")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # every worker starts from the same adapter
        try:
            denoiser.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            raise ValueError(f"model.lora.targets = {list(lora.targets)}: {error}") from None
    parameters = {name: p for name, p in denoiser.named_parameters() if "lora_" in name}
    for p in parameters.values():
        p.data = p.data.float()
        p.requires_grad_(True)
    if lora.alpha is not None and lora.alpha != lora.rank:
        for layer in _layers(denoiser).values():
            layer.lora_B[ADAPTER] = _scaled(layer.lora_B[ADAPTER], lora.alpha / lora.rank)
    return parameters


def _layers(denoiser: nn.Module) -> dict[str, Any]:
    """The modules that the trained adapter changes, by name."""
    return {name: m for name, m in denoiser.named_modules() if ADAPTER in getattr(m, "lora_B", ())}


class _ScaledLinear(nn.Linear):
    """x -> s·W x, with s·W rounded as it is exported, so that the trained model and its adapter agree in every bit."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale)


class _ScaledConv(nn.Conv2d):
    """`_ScaledLinear` for a convolution."""

    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.scale, None)


def _scaled(up: nn.Linear | nn.Conv2d, scale: float) -> nn.Module:
    """`up`, an adapter's B without bias, with its output times `scale`; the parameter stays the same one."""
    made: _ScaledLinear | _ScaledConv
    if isinstance(up, nn.Linear):
        made = _ScaledLinear(up.in_features, up.out_features, bias=False, device="meta")
    else:
        made = _ScaledConv(up.in_channels, up.out_channels, 1, bias=False, device="meta")
    made.weight, made.scale = up.weight, scale
    return made


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
    """Write the adapter whose tensors are `state` ({parameter name: tensor}) for `pipe.load_lora_weights(folder)`.

    alpha / rank is multiplied into B: not every reader knows of an alpha, and each takes it to be the rank then.
    """
    from peft.utils import get_peft_model_state_dict

    scales = {
        f"{name}.lora_B.{ADAPTER}.weight": getattr(m.lora_B[ADAPTER], "scale", 1.0) for name, m in _layers(denoiser).items()
    }
    folded = {name: tensor if scales.get(name, 1.0) == 1 else tensor * scales[name] for name, tensor in state.items()}
    layers = get_peft_model_state_dict(denoiser, state_dict=folded, adapter_name=ADAPTER)
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
    layers = {str(folder): read(denoiser, folder) for folder, _ in adapters}
    used = sorted((digest(folder), weight, str(folder)) for folder, weight in adapters if weight != 0)
    names = [f"{ADAPTER}_{i}" for i in range(len(used))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is wanted
        for name, (_, _, folder) in zip(names, used, strict=True):
            _attach(denoiser, name, layers[folder])
    if used:
        denoiser.set_adapters(names, [weight for _, weight, _ in used])


def _attach(denoiser: Any, name: str, layers: Mapping[str, Layer]) -> None:
    """Add an adapter by name, and see that each tensor and alpha arrived. Raises RuntimeError for the first that did not."""
    state = {f"{m}.lora_A.weight": layer.down for m, layer in layers.items()}
    state |= {f"{m}.lora_B.weight": layer.up for m, layer in layers.items()}
    denoiser.load_lora_adapter(state, prefix=None, adapter_name=name)
    for module, layer in layers.items():
        part = denoiser.get_submodule(module)
        part.lora_alpha[name] = layer.alpha  # diffusers was told of none, and took the rank
        part.set_scale(name, 1.0)
        for half, given in ((part.lora_A[name].weight, layer.down), (part.lora_B[name].weight, layer.up)):
            if not torch.equal(half.detach(), given.to(half)):
                raise RuntimeError(f"diffusers did not load the adapter's tensors of {module}")
            half.data = given.to(half.device, torch.float32)  # as `add` trains it, whatever the base's dtype
        if part.scaling[name] != layer.scale:
            raise RuntimeError(f"{module} runs its adapter at {part.scaling[name]}, and alpha / rank is {layer.scale}")


def merge(denoiser: Any, adapters: Sequence[str | Path]) -> None:
    """Add adapters to the weights of `denoiser` for good, as `attach` sums them. Raises what `attach` raises."""
    if adapters:
        attach(denoiser, [(folder, 1.0) for folder in adapters])
        denoiser.fuse_lora()
        denoiser.unload_lora()


def load(denoiser: Any, adapter: str | Path) -> None:
    """Put an exported adapter's weights into the adapter that `add` made: evaluate a trained one, or go on from it.

    Another alpha is made up for in B. Raises ValueError when its rank or targets are not those of this adapter.
    """
    layers, own = read(denoiser, adapter), _layers(denoiser)
    given = {module: (layer.down.shape, layer.up.shape) for module, layer in layers.items()}
    if given != {m: (part.lora_A[ADAPTER].weight.shape, part.lora_B[ADAPTER].weight.shape) for m, part in own.items()}:
        raise ValueError(
            f"adapter {str(adapter)!r} has another rank or targets than model.lora"
            f" (rank {denoiser.peft_config[ADAPTER].r}): set model.lora to the adapter's"
        )
    with torch.no_grad():
        for module, layer in layers.items():
            up = own[module].lora_B[ADAPTER]
            own[module].lora_A[ADAPTER].weight.copy_(layer.down)
            up.weight.copy_(layer.up.float() * (layer.scale / getattr(up, "scale", 1.0)))


def digest(adapter: str | Path) -> str:
    """SHA-256 of an adapter's file."""
    return hashlib.sha256(weights_file(adapter).read_bytes()).hexdigest()


def check_fits(denoiser: nn.Module, adapter: str | Path) -> None:
    """Raise ValueError when an adapter's file is broken, for another base model or of a kind that is not run,
    FileNotFoundError when there is none."""
    read(denoiser, adapter, values=False)


def _plain(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True
