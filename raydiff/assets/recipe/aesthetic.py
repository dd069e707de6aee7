"""The style scorer: a preference model over the CLIP's picture embeddings whose truth is known.

Of two pictures of the same name, the one whose style stands earlier in STYLE_ORDER is preferred; the head learns that
order from such pairs alone (Bradley and Terry 1952). It has the format of LAION's improved-aesthetic-predictor.

B batch, D width of the CLIP's projection.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Generator, Tensor, nn
from transformers import CLIPModel

from raydiff.assets.recipe.pictures import Art, degrade, draw, load_art
from raydiff.assets.recipe.training import Schedule, rank, train
from raydiff.assets.recipe.vae import load_vae
from raydiff.assets.recipe.words import STYLE_ORDER, STYLES

BATCH = 64
SCHEDULE = Schedule(steps=400, learning_rate=1e-3, weight_decay=0.1)
RANK = torch.tensor([STYLE_ORDER.index(style) for style in STYLES])  # 0 is the best liked
MEAN, DEVIATION = 5.5, 2.0  # of the scores over the training pictures, so that they read as marks from 1 to 10


class StyleHead(nn.Module):
    """Linear layers without activations, as LAION's; their places in the list give the names of the weights."""

    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 64),
            nn.Dropout(0.2),
            nn.Linear(64, 32),
            nn.Dropout(0.2),
            nn.Linear(32, 16),
            nn.Dropout(0.1),
            nn.Linear(16, 8),
            nn.Linear(8, 1),
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, D) of unit length -> (B,)."""
        return self.layers(embedding).squeeze(1)


def train_aesthetic(work: Path) -> None:
    art, vae = load_art(work / "art.npz", hold_out=True), load_vae(work)
    clip = CLIPModel.from_pretrained(work / "clip").eval().requires_grad_(False)
    pairs = preference_pairs(art)
    torch.manual_seed(4)
    head = StyleHead(clip.config.projection_dim)

    def loss(rng: Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = pairs[torch.randint(0, len(pairs), (BATCH,), generator=rng)]  # (B, 2): the winner first
        pixels, _ = draw(art, chosen.flatten(), rng)
        shuffled = torch.randperm(len(pixels), generator=rng)  # else `degrade` would treat the pairs unequally
        embeddings = torch.empty(len(pixels), clip.config.projection_dim)
        embeddings[shuffled] = embed(clip, degrade(pixels[shuffled], vae, rng))
        margin = head(embeddings).view(-1, 2) @ torch.tensor([1.0, -1.0])
        return -F.logsigmoid(margin).mean(), {"accuracy": (margin > 0).float().mean().item()}

    train({"head": head}, loss, SCHEDULE, work / "aesthetic.pt")
    if rank() == 0:
        rescale(head, clip, art)
        (work / "aesthetic").mkdir(exist_ok=True)
        save_file(head.state_dict(), work / "aesthetic/model.safetensors")


def preference_pairs(art: Art) -> Tensor:
    """All pairs (winner, loser) of pictures with the same name and different styles, (M, 2)."""
    same = (art.names[:, None] == art.names) & (art.faces[:, None] == art.faces)
    better = RANK[art.styles][:, None] < RANK[art.styles]
    return (same & better).nonzero()


def embed(clip: CLIPModel, pixels: Tensor) -> Tensor:
    """(B, 3, P, P) in [-1, 1] -> picture embeddings (B, D) of unit length."""
    return F.normalize(clip.get_image_features(pixel_values=pixels).pooler_output, dim=1)


@torch.no_grad()
def rescale(head: StyleHead, clip: CLIPModel, art: Art) -> None:
    """Folds an affine map into the last layer that gives the scores MEAN and DEVIATION over the pictures."""
    pixels, _ = draw(art, torch.arange(len(art)).repeat(4), Generator().manual_seed(0))
    scores = head(embed(clip, pixels))
    factor = DEVIATION / scores.std()
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    last.weight.mul_(factor)
    last.bias.copy_((last.bias - scores.mean()) * factor + MEAN)
