"""What a process holds in memory, as digests: what it has loaded, whatever its files hold by now.

Two processes that are to draw the same pictures, or give the same rewards, have equal fingerprints, on any device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from raydiff.models.base import Model


def of_model(model: Model) -> dict[str, str]:
    """SHA-256 of each part of a model but its trained weights, and of its settings, by name."""
    trained = {id(p) for p in model.trained().values()}
    networks = {name: of_tensors(_tensors(part), trained) for name, part in model.parts().items()}
    return networks | {f"{name}'s settings": _of_text(value) for name, value in model.settings().items()}


def of_reward(reward: Any) -> str:
    """SHA-256 of the tensors of a reward: of a module's own, of those in the attributes of an object, of those that a function
    encloses. Of a reward without tensors it is the same for all."""
    return of_tensors(_tensors(reward))


def of_tensors(tensors: Mapping[str, Tensor], without: Collection[int] = ()) -> str:
    """SHA-256 over names, shapes, types and bits; tensors whose id is in `without` do not count."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        if id(tensor) not in without:
            total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _tensors(held: Any) -> dict[str, Tensor]:
    """By name: parameters and buffers, those that no checkpoint keeps included."""
    if isinstance(held, nn.Module):
        return dict([*held.named_parameters(), *held.named_buffers()])
    return {f"{name}.{inner}": tensor for name, value in _parts(held) for inner, tensor in _inside(value)}


def _inside(value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield "", value
    elif isinstance(value, nn.Module):
        yield from _tensors(value).items()


def _parts(held: Any) -> Iterator[tuple[str, Any]]:
    """An object's attributes, and what a function encloses."""
    yield from getattr(held, "__dict__", {}).items()
    code, cells = getattr(held, "__code__", None), getattr(held, "__closure__", None) or ()
    for name, cell in zip(getattr(code, "co_freevars", ()), cells, strict=False):
        with suppress(ValueError):  # a name that has no value yet
            yield name, cell.cell_contents


def _of_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
