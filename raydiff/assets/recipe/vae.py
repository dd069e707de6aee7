"""The autoencoder: an AutoencoderKL with 8 latent channels and f = 4, so that 32 pixels become 8 x 8.

B batch, P side of a picture, C latent channels, h = P / 4.
"""

import math
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor

from raydiff.assets.recipe.pictures import PIXELS, Art, draw, load_art, random_index
from raydiff.assets.recipe.training import Schedule, rank, train

CHANNELS = 8
BATCH = 16
SCHEDULE = Schedule(steps=7_000, learning_rate=2e-3, weight_decay=0.0)
# Pixel losses are means and KL is a sum over 512 numbers: at 3e-6 it costs nothing in sharpness and still rounds the
# latents' distribution.
KL_WEIGHT = 3e-6


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        sample_size=PIXELS,
        mid_block_add_attention=False,
    )


def train_vae(work: Path) -> None:
    art = load_art(work / "art.npz", hold_out=True)
    torch.manual_seed(0)
    vae = new_vae()

    def loss(rng: Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, _ = draw(art, random_index(art, BATCH, rng), rng)
        with torch.autocast("cpu", torch.bfloat16):  # half as fast again as float32 at this size
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        return vae_loss(decoded.float(), pixels, posterior.kl().float().mean())

    train({"vae": vae}, loss, SCHEDULE, work / "vae.pt")
    if rank() == 0:
        vae.register_to_config(scaling_factor=scaling_factor(vae, art))
        vae.save_pretrained(work / "vae")


def vae_loss(decoded: Tensor, pixels: Tensor, kl: Tensor) -> tuple[Tensor, dict[str, float]]:
    """L1, L1 of the gradients (for edges), MSE (for the PSNR) and KL; both pictures (B, 3, P, P)."""
    error = decoded - pixels
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    squared = error.square().mean()
    loss = error.abs().mean() + 0.5 * edges + 2 * squared + KL_WEIGHT * kl
    return loss, {"psnr": psnr(squared.item()), "kl": kl.item()}


def psnr(mean_square: float) -> float:
    """In dB, for pictures in [-1, 1]."""
    return -10 * math.log10(mean_square / 4)


@torch.no_grad()
def scaling_factor(vae: AutoencoderKL, art: Art) -> float:
    """Brings the latents to unit variance, as Stable Diffusion's scaling factor does."""
    rng = Generator().manual_seed(0)
    pixels, _ = draw(art, random_index(art, 1024, rng), rng)
    return 1 / vae.encode(pixels).latent_dist.mean.std().item()


def load_vae(work: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(work / "vae").eval().requires_grad_(False)
