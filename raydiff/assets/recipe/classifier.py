"""The judges: ResNets that tell the name and the style of a picture.

They share neither architecture, seed nor hold-outs with the CLIP, so a model that was tuned on the CLIP cannot have
learned their mistakes.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from raydiff.assets.recipe.pictures import degrade, draw, load_art, random_index
from raydiff.assets.recipe.training import Schedule, rank, train
from raydiff.assets.recipe.vae import load_vae
from raydiff.assets.recipe.words import NAMES, STYLES

BATCH = 64
SCHEDULE = Schedule(steps=800, learning_rate=2e-3, weight_decay=0.02)


def new_classifier(labels: tuple[str, ...]) -> ResNetForImageClassification:
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[2, 2, 2],
        layer_type="basic",
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return ResNetForImageClassification(config)


def train_classifier(work: Path) -> None:
    train_judge(work, "classifier", NAMES, seed=2)


def train_style_classifier(work: Path) -> None:
    train_judge(work, "style_classifier", STYLES, seed=3)


def train_judge(work: Path, stage: str, labels: tuple[str, ...], seed: int) -> None:
    art, vae = load_art(work / "art.npz", hold_out=False), load_vae(work)
    truth = art.names if labels == NAMES else art.styles
    torch.manual_seed(seed)
    model = new_classifier(labels)

    def loss(rng: Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        index = random_index(art, BATCH, rng)
        pixels, _ = draw(art, index, rng)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(degrade(pixels, vae, rng)).logits.float()
        accuracy = (logits.argmax(dim=1) == truth[index]).float().mean()
        return F.cross_entropy(logits, truth[index], label_smoothing=0.05), {"accuracy": accuracy.item()}

    train({"model": model}, loss, SCHEDULE, work / f"{stage}.pt")
    if rank() == 0:
        model.save_pretrained(work / stage)
