"""Peak memory of one DRaFT-K update against K: flat with checkpointing, because the graph holds one step at a time.

    python benchmarks/memory.py                                   # embedded model, CPU: peak resident memory
    python benchmarks/memory.py --model sd15 --device cuda        # Stable Diffusion 1.5's shapes, random weights

Each K runs in a fresh process; the figure is the peak above what the loaded model holds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import torch

from raydiff.config import Run, override
from raydiff.core.learner import TorchEngine
from raydiff.models import lora
from raydiff.models.base import Lora
from raydiff.models.stable_diffusion import StableDiffusion
from raydiff.session import Session

STEPS = {"embedded": 20, "sd15": 20}
BATCH = {"embedded": 64, "sd15": 2}


def make_run(model: str, k: int, checkpointing: bool) -> Run:
    run = Run.model_validate(
        {
            "model": {"kind": "stable_diffusion"},
            "method": {"kind": "draft_k", "k": k},
            "rewards": {"blue": {"kind": "colour"}},
            "sampler": {"steps": STEPS[model], "guidance": 3.0},
            "batch": {"size": BATCH[model], "micro": BATCH[model]},
        }
    )
    return override(run, {"train.gradient_checkpointing": checkpointing})


def sd15(device: str, dtype: torch.dtype) -> StableDiffusion:
    """Stable Diffusion 1.5's UNet, VAE and text tower with random weights, behind the embedded model's tokenizer."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from raydiff import assets

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(assets.path("pipeline") / "tokenizer", model_max_length=77)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ids)
    blocks = (128, 256, 512, 512)
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=blocks, layers_per_block=2, latent_channels=4, sample_size=512, scaling_factor=0.18215,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        text_encoder=CLIPTextModel(text), tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(device, dtype)  # fmt: skip
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return StableDiffusion(pipe, lora.add(pipe.unet, Lora(), seed=0))


def peak(model: str, k: int, checkpointing: bool, device: str) -> dict[str, Any]:
    """MiB of one update above the loaded model, and the seconds it took."""
    run = make_run(model, k, checkpointing)
    session = Session(run, device)
    if model == "sd15":
        session.model = sd15(device, torch.bfloat16)
        session.policy.model, session.policy.denoiser = session.model, session.model.denoiser
    optimizer, scheduler = session.optimizer()
    engine = TorchEngine(optimizer, scheduler, 1, 1.0)
    before = held(device)
    start = time.perf_counter()
    session.update(engine, 0)
    used = highest(device) - before
    return {
        "model": model,
        "k": k,
        "checkpointing": checkpointing,
        "mib": round(used, 1),
        "seconds": round(time.perf_counter() - start, 2),
    }


def held(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


def highest(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(STEPS), default="embedded")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--plain", action="store_true", help="without checkpointing")
    parser.add_argument("--one", action="store_true", help="measure the single --k in this process")
    args = parser.parse_args()
    if args.one:
        torch.set_num_threads(1)
        print(json.dumps(peak(args.model, args.k[0], not args.plain, args.device)))
        return
    # glibc keeps freed blocks for itself; above this size each tensor goes back to the system, so that the resident peak is
    # that of live tensors and not of a fragmented heap.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    rows = []
    for k in args.k:
        command = [sys.executable, __file__, "--one", "--model", args.model, "--device", args.device, "--k", str(k)]
        done = subprocess.run(command + ["--plain"] * args.plain, capture_output=True, text=True, check=True, env=environment)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    print(f"largest / smallest over K: {max(r['mib'] for r in rows) / min(r['mib'] for r in rows):.3f}")


if __name__ == "__main__":
    main()
