"""The generation pool: the gate that bounds staleness, and the actors that sample."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from raydiff.config import Run
from raydiff.core.rollouts import Rollouts
from raydiff.distributed import rows, weights
from raydiff.session import Scores, Session


class Gate:
    """One ticket in, one ticket out, when its time has come; no row when no more are wanted.

    It stands at the source and not in the generators: there, a crashed generator's replayed block could wait for weights that
    only blocks behind it can bring about.
    """

    def __init__(self, store: Any, attempt: str) -> None:
        self.store, self.attempt = store, attempt

    def __call__(self, block: rows.Columns) -> rows.Columns:
        import ray

        ticket = ray.get(self.store.admit.remote(self.attempt, int(block["n"][0])))
        return {"ticket": np.array([] if ticket is None else [ticket], np.int64)}


class Generator:
    """Samples the micro-batch of a ticket with the newest weights. The base model is loaded once."""

    def __init__(self, run: str, store: Any, attempt: str) -> None:
        self.run = Run.model_validate_json(run)
        self.store, self.attempt = store, attempt
        self.session = Session(self.run, device(self.run.pools.generate.num_cpus), scores=Scores(_no_rewards, _no_rewards))
        method, rewards = self.run.method, self.run.rewards
        self.decodes = method.needs_rewards and rewards.where == "pool"  # pictures for the reward pool
        self.blocks = self.run.batch.size // self.run.batch.micro
        self.version: int | None = None
        self.digest, self.probe = "", np.zeros(0, np.float32)
        self.report: dict[str, float] = {}
        self.free_since = time.monotonic()

    def __call__(self, block: rows.Columns) -> rows.Columns:
        if not len(block["ticket"]):
            return block
        start = time.monotonic()
        self.refresh()
        ticket, calls = int(block["ticket"][0]), self.session.policy.calls
        before = calls.unet_forward
        rollouts = self.sample(ticket)
        images = {"images": self.decoded(rollouts)} if self.decodes else {}
        each = (calls.unet_forward - before) // len(rollouts)
        columns = rows.to_columns(rollouts, ticket, probe=self.probe, unet_forward=each)
        end = time.monotonic()
        self.report = {"images": rollouts.seeds.numel(), "busy": end - start, "idle": start - self.free_since}
        self.free_since = end
        return columns | images

    def sample(self, ticket: int) -> Rollouts:
        rollouts = self.session.sample(*divmod(ticket, self.blocks))
        assert self.version is not None
        return replace(rollouts, version=self.version, digest=self.digest)

    @torch.no_grad()
    def decoded(self, rollouts: Rollouts) -> np.ndarray:
        """Pictures of the clean latents, (B,G,3,H,W) fp32."""
        images = self.session.model.decode(rollouts.at(self.session.policy.schedule.steps))
        return images.float().cpu().numpy().reshape(*rollouts.seeds.shape, *images.shape[1:])

    def refresh(self) -> None:
        """Take up the newest weights in place. The digest is of what the model holds afterwards, not of what came."""
        import ray

        news = ray.get(self.store.latest.remote(self.attempt, self.version, self.report))
        self.report = {}
        if news is None:
            return
        version, (ref,) = news
        arrays = ray.get(ref)
        with torch.no_grad():
            for name, p in self.session.model.trained().items():
                p.copy_(torch.from_numpy(np.array(arrays[name])))
        self.version = version
        self.digest = weights.digest(weights.to_numpy(self.session.model.trained()))
        self.probe = weights.probe(self.session)


def device(num_cpus: float) -> torch.device:
    """The device that Ray gave this actor. On a CPU, its share of threads."""
    import ray

    if ray.get_gpu_ids():
        return torch.device("cuda")
    torch.set_num_threads(max(1, int(num_cpus)))
    return torch.device("cpu")


def _no_rewards(images: Any, prompts: Any) -> Any:
    raise AssertionError("a generator scores nothing")
