"""Measures what ships, from the exported folders, and writes metrics.json, the grids and the model card.

B batch, P side of a picture. Pictures are (B, 3, P, P) in [-1, 1].
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Generator, Tensor
from transformers import CLIPModel, ResNetForImageClassification

from raydiff.assets.recipe.aesthetic import StyleHead, embed, preference_pairs
from raydiff.assets.recipe.card import write_card
from raydiff.assets.recipe.export import write_json
from raydiff.assets.recipe.pictures import Art, draw, load_art, nearest_colour, random_index
from raydiff.assets.recipe.sampling import GUIDANCE, sample, write_grids
from raydiff.assets.recipe.tokenizer import Texts
from raydiff.assets.recipe.vae import psnr
from raydiff.assets.recipe.words import (
    COLOUR_SHARE,
    COLOURS,
    NAMES,
    STYLE_SHARE,
    STYLES,
    Subject,
    caption,
    holds_out,
    pairs,
    styles_of,
)

SAMPLES = 512
SWEEP = (1.5, 3.0, 5.0)
SWEEP_SAMPLES = 138  # two a name


@dataclass(frozen=True)
class Models:
    pipeline: StableDiffusionPipeline
    clip: CLIPModel
    head: StyleHead
    classifier: ResNetForImageClassification
    style_classifier: ResNetForImageClassification
    texts: Texts


def load_models(folder: Path) -> Models:
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    clip = CLIPModel.from_pretrained(folder / "clip").eval()
    head = StyleHead(clip.config.projection_dim)
    head.load_state_dict(load_file(folder / "aesthetic/model.safetensors"))
    return Models(
        pipeline=pipeline,
        clip=clip,
        head=head.eval(),
        classifier=ResNetForImageClassification.from_pretrained(folder / "classifier").eval(),
        style_classifier=ResNetForImageClassification.from_pretrained(folder / "style_classifier").eval(),
        texts=Texts(folder / "clip"),
    )


@torch.no_grad()
def evaluate(work: Path, target: Path) -> None:
    models = load_models(target)
    metrics = {
        "vae": measure_vae(models.pipeline.vae, work / "art.npz"),
        "judges": measure_judges(models, load_art(work / "art.npz", hold_out=False)),
        "clip": measure_clip(models, work / "art.npz"),
        "aesthetic": measure_head(models, load_art(work / "art.npz", hold_out=False)),
        "generated": measure_generated(models, random_subjects(SAMPLES, seed=0)),
        "held_out": measure_generated(models, held_out_subjects()),
        "guidance": {
            str(guidance): measure_generated(models, random_subjects(SWEEP_SAMPLES, seed=1), guidance=guidance)
            for guidance in SWEEP
        },
        "bytes": {part.name: size_of(part) for part in sorted(target.iterdir()) if part.is_dir()},
    }
    write_json(target / "metrics.json", metrics)
    write_grids(models.pipeline, target)
    write_card(metrics, target / "MODEL_CARD.md")


def random_subjects(count: int, seed: int) -> list[Subject]:
    """Every name in turn; a style and a colour join it as often as in the captions, but no pair that is held out."""
    rng = random.Random(seed)
    subjects = []
    for i in range(count):
        name = NAMES[i % len(NAMES)]
        style = rng.choice([style for style in styles_of(name) if not holds_out(name, style)])
        colour = rng.choice([colour for colour in COLOURS if not holds_out(name, colour)])
        subjects.append(
            Subject(
                name,
                style=style if rng.random() < STYLE_SHARE else None,
                colour=colour if rng.random() < COLOUR_SHARE else None,
            )
        )
    return subjects


def held_out_subjects() -> list[Subject]:
    """Every held-out pair, twice."""
    return [subject for name in NAMES for subject in pairs(name) if subject.held_out for _ in range(2)]


def measure_generated(models: Models, subjects: list[Subject], *, guidance: float = GUIDANCE) -> dict[str, float]:
    """Shares of samples whose name, style and background are what the prompt says, where it says them."""
    pixels = sample(models.pipeline, [caption(subject) for subject in subjects], guidance=guidance)
    names, styles = (judge(pixels).logits.argmax(dim=1).tolist() for judge in (models.classifier, models.style_classifier))
    colours = nearest_colour(pixels).tolist()
    found_styles = [STYLES[got] == s.style for got, s in zip(styles, subjects, strict=True) if s.style]
    found_colours = [list(COLOURS)[got] == s.colour for got, s in zip(colours, subjects, strict=True) if s.colour]
    return {
        "samples": len(subjects),
        "top1": share([NAMES[got] == s.name for got, s in zip(names, subjects, strict=True)]),
        "clip_top1": share([NAMES[got] == s.name for got, s in zip(clip_names(models, pixels), subjects, strict=True)]),
        "style": share(found_styles),
        "background": share(found_colours),
    }


def measure_vae(vae: AutoencoderKL, file: Path) -> dict[str, float]:
    """PSNR over freshly drawn pictures of the art it was trained on, and of the held-out art."""

    def over(art: Art) -> float:
        rng = Generator().manual_seed(1)
        pixels, _ = draw(art, random_index(art, SAMPLES, rng), rng)
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        return round(psnr((decoded - pixels).square().mean().item()), 2)

    return {"psnr": over(load_art(file, hold_out=True)), "psnr_held_out": over(held_out_art(file))}


def held_out_art(file: Path) -> Art:
    art = load_art(file, hold_out=False)
    held = torch.tensor([holds_out(NAMES[n], STYLES[s]) for n, s in zip(art.names, art.styles, strict=True)])
    return Art(art.pixels[held], art.names[held], art.styles[held], art.faces[held], art.colour_odds)


def measure_judges(models: Models, art: Art) -> dict[str, float]:
    rng = Generator().manual_seed(2)
    index = random_index(art, SAMPLES, rng)
    pixels, colours = draw(art, index, rng)
    return {
        "classifier": share(models.classifier(pixels).logits.argmax(dim=1) == art.names[index]),
        "style_classifier": share(models.style_classifier(pixels).logits.argmax(dim=1) == art.styles[index]),
        "background": share(nearest_colour(pixels) == colours),
    }


def measure_clip(models: Models, file: Path) -> dict[str, float]:
    """Zero-shot top-1 over the 69 names."""

    def over(art: Art) -> float:
        rng = Generator().manual_seed(3)
        index = random_index(art, SAMPLES, rng)
        return share(torch.tensor(clip_names(models, draw(art, index, rng)[0])) == art.names[index])

    return {"top1": over(load_art(file, hold_out=True)), "top1_held_out": over(held_out_art(file))}


def clip_names(models: Models, pixels: Tensor) -> list[int]:
    ids = torch.tensor(models.texts([caption(Subject(name)) for name in NAMES]))
    texts = torch.nn.functional.normalize(models.clip.get_text_features(input_ids=ids).pooler_output, dim=1)
    return cast(list[int], (embed(models.clip, pixels) @ texts.T).argmax(dim=1).tolist())


def measure_head(models: Models, art: Art) -> dict[str, float | dict[str, float]]:
    """How often the better style scores higher: pairs with a picture that no training saw, and the rest."""
    rng = Generator().manual_seed(4)
    pixels, _ = draw(art, torch.arange(len(art)).repeat(4), rng)
    scores = models.head(embed(models.clip, pixels)).view(4, -1).mean(dim=0)  # (N,)
    held = torch.tensor([holds_out(NAMES[n], STYLES[s]) for n, s in zip(art.names, art.styles, strict=True)])
    winners, losers = preference_pairs(art).T
    right, unseen = scores[winners] > scores[losers], held[winners] | held[losers]
    by_style = {style: round(scores[art.styles == i].mean().item(), 2) for i, style in enumerate(STYLES)}
    return {
        "pair_accuracy": share(right[~unseen]),
        "pair_accuracy_held_out": share(right[unseen]),
        "held_out_pairs": int(unseen.sum()),
        "mean_score": by_style,
    }


def share(hits: Tensor | list[bool]) -> float:
    return round(torch.as_tensor(hits).float().mean().item(), 4)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
