"""Pictures of a model, with any mixture of adapters, through diffusers' own pipeline: what a user of the adapter will see.

A seed gives, bit for bit, the picture of the plain pipeline called with the same batch, scheduler settings and
`torch.Generator().manual_seed(seed)`. Legend: P prompts, N seeds.
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

from raydiff import __version__, pictures
from raydiff.config import Sampler
from raydiff.contents import Contents, of_locations, of_parts
from raydiff.models import lora
from raydiff.models.base import ModelConfig
from raydiff.models.stable_diffusion import load_pipeline

COLUMNS = 8  # of the grid, when there is one prompt or one seed
_OF_A_MODEL = {".safetensors", ".json", ".txt"}  # weights, configs, vocabulary


@dataclass(frozen=True)
class Adapter:
    """A trained adapter and its weight λ; or a folder with a whole `unet`, from full fine-tuning, at weight 1."""

    folder: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Adapter:
        """`DIR` or `DIR:weight`. Raises ValueError when the weight is not a finite number."""
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

    @property
    def whole(self) -> bool:
        return not (Path(self.folder) / lora.WEIGHTS).exists() and (Path(self.folder) / "unet" / "config.json").exists()

    def digest(self) -> str:
        """SHA-256 of its weights."""
        return _digest(Path(self.folder) / "unet") if self.whole else lora.digest(self.folder)


@dataclass(frozen=True)
class Sample:
    """One picture."""

    prompt: str
    seed: int
    image: Any  # PIL


def check(adapters: Sequence[Adapter], sampler: Sampler | None = None) -> None:
    """Raise, before a model is loaded, for an adapter that is not there and for a mixture or a sampler that makes no sense."""
    if sampler is not None and sampler.guidance < 1:
        raise ValueError(f"guidance = {sampler.guidance} is below 1, where diffusers ignores it; 1 turns guidance off")
    for adapter in adapters:
        if not adapter.whole:
            lora.weights_file(adapter.folder)
        elif len(adapters) > 1 or adapter.weight != 1:
            raise ValueError(f"{adapter.folder!r} holds a whole fine-tuned unet: give it alone and at weight 1; only LoRAs mix")


def pipeline(model: ModelConfig, adapters: Sequence[Adapter] = (), device: torch.device | str = "cpu") -> Any:
    """The model's diffusers pipeline with its adapters. Raises ValueError for an adapter of another base model."""
    check(adapters)
    model.preflight()
    pipe = load_pipeline(model, device)  # type: ignore[arg-type]
    if any(adapter.whole for adapter in adapters):
        (adapter,) = adapters
        tuned = type(pipe.unet).from_pretrained(adapter.folder, subfolder="unet", use_safetensors=True, dtype=pipe.unet.dtype)
        pipe.register_modules(unet=tuned.requires_grad_(False).eval().to(device))
    else:
        lora.attach(pipe.unet, [(adapter.folder, adapter.weight) for adapter in adapters])
    return pipe


def files(model: ModelConfig, adapters: Sequence[Adapter]) -> dict[str, str]:
    """Digests of the files that a pipeline is loaded from."""
    folders = {f"adapters.{i}": Path(adapter.folder) for i, adapter in enumerate(adapters)}
    return of_locations({**of_parts({"model": model}), **folders})


def loaded(
    model: ModelConfig, sampler: Sampler, adapters: Sequence[Adapter] = (), device: torch.device | str = "cpu"
) -> tuple[Any, dict[str, Any]]:
    """(`pipeline`, `origin`) of the same files. Raises ConfigError when one is replaced meanwhile, as by a training."""
    held = Contents(files(model, adapters))
    made_from = origin(model.name, sampler, adapters)
    pipe = pipeline(model, adapters, device)
    held.compare(files(model, adapters))
    return pipe, made_from


def scheduler(config: Any, sampler: Sampler) -> Any:
    """DDIM on the pipeline's betas, with the run's spacing and final alpha."""
    from diffusers import DDIMScheduler

    spacing = {"timestep_spacing": sampler.spacing} if sampler.spacing else {}
    ddim = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False, **spacing)
    if sampler.final_alpha is not None:
        ddim.final_alpha_cumprod = torch.tensor(sampler.final_alpha)
    return ddim


def samples(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], sampler: Sampler, batch: int = 8) -> Iterator[Sample]:
    """Every prompt with every seed, P·N pictures."""
    return of_pairs(pipe, [(prompt, seed) for prompt in prompts for seed in seeds], sampler, batch)


def of_pairs(pipe: Any, pairs: Sequence[tuple[str, int]], sampler: Sampler, batch: int = 8) -> Iterator[Sample]:
    """A picture for each (prompt, seed). The pipeline gets the sampler's scheduler.

    The kernels of another batch size may round a last bit differently; at batch 1 a picture depends on nothing else.
    """
    check((), sampler)
    pipe.scheduler = scheduler(pipe.scheduler.config, sampler)
    for start in range(0, len(pairs), batch):
        part = pairs[start : start + batch]
        images = pipe(
            [prompt for prompt, _ in part],
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
            eta=sampler.eta,
            generator=[torch.Generator().manual_seed(seed) for _, seed in part],
        ).images
        yield from (Sample(prompt, seed, image) for (prompt, seed), image in zip(part, images, strict=True))


def write(
    drawn: Iterable[Sample],
    folder: str | Path,
    *,
    model: str,
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
        (folder / name).write_bytes(png(sample, made_from))
        written.append(sample)
        index.append({"file": name, "prompt": sample.prompt, "seed": sample.seed})
    (folder / "images.json").write_text(json.dumps({**made_from, "images": index}, indent=1, ensure_ascii=False))
    return pictures.save(_grid(written), folder / "grid.png")


def origin(model: str, sampler: Sampler, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What pictures are made from, beside prompt and seed: what it takes to make them again."""
    return {
        "model": model,
        "adapters": [{"folder": a.folder, "weight": a.weight, "sha256": a.digest()} for a in adapters],
        "sampler": sampler.model_dump(mode="json", exclude={"detach_negative"}),
        "raydiff": __version__,
    }


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
    folder = Path(getattr(model, "folder", str)())
    return _digest(folder) if (folder / "model_index.json").is_file() else None


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
