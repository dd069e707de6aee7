"""The tensors of safetensors files against those of a network, by their headers: what is missing, extra or misshapen.

The loaders of transformers and diffusers fill what a file lacks with random numbers, leave out what they do not know, and go
on. What they rename on the way (old names of attention, prefixes) is theirs to say, so they are asked, with tensors on the
meta device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = {"F64", "F32", "F16", "BF16"}
_NO_WEIGHTS = re.compile(r"(^|\.)position_ids$")  # 0, 1, 2, ...: old CLIP checkpoints carry it, new ones do not


@dataclass(frozen=True)
class Weights:
    """What the headers of one part's files say."""

    name: str  # what errors call it
    shapes: dict[str, tuple[int, ...]]
    sharded: bool
    variant: str | None = None

    def meta(self) -> dict[str, Tensor]:
        """Each tensor without its values."""
        return {key: torch.empty(shape, device="meta") for key, shape in self.shapes.items()}


def of_folder(folder: Path, stem: str, variant: str | None = None) -> Weights:
    """The weights that a loader takes from a folder: `stem.safetensors`, or the shards of its index; of the variant, if there
    are any.

    Raises FileNotFoundError when there is none or a shard is missing, ValueError for a file that is broken, is stored in
    another form than plain floating-point numbers, or does not hold what the index says.
    """
    for end in ([f".{variant}"] if variant else []) + [""]:
        single = folder / f"{stem}{end}.safetensors"
        indices = [folder / f"{stem}.safetensors.index{end}.json", folder / f"{stem}.safetensors{end}.index.json"]
        index = next((file for file in indices if file.is_file()), None)
        if index is not None and single.is_file():
            raise ValueError(f"{index} and {single.name} are both there: remove the one that is not meant")
        if index is not None:
            return _checked(Weights(str(index), _sharded(index), True, end[1:] or None))
        if single.is_file():
            return _checked(Weights(str(single), _header(single), False, end[1:] or None))
    others = sorted({file.name for file in folder.glob(f"{stem}.*") if file.suffix in (".safetensors", ".bin", ".msgpack")})
    found = f", only {', '.join(others)}" if others else ""
    hint = next((m[1] for name in others if (m := re.fullmatch(rf"{re.escape(stem)}\.(\w+)\.safetensors", name))), None)
    remedy = f'; set model.variant to "{hint}"' if hint else "; only safetensors are loaded"
    raise FileNotFoundError(f"{folder / stem}.safetensors is missing{found}{remedy}")


def _sharded(index: Path) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of all shards."""
    try:
        places = read_json(index)["weight_map"]
        files = sorted(set(places.values()))
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is broken: it has no weight_map of tensors to files") from None
    if lost := [file for file in files if not (index.parent / file).is_file()]:
        raise FileNotFoundError(f"{index.parent / lost[0]} is missing, a part of {index.name}")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        header = _header(index.parent / file)
        if wrong := sorted(header.keys() ^ {key for key, place in places.items() if place == file}):
            raise ValueError(f"{index} and {file} do not agree on {_some(wrong)}: the shards are of different checkpoints")
        shapes |= header
    return shapes


def _checked(weights: Weights) -> Weights:
    if not weights.shapes:
        raise ValueError(f"{weights.name} holds no tensors")
    return weights


def _header(file: Path) -> dict[str, tuple[int, ...]]:
    """{tensor: shape}, of position_ids none. Raises ValueError for a file that is cut off or holds no plain floats."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            # Keys come sorted by place, and are sorted by name so that errors are the same for each writer.
            slices = {key: tensors.get_slice(key) for key in sorted(tensors.keys()) if not _NO_WEIGHTS.search(key)}
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            kinds = {key: part.get_dtype() for key, part in slices.items()}
    except SafetensorError as error:
        pointer = file.open("rb").read(8) == b"version "
        raise ValueError(f"{file} is broken: {'it is a Git LFS pointer, not the file' if pointer else error}") from None
    for key, kind in kinds.items():
        if kind not in FLOATS and shapes[key]:  # a single number is a counter, batch normalisation's
            raise ValueError(f"{file}: {key} is stored as {kind}; weights are read in {', '.join(sorted(FLOATS))} only")
    return shapes


def compare(weights: Weights, network: nn.Module) -> None:
    """Raise ValueError unless a diffusers model, best on the meta device, takes each tensor, and each of its own is there.

    Attention's old names (`query`, `proj_attn`, ...) count as what the loader makes of them, which it does in files that are
    not sharded.
    """
    given = weights.meta()
    if not weights.sharded:
        network._fix_state_dict_keys_on_load(given)  # type: ignore[operator]
    own = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
    misshapen = {name: (shapes[name], own[name]) for name in shapes.keys() & own.keys() if shapes[name] != own[name]}
    _refuse(weights.name, own.keys() - shapes.keys(), shapes.keys() - own.keys(), misshapen)
    _refuse_doubles(weights, len(own))


def compare_transformers(weights: Weights, model_class: Any, config: Any) -> None:
    """`compare` for a transformers model class and its config."""
    with quiet():
        network, info = model_class.from_pretrained(
            None, config=config, state_dict=weights.meta(), device_map={"": "meta"}, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
    check_loading(weights.name, info)
    _refuse_doubles(weights, len(network.state_dict()))


def check_loading(name: str, info: Mapping[str, Any]) -> None:
    """Raise ValueError when a loader's own account (`output_loading_info`) says that not all was loaded."""
    _refuse(name, info["missing_keys"], info["unexpected_keys"], {key: tuple(two) for key, *two in info["mismatched_keys"]})


def _refuse(
    name: str, lacking: Iterable[str], extra: Iterable[str], misshapen: Mapping[str, tuple[Sequence[int], Sequence[int]]]
) -> None:
    """Raise ValueError when anything is given, naming the first of each sort. Misshapen: {tensor: (in the file, here)}."""
    extra = [key for key in extra if not _NO_WEIGHTS.search(key)]
    faults = []
    if lacking := sorted(lacking):
        faults.append(f"the weights lack {_some(lacking)}")
    if extra:
        faults.append(f"the network has no {_some(sorted(extra))}")
    if misshapen:
        first = sorted(misshapen)[0]
        found, wanted = (tuple(shape) for shape in misshapen[first])
        others = f", and {len(misshapen) - 1} more differ" if len(misshapen) > 1 else ""
        faults.append(f"{first} is {found} and should be {wanted}{others}")
    if faults:
        raise ValueError(f"{name} does not fit its config.json: {'; '.join(faults)}")


def _refuse_doubles(weights: Weights, expected: int) -> None:
    if len(weights.shapes) > expected:
        raise ValueError(f"{weights.name} holds some tensors twice, by their old names and by their new ones: keep one of each")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError for a file that holds no JSON object, FileNotFoundError when there is none."""
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is broken: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{file} is broken: it holds a {type(tree).__name__}, not an object")
    return tree


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers reports nothing: what it would warn of is raised here."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
