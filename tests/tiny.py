"""A random Stable Diffusion in diffusers' own folder format, small enough to build and sample in a second."""

from __future__ import annotations

import string
from pathlib import Path

import torch

WORD_END = "</w>"
POSITIONS = 16
IMAGE = 16  # pixels; the latent is half of it, so nothing here is 64 latents or a factor of 8


def make_pipeline(folder: str | Path, *, seed: int = 0, width: int = 16, size: int = IMAGE) -> Path:
    """Write a StableDiffusionPipeline of random weights: 8×8 latents, 16×16 pictures, a letter tokenizer of 16 positions.

    `width` is the UNet's first channel count; two folders of different widths are two base models. `size` is that of pictures.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = Path(folder)
    tokenizer = make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=POSITIONS, projection_dim=16, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=size,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            mid_block_add_attention=False, scaling_factor=0.5,
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=size // 2, block_out_channels=(width, 2 * width), layers_per_block=1, norm_num_groups=4,
            cross_attention_dim=16, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
    )
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def make_tokenizer():
    """CLIPTokenizer without merges: one token a character."""
    from transformers import CLIPTokenizer

    characters = string.ascii_lowercase + string.digits + ".,-!'"
    pieces = [piece for c in characters for piece in (c, c + WORD_END)]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=POSITIONS)


def make_adapter(pipeline: str | Path, folder: str | Path, *, rank: int = 2, seed: int = 0, alpha: float | None = None) -> Path:
    """Export, as a run would, an adapter with random weights for the pipeline of a folder."""
    from raydiff.models.stable_diffusion import Plugin

    lora = {"rank": rank, "alpha": alpha}
    model = Plugin.model_validate({"path": str(pipeline), "lora": lora}).build(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(p.shape, generator=generator) * 0.3 for name, p in model.trained().items()}
    model.export(folder, state)
    return Path(folder)
