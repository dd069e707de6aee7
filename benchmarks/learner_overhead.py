"""What raydiff costs over a bare torch loop of the same mathematics: DRaFT-K on the embedded model, steps interleaved.

python benchmarks/learner_overhead.py            # fit's step, in this process
python benchmarks/learner_overhead.py --ray      # the same inside a Ray Train worker with a DeepSpeed engine
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from raydiff.config import Run
from raydiff.core.learner import TorchEngine
from raydiff.data.prompts import tickets
from raydiff.methods import draft_k
from raydiff.models.stable_diffusion import StableDiffusion
from raydiff.rewards import colour
from raydiff.session import Session

RUN = Run.model_validate(
    {
        "model": {"kind": "stable_diffusion"},
        "method": {"kind": "draft_k", "k": 2},
        "rewards": {"blue": {"kind": "colour"}},
        "sampler": {"steps": 10, "guidance": 3.0},
        "batch": {"size": 8, "micro": 4},
        "train": {"updates": 1000},
    }
)


def bare_step(run: Run) -> Callable[[int], float]:
    """DRaFT-K as one would write it by hand around diffusers modules, with no abstraction: returns step(i) -> seconds."""
    session = Session(run)  # for the same initial weights; only its diffusers modules are used below
    assert isinstance(session.model, StableDiffusion)
    assert isinstance(run.method, draft_k.Plugin)
    reward = run.rewards.named["blue"]
    assert isinstance(reward, colour.Plugin)
    pipe, k, accumulation = session.model.pipe, run.method.k, session.geometry.accumulation
    unet, vae, tokenizer, text_encoder = pipe.unet, pipe.vae, pipe.tokenizer, pipe.text_encoder
    parameters = [p for p in unet.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=run.optimizer.lr, weight_decay=0.0, foreach=False)
    bars = pipe.scheduler.alphas_cumprod.double()
    times = (1000 - torch.arange(run.sampler.steps) * 1000 / run.sampler.steps).round().long() - 1
    bar = torch.cat([bars[times], torch.ones(1, dtype=torch.float64)])
    alpha, sigma = bar.sqrt().tolist(), (1 - bar).sqrt().tolist()
    guidance, steps, shape = run.sampler.guidance, run.sampler.steps, session.model.latent_shape
    rgb = torch.tensor(reward.rgb)[:, None]
    frame = torch.ones(32, 32, dtype=torch.bool)
    frame[4:-4, 4:-4] = False

    def embed(texts: list[str]) -> torch.Tensor:
        ids = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        return text_encoder(ids.input_ids)[0]

    def step(index: int) -> float:
        start = time.perf_counter()
        slots = tickets(run, session.train_prompts, index)
        for a in range(accumulation):
            prompts, seeds = zip(*slots[a * run.batch.micro : (a + 1) * run.batch.micro], strict=True)
            with torch.no_grad():
                states = torch.cat([embed([""] * len(prompts)), embed(list(prompts))])
            x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])

            def predict(x: torch.Tensor, t: torch.Tensor, states: torch.Tensor = states) -> torch.Tensor:
                out = unet(torch.cat([x, x]), t, encoder_hidden_states=states).sample
                negative, positive = out.chunk(2)
                return negative + guidance * (positive - negative)

            for i in range(steps):
                with torch.set_grad_enabled(i >= steps - k):
                    eps = checkpoint(predict, x, times[i], use_reentrant=False) if i >= steps - k else predict(x, times[i])
                    x0 = (x - sigma[i] * eps) / alpha[i]
                    x = alpha[i + 1] * x0 + sigma[i + 1] * eps
            images = (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
            reward = -(images[:, :, frame] - rgb).square().mean((1, 2))
            (-reward.mean() / accumulation).backward()
        torch.nn.utils.clip_grad_norm_(parameters, run.optimizer.max_grad_norm)
        adam.step()
        adam.zero_grad(set_to_none=True)
        return time.perf_counter() - start

    return step


def raydiff_step(run: Run) -> Callable[[int], float]:
    """The step of `fit`."""
    session = Session(run)
    optimizer, scheduler = session.optimizer()
    engine = TorchEngine(optimizer, scheduler, session.geometry.accumulation, run.optimizer.max_grad_norm)
    return lambda index: timed(lambda: session.update(engine, index))


def through_ray(repeats: int) -> dict[str, float]:
    """One Ray Train worker with a ZeRO-2 engine; the bare loop runs beside it in the same process."""
    from ray.train import ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from raydiff.distributed.launch import connect

    connect(RUN)
    trainer = TorchTrainer(
        ray_worker,
        train_loop_config={"repeats": repeats},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=1),
    )
    return trainer.fit().return_value


def ray_worker(config: dict[str, int]) -> dict[str, float]:
    """A step is what the training loop does for an update: the update, the ranks' agreement and means, and the report."""
    import ray.train

    from raydiff.distributed.engine import ZeroEngine
    from raydiff.distributed.ranks import Ranks

    torch.set_num_threads(1)
    ranks, session = Ranks(timeout=120), Session(RUN)
    session.agreed = ranks.agreed
    engine = ZeroEngine(session)

    def step(index: int) -> None:
        metrics = session.update(engine, index)
        ray.train.report(ranks.gather(metrics)[0])

    return compare(lambda index: timed(lambda: step(index)), bare_step(RUN), config["repeats"])


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def compare(ours: Callable[[int], float], bare: Callable[[int], float], repeats: int, warm: int = 3) -> dict[str, float]:
    """Interleaved steps, the order of each pair alternating: median seconds of both and the median of the pairs' ratios."""
    pairs = []
    for i in range(warm + repeats):
        if i % 2:
            b, a = bare(i), ours(i)
        else:
            a, b = ours(i), bare(i)
        if i >= warm:
            pairs.append((a, b))
    return {
        "raydiff_s": statistics.median(a for a, _ in pairs),
        "bare_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ray", action="store_true", help="inside a Ray Train worker, ZeRO-2")
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = through_ray(args.repeats) if args.ray else compare(raydiff_step(RUN), bare_step(RUN), args.repeats)
    print(json.dumps({"through": "ray" if args.ray else "fit", **{k: round(v, 4) for k, v in result.items()}}))


if __name__ == "__main__":
    main()
