"""Pictures for training, drawn fresh from the art: flip, scale, shift and background.

B batch, N pictures of the art, S the side it was rendered at, P = PIXELS the side that the models see.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Generator, Tensor

from raydiff.assets.recipe.words import COLOURS, NAMES, STYLES, Subject, holds_out

PIXELS = 32
SCALE = (0.78, 0.94)  # how much of the frame the subject spans
SHIFT = 0.06  # of half the frame
WHITE_SHARE = 0.35  # of the backgrounds; the other colours share the rest
COLOUR_JITTER = 0.02

PALETTE = torch.tensor(list(COLOURS.values())) / 255  # (10, 3)


@dataclass(frozen=True)
class Art:
    pixels: Tensor  # (N, 4, S, S) premultiplied RGBA in [0, 1]
    names: Tensor  # (N,) index into NAMES
    styles: Tensor  # (N,) index into STYLES
    faces: Tensor  # (N,) bool
    colour_odds: Tensor  # (69, 10): how likely each name stands on each colour

    def __len__(self) -> int:
        return len(self.names)

    def subject(self, picture: int, colour: int) -> Subject:
        return Subject(
            name=NAMES[self.names[picture]],
            style=STYLES[self.styles[picture]],
            colour=list(COLOURS)[colour],
            face=bool(self.faces[picture]),
        )


def load_art(file: Path, *, hold_out: bool) -> Art:
    """The rendered art; `hold_out` leaves out the held-out pictures, and the held-out colours of each name."""
    data = np.load(file)
    names, styles = torch.from_numpy(data["names"]), torch.from_numpy(data["styles"])
    kept = torch.tensor([not (hold_out and holds_out(NAMES[n], STYLES[s])) for n, s in zip(names, styles, strict=True)])
    pixels = torch.from_numpy(data["pictures"])[kept].permute(0, 3, 1, 2).float() / 255
    faces = torch.from_numpy(data["faces"])[kept]
    return Art(pixels.contiguous(), names[kept], styles[kept], faces, colour_odds(hold_out=hold_out))


def colour_odds(*, hold_out: bool) -> Tensor:
    """(69, 10) rows that sum to one: white has its share, held-out pairs have none."""
    odds = torch.full((len(NAMES), len(COLOURS)), (1 - WHITE_SHARE) / (len(COLOURS) - 1))
    odds[:, list(COLOURS).index("white")] = WHITE_SHARE
    if hold_out:
        odds *= torch.tensor([[not holds_out(name, colour) for colour in COLOURS] for name in NAMES])
    return odds / odds.sum(dim=1, keepdim=True)


def draw(art: Art, index: Tensor, rng: Generator, *, flip: bool = True) -> tuple[Tensor, Tensor]:
    """Fresh pictures of art[index] (B,): pixels (B, 3, P, P) in [-1, 1] and their background colours (B,)."""
    colour = torch.multinomial(art.colour_odds[art.names[index]], 1, generator=rng).squeeze(1)
    jitter = COLOUR_JITTER * torch.randn(len(index), 3, generator=rng)
    background = (PALETTE[colour] + jitter).clamp(0, 1)
    rgba = place(art.pixels[index], rng, flip=flip)
    pixels = rgba[:, :3] + (1 - rgba[:, 3:]) * background[:, :, None, None]
    return pixels.clamp(0, 1) * 2 - 1, colour


def place(rgba: Tensor, rng: Generator, *, flip: bool) -> Tensor:
    """Flips, scales and shifts (B, 4, S, S) at its full size, then averages down to (B, 4, P, P), which stays sharp."""
    batch = len(rgba)
    zoom = 1 / torch.empty(batch).uniform_(*SCALE, generator=rng)
    mirror = torch.randint(0, 2, (batch,), generator=rng) * 2 - 1 if flip else 1
    affine = torch.zeros(batch, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1] = zoom * mirror, zoom
    affine[:, :, 2] = torch.empty(batch, 2).uniform_(-SHIFT, SHIFT, generator=rng)
    grid = F.affine_grid(affine, list(rgba.shape), align_corners=False)
    placed = F.grid_sample(rgba, grid, align_corners=False, padding_mode="zeros")
    return F.avg_pool2d(placed, rgba.shape[-1] // PIXELS)


def random_index(art: Art, count: int, rng: Generator) -> Tensor:
    return torch.randint(0, len(art), (count,), generator=rng)  # (count,)


def nearest_colour(pixels: Tensor) -> Tensor:
    """The palette colour nearest to the median of the border: (B, 3, P, P) in [-1, 1] -> (B,) index into COLOURS."""
    edge = torch.ones(pixels.shape[-2:], dtype=torch.bool)
    edge[1:-1, 1:-1] = False
    median = pixels[:, :, edge].median(dim=2).values / 2 + 0.5  # (B, 3)
    return torch.cdist(median, PALETTE).argmin(dim=1)


@torch.no_grad()
def degrade(pixels: Tensor, vae: AutoencoderKL, rng: Generator) -> Tensor:
    """Makes (B, 3, P, P) look a little like generated pictures, which scorers judge: decoded, blurred or noisy.

    One third goes through the VAE with noise on its latents, one third is blurred, all get some noise.
    """
    third = len(pixels) // 3
    latents = vae.encode(pixels[:third]).latent_dist.mean
    strength = 0.3 * torch.rand(third, 1, 1, 1, generator=rng) / vae.config.scaling_factor
    decoded = vae.decode(latents + strength * torch.randn(latents.shape, generator=rng)).sample
    halved = F.avg_pool2d(pixels[third : 2 * third], 2)
    blurred = F.interpolate(halved, scale_factor=2, mode="bilinear")
    seen = torch.cat([decoded, blurred, pixels[2 * third :]])
    noise = 0.1 * torch.rand(len(seen), 1, 1, 1, generator=rng) * torch.randn(seen.shape, generator=rng)
    return (seen + noise).clamp(-1, 1)
