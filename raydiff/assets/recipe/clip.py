"""The CLIP: a CLIPModel trained contrastively on fresh pictures and their captions (Radford et al. 2021).

B batch, P side of a picture, D projection.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from raydiff.assets.recipe.pictures import PIXELS, degrade, draw, load_art, random_index
from raydiff.assets.recipe.tokenizer import POSITIONS, Texts
from raydiff.assets.recipe.training import Schedule, rank, train
from raydiff.assets.recipe.vae import load_vae
from raydiff.assets.recipe.words import random_caption

BATCH = 64
WIDTH = 96
SCHEDULE = Schedule(steps=1_200, learning_rate=1e-3, weight_decay=0.05)


def new_clip(texts: Texts) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(texts.tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        bos_token_id=texts.tokenizer.bos_token_id,
        eos_token_id=texts.tokenizer.eos_token_id,
        pad_token_id=texts.tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=PIXELS,
        patch_size=4,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))


def train_clip(work: Path) -> None:
    art, texts, vae = load_art(work / "art.npz", hold_out=True), Texts(work / "tokenizer"), load_vae(work)
    torch.manual_seed(1)
    clip = new_clip(texts)

    def loss(rng: Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        index = random_index(art, BATCH, rng)
        pixels, colours = draw(art, index, rng)
        words = random.Random(step)
        pairs = zip(index.tolist(), colours.tolist(), strict=True)
        captions = [random_caption(art.subject(picture, colour), words) for picture, colour in pairs]
        inputs = {"input_ids": torch.tensor(texts(captions)), "pixel_values": degrade(pixels, vae, rng)}
        return contrastive_loss(clip(**inputs).logits_per_image, captions)

    train({"clip": clip}, loss, SCHEDULE, work / "clip.pt")
    if rank() == 0:
        clip.save_pretrained(work / "clip")


def contrastive_loss(logits: Tensor, captions: list[str]) -> tuple[Tensor, dict[str, float]]:
    """Symmetric cross-entropy over (B, B) logits, picture by text; pictures with the same caption share it."""
    same = torch.tensor([[float(a == b) for b in captions] for a in captions])  # (B, B)
    target = same / same.sum(dim=1, keepdim=True)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    found = same.gather(1, logits.argmax(dim=1, keepdim=True)).mean()
    return loss, {"retrieved": found.item()}
