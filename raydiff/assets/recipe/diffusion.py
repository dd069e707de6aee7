"""The denoiser: a UNet2DConditionModel and its CLIPTextModel, trained together on cached latents.

B batch, C latent channels, h side of the latents, L = 24 positions, D = 128 width of the text, M cached latents.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, CLIPTextModel

from raydiff.assets.recipe.pictures import PIXELS, Art, draw, load_art
from raydiff.assets.recipe.tokenizer import POSITIONS, Texts
from raydiff.assets.recipe.training import Schedule, rank, train, workers
from raydiff.assets.recipe.vae import CHANNELS, load_vae
from raydiff.assets.recipe.words import random_caption

BATCH = 16
WIDTH = 128
DROPPED_CAPTIONS = 0.1  # trains the unconditional half of classifier-free guidance
SNR_CAP = 5.0  # Min-SNR weighting (Hang et al. 2023)
ROUNDS = 40  # fresh drawings of each picture in a process's cache
SCHEDULE = Schedule(steps=8_500, learning_rate=1.5e-3, warmup=200)


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=PIXELS // 4,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # in this class the NUMBER of heads
        norm_num_groups=16,
    )


def new_text_encoder(texts: Texts) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(texts.tokenizer),
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            projection_dim=WIDTH,
            bos_token_id=texts.tokenizer.bos_token_id,
            eos_token_id=texts.tokenizer.eos_token_id,
            pad_token_id=texts.tokenizer.pad_token_id,
        )
    )


def new_scheduler() -> DDIMScheduler:
    """The noise of Stable Diffusion 1."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def train_diffusion(work: Path) -> None:
    art, texts = load_art(work / "art.npz", hold_out=True), Texts(work / "tokenizer")
    cache = cached_latents(work, art)
    torch.manual_seed(5)
    unet, text_encoder = new_unet(), new_text_encoder(texts)
    alphas = new_scheduler().alphas_cumprod  # (1000,)

    def loss(rng: Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        chosen = torch.randint(0, len(cache.latents), (BATCH,), generator=rng)
        words = random.Random(step * workers() + rank())
        captions = [
            "" if words.random() < DROPPED_CAPTIONS else random_caption(art.subject(picture, colour), words)
            for picture, colour in zip(cache.pictures[chosen].tolist(), cache.colours[chosen].tolist(), strict=True)
        ]
        latents = cache.latents[chosen].float()
        noise = torch.randn(latents.shape, generator=rng)
        t = stratified_times(BATCH, len(alphas), rng)
        alpha = alphas[t][:, None, None, None]
        noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        # On a CPU the backward pass of the flash kernel is a third of a step at this size.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embedding = text_encoder(torch.tensor(texts(captions))).last_hidden_state  # (B, L, D)
            predicted = unet(noised, t, embedding).sample.float()
        return min_snr_loss(predicted, noise, alphas[t])

    train({"unet": unet, "text_encoder": text_encoder}, loss, SCHEDULE, work / "diffusion.pt")
    if rank() == 0:
        unet.save_pretrained(work / "unet")
        text_encoder.save_pretrained(work / "text_encoder")


def stratified_times(count: int, steps: int, rng: Generator) -> Tensor:
    """Uniform times, one in each of `count` equal parts of the schedule: a batch's loss varies less than with free ones."""
    parts = (torch.arange(count) + torch.rand(count, generator=rng)) / count
    return (parts * steps).long()  # (count,)


def min_snr_loss(predicted: Tensor, noise: Tensor, alpha: Tensor) -> tuple[Tensor, dict[str, float]]:
    """mean_b min(snr, cap) / snr · |predicted - noise|², predicted and noise (B, C, h, h), alpha (B,) cumulative."""
    snr = alpha / (1 - alpha)
    error = (predicted - noise).square().mean(dim=(1, 2, 3))  # (B,)
    return (snr.clamp(max=SNR_CAP) / snr * error).mean(), {"mse": error.mean().item()}


@dataclass(frozen=True)
class Cache:
    latents: Tensor  # (M, C, h, h) float16, scaled to unit variance
    pictures: Tensor  # (M,) index into the art
    colours: Tensor  # (M,) index into COLOURS


def cached_latents(work: Path, art: Art) -> Cache:
    """Each process draws and encodes pictures of its own, once. Nothing is mirrored: emoji look one way, and a model
    this small learns that sooner than both."""
    file = work / f"latents-{rank()}-of-{workers()}.pt"
    if not file.exists():
        cache = encode_art(work, art, Generator().manual_seed(10 + rank()))
        torch.save(cache, file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)
    return Cache(*torch.load(file, weights_only=True))


@torch.no_grad()
def encode_art(work: Path, art: Art, rng: Generator) -> tuple[Tensor, Tensor, Tensor]:
    vae = load_vae(work)
    latents, pictures, colours = [], [], []
    for index in torch.arange(len(art)).repeat(ROUNDS).split(64):
        pixels, colour = draw(art, index, rng, flip=False)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(pixels).latent_dist.mean
        latents.append((mean.float() * vae.config.scaling_factor).half())
        pictures.append(index)
        colours.append(colour)
    return torch.cat(latents), torch.cat(pictures), torch.cat(colours)
