"""Samples of the pipeline, and grids of them."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Generator, Tensor

from raydiff.assets.recipe.words import COLOURS, NAMES, STYLES, Subject, caption, held_out_prompts

STEPS = 20
GUIDANCE = 3.0
BATCH = 64
ENLARGE = 3  # the side of a picture in a grid
GAP = 2
SHOWN = ("cat", "frog", "pig", "fox", "red apple", "cactus", "hamburger", "whale")


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], *, guidance: float = GUIDANCE, seed: int = 0) -> Tensor:
    rng = Generator().manual_seed(seed)
    batches = [
        pipeline(
            prompts[i : i + BATCH],
            num_inference_steps=STEPS,
            guidance_scale=guidance,
            generator=rng,
            output_type="pt",
        ).images
        for i in range(0, len(prompts), BATCH)
    ]
    return torch.cat(batches) * 2 - 1


def write_grids(pipeline: StableDiffusionPipeline, target: Path) -> None:
    grids = {
        "names": ([caption(Subject(name)) for name in NAMES], 10),
        "backgrounds": ([caption(Subject(name, colour=colour)) for name in SHOWN for colour in COLOURS], len(COLOURS)),
        "styles": ([caption(Subject(name, style=style)) for name in SHOWN for style in STYLES], len(STYLES)),
        "held_out": (list(held_out_prompts()), 12),
    }
    for name, (prompts, columns) in grids.items():
        save_grid(sample(pipeline, prompts, seed=3), columns, target / f"grid_{name}.png")


def save_grid(pixels: Tensor, columns: int, file: Path) -> None:
    """(B, 3, P, P) in [-1, 1], row by row."""
    count, _, height, width = pixels.shape
    rows = -(-count // columns)
    cells = torch.full((rows * columns, 3, height * ENLARGE + GAP, width * ENLARGE + GAP), 64, dtype=torch.uint8)
    large = (pixels.clamp(-1, 1) * 127.5 + 127.5).round().byte()
    large = large.repeat_interleave(ENLARGE, dim=2).repeat_interleave(ENLARGE, dim=3)
    cells[:count, :, :-GAP, :-GAP] = large
    sheet = cells.unflatten(0, (rows, columns)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(sheet.numpy()).save(file, optimize=True)
