"""Pictures of a model, with any mixture of adapters, through diffusers' own pipeline: what a user of the adapter will see.

A seed gives, bit for bit, the picture of the plain pipeline called with the same batch, scheduler settings and
`torch.Generator().manual_seed(seed)`. Legend: P prompts, N seeds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raydiff import __version__, pictures
from raydiff.config import Sampler
from raydiff.models import lora
from raydiff.models.base import ModelConfig
from raydiff.models.stable_diffusion import load_pipeline

COLUMNS = 8  # of the grid, when there is one prompt or one seed


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


@dataclass(frozen=True)
class Sample:
    """One picture."""

    prompt: str
    seed: int
    image: Any  # PIL


def check(adapters: Sequence[Adapter]) -> None:
    """Raise, before a model is loaded, for an adapter that is not there and for a mixture that makes no sense."""
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
        lora.attach(pipe, pipe.unet, [(adapter.folder, adapter.weight) for adapter in adapters])
    return pipe


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
    if sampler.guidance < 1:
        raise ValueError(f"guidance = {sampler.guidance} is below 1, where diffusers ignores it; 1 turns guidance off")
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
    drawn: Iterable[Sample], folder: str | Path, *, model: str, sampler: Sampler, adapters: Sequence[Adapter] = ()
) -> Path:
    """Write each picture as it comes, then `images.json` and `grid.png`, whose path is returned.

    A PNG's text fields say what it was made from: prompt, seed, model, adapters, sampler.
    """
    from PIL.PngImagePlugin import PngInfo

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    made_from = origin(model, sampler, adapters)
    written, index = [], []
    for i, sample in enumerate(drawn):
        info = PngInfo()
        for key, value in {"prompt": sample.prompt, "seed": sample.seed, **made_from}.items():
            info.add_itxt(key, value if isinstance(value, str) else json.dumps(value))
        name = f"{i:04d}_{_slug(sample.prompt)}_seed{sample.seed}.png"
        sample.image.save(folder / name, pnginfo=info)
        written.append(sample)
        index.append({"file": name, "prompt": sample.prompt, "seed": sample.seed})
    (folder / "images.json").write_text(json.dumps({**made_from, "images": index}, indent=1, ensure_ascii=False))
    return pictures.save(_grid(written), folder / "grid.png")


def origin(model: str, sampler: Sampler, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """What pictures are made from, beside prompt and seed: what it takes to make them again."""
    return {
        "model": model,
        "adapters": [
            {"folder": a.folder, "weight": a.weight, **({} if a.whole else {"sha256": lora.digest(a.folder)})} for a in adapters
        ],
        "sampler": sampler.model_dump(mode="json", exclude={"detach_negative"}),
        "raydiff": __version__,
    }


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
