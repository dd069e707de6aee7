"""Pictures of a model, with any mixture of adapters, by the sampler that trains: what an evaluation during training draws.

A picture of (weights, prompt, seed, sampler) is one picture, whoever draws it. Where diffusers can walk the same grid, it is
that of the plain pipeline called with `torch.Generator().manual_seed(seed)`. Legend: P prompts, N seeds.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raydiff import __version__, credentials, drafts, pictures, sampling
from raydiff.config import Sampler
from raydiff.contents import Contents, of_locations, of_parts
from raydiff.models.base import Model, ModelConfig

COLUMNS = 8  # of the grid, when there is one prompt or one seed
_OF_A_MODEL = {".safetensors", ".json", ".txt"}  # weights, configs, vocabulary


@dataclass(frozen=True)
class Adapter:
    """A trained adapter and its weight λ; or a folder with a whole denoiser, from full fine-tuning, at weight 1."""

    folder: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """`DIR` or `DIR:weight`. Raises ValueError when the weight is not a finite number."""
        credentials.refuse(text, "adapter")
        folder, colon, weight = text.rpartition(":")
        if not colon or Path(text).exists():
            return cls(text)
        try:
            number = float(weight)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"adapter {text!r}: weight {weight!r} is not a number; write DIR or DIR:weight, e.g. {folder}:0.5")
        return cls(folder, number)


@dataclass(frozen=True)
class Sample:
    """One picture."""

    prompt: str
    seed: int
    image: Any  # PIL


def check(model: ModelConfig, adapters: Sequence[Adapter]) -> None:
    """Raise, before a model is loaded, for an adapter that is not there and for a mixture that makes no sense."""
    model.check_exported([(adapter.folder, adapter.weight) for adapter in adapters])


def load(model: ModelConfig, adapters: Sequence[Adapter] = (), device: torch.device | str = "cpu") -> Model:
    """The model with its adapters. Raises ValueError for an adapter of another base model."""
    check(model, adapters)
    return model.load(device, [(adapter.folder, adapter.weight) for adapter in adapters])


def files(model: ModelConfig, adapters: Sequence[Adapter]) -> dict[str, str]:
    """Digests of the files that a model with adapters is loaded from."""
    folders = {f"adapters.{i}": Path(adapter.folder) for i, adapter in enumerate(adapters)}
    return of_locations({**of_parts({"model": model}), **folders})


def loaded(
    model: ModelConfig, sampler: Sampler, adapters: Sequence[Adapter] = (), device: torch.device | str = "cpu"
) -> tuple[Model, dict[str, Any]]:
    """(`load`, `origin`) of the same files. Raises ConfigError when one is replaced meanwhile, as by a training."""
    held = Contents(files(model, adapters))
    made_from = origin(model, sampler, adapters)
    drawing = load(model, adapters, device)
    held.compare(files(model, adapters))
    return drawing, made_from


def samples(model: Model, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler, batch: int = 8) -> Iterator[Sample]:
    """Every prompt with every seed, P·N pictures."""
    return of_pairs(model, [(prompt, seed) for prompt in prompts for seed in seeds], sampler, batch)


@torch.no_grad()
def of_pairs(model: Model, pairs: Sequence[tuple[str, int]], sampler: Sampler, batch: int = 8) -> Iterator[Sample]:
    """A picture for each (prompt, seed).

    The kernels of another batch size may round a last bit differently; at batch 1 a picture depends on nothing else.
    """
    policy = sampling.policy(model, sampler)
    for start in range(0, len(pairs), batch):
        prompts, seeds = zip(*pairs[start : start + batch], strict=True)
        images = pictures.to_bytes(model.decode(policy.sample(prompts, seeds)[0]))
        yield from (Sample(p, seed, pictures.to_pil(image)) for p, seed, image in zip(prompts, seeds, images, strict=True))


def write(
    drawn: Iterable[Sample],
    folder: str | Path,
    *,
    model: ModelConfig,
    sampler: Sampler,
    adapters: Sequence[Adapter] = (),
    made_from: Mapping[str, Any] | None = None,
) -> Path:
    """Write each picture as it comes, then `images.json` and `grid.png`, whose path is returned.

    A PNG's text fields say what it was made from: prompt, seed, model, adapters, sampler; `made_from`, if `loaded` gave it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made_from = origin(model, sampler, adapters) if made_from is None else made_from
    written, index = [], []
    for i, sample in enumerate(drawn):
        name = file_name(i, sample)
        with drafts.replacing(folder / name) as draft:
            draft.write_bytes(png(sample, made_from))
        written.append(sample)
        index.append({"file": name, "prompt": sample.prompt, "seed": sample.seed})
    with drafts.replacing(folder / "images.json") as draft:
        draft.write_text(json.dumps({**made_from, "images": index}, indent=1, ensure_ascii=False))
    return pictures.save(_grid(written), folder / "grid.png")


def origin(model: ModelConfig, sampler: Sampler, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What pictures are made from, beside prompt and seed: what it takes to make them again."""
    return {
        "model": model.name,
        "adapters": origins(model, adapters),
        "sampler": sampler.model_dump(mode="json", exclude={"detach_negative"}),
        "raydiff": __version__,
    }


def origins(model: ModelConfig, adapters: Sequence[Adapter]) -> list[dict[str, Any]]:
    """Folder, weight and SHA-256 of each adapter."""
    return [{"folder": a.folder, "weight": a.weight, "sha256": model.exported_digest(a.folder)} for a in adapters]


def file_name(i: int, sample: Sample) -> str:
    return f"{i:04d}_{_slug(sample.prompt)}_seed{sample.seed}.png"


def png(sample: Sample, made_from: Mapping[str, Any] | None = None) -> bytes:
    """The picture as a PNG file, which says in text fields what it was made from, if that is given."""
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    texts = {} if made_from is None else {"prompt": sample.prompt, "seed": sample.seed, **made_from}
    for key, value in texts.items():
        info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
    sample.image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def model_digest(model: ModelConfig) -> str | None:
    """SHA-256 over the files of a model that lies in a folder; None for a hub id, which its revision tells.

    Adapters that are merged into it are in its name.
    """
    folder = model.folder()
    return _digest(Path(folder)) if folder and (Path(folder) / "model_index.json").is_file() else None


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's weights, configs and vocabularies."""
    total = hashlib.sha256()
    for file in sorted(f for f in folder.rglob("*") if f.suffix in _OF_A_MODEL):
        total.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _grid(drawn: Sequence[Sample]) -> Any:
    """A row for each prompt, a column for each seed; with one prompt or one seed, rows of COLUMNS."""
    per_prompt = len({sample.seed for sample in drawn})
    columns = per_prompt if 1 < per_prompt < len(drawn) else min(COLUMNS, len(drawn))
    rows = [drawn[i : i + columns] for i in range(0, len(drawn), columns)]
    return pictures.grid(
        [[pixels(sample.image) for sample in row] for row in rows],
        [[f"{sample.prompt}  seed {sample.seed}" for sample in row] for row in rows],
    )


def pixels(image: Any) -> torch.Tensor:
    """PIL -> (3,H,W) uint8."""
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "empty"
