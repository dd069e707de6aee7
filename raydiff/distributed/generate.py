"""The generation pool: the gate that bounds staleness, and the actors that sample."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from raydiff import fingerprint
from raydiff.config import ConfigError, Run
from raydiff.contents import Contents
from raydiff.core.rollouts import Rollouts
from raydiff.distributed import rows, weights
from raydiff.distributed.hangs import Beat
from raydiff.placement import GENERATE
from raydiff.session import Scores, Session


class Gate:
    """One ticket in, one ticket out, when its time has come; no row when no more are wanted.

    It stands at the source and not in the generators: there, a crashed generator's replayed block could wait for weights that
    only blocks behind it can bring about.
    """

    def __init__(self, store: Any, attempt: str, limit: float) -> None:
        self.store, self.attempt = store, attempt
        Beat(store, attempt, "gate", limit)

    def __call__(self, block: rows.Columns) -> rows.Columns:
        import ray

        ticket = ray.get(self.store.admit.remote(self.attempt, int(block["n"][0])))
        return {"ticket": np.array([] if ticket is None else [ticket], np.int64)}


class Generator:
    """Samples the micro-batch of a ticket with the newest weights. The base model is loaded once.

    What it loads is compared with `contents`. A fault there answers the first block: a constructor that raises is a lost actor
    to Ray Data.
    """

    def __init__(self, run: str, store: Any, attempt: str, contents: str | None = None) -> None:
        self.run = Run.model_validate_json(run)
        self.store, self.attempt = store, attempt
        self.version: int | None = None
        self.digest, self.probe = "", np.zeros(weights.PROBE, np.float32)
        self.base: dict[str, str] = {}  # digests of what is not trained
        self.beat = Beat(store, attempt, "generator", self.run.train.timeout)
        with self.beat.busy():
            self.load()
            self.fault = fault_of(lambda: contents and Contents.load(contents).check_session(self.session))
        self.free_since = time.monotonic()

    def __call__(self, block: rows.Columns) -> rows.Columns:
        if not len(block["ticket"]):
            return block
        if self.fault is not None:
            raise self.fault
        start = time.monotonic()
        with self.beat.busy():
            self.refresh()
            columns = self.sample(int(block["ticket"][0]))
        end = time.monotonic()
        spent = {"images": columns["seeds"].size, "busy": end - start, "idle": start - self.free_since}
        self.store.report.remote(GENERATE, spent)  # not waited for
        self.free_since = end
        return columns

    def load(self) -> None:
        place = device(self.run.pools.generate.num_cpus)
        self.session = Session(self.run, place, scores=Scores(_no_rewards, _no_rewards))
        self.base = fingerprint.of_model(self.session.model)

    def sample(self, ticket: int) -> rows.Columns:
        """The rows of a ticket, with pictures where the reward pool is to score them."""
        calls, run = self.session.policy.calls, self.run
        before = calls.denoiser_forward
        rollouts = self.session.sample(*divmod(ticket, run.batch.size // run.batch.micro))
        each = (calls.denoiser_forward - before) // len(rollouts)
        columns = self.columns(rollouts, ticket, denoiser_forward=each)
        scored = run.method.needs_rewards and run.rewards.where == "pool"
        return columns | ({"images": self.decoded(rollouts)} if scored else {})

    def columns(self, rollouts: Rollouts, ticket: int, **same: Any) -> rows.Columns:
        """Rows that say which weights they were sampled with."""
        assert self.version is not None
        rollouts = replace(rollouts, version=self.version, digest=self.digest)
        return rows.to_columns(rollouts, ticket, probe=self.probe, base=json.dumps(self.base), **same)

    @torch.no_grad()
    def decoded(self, rollouts: Rollouts) -> np.ndarray:
        """Pictures of the clean latents, (B,G,3,H,W) fp32."""
        images = self.session.model.decode(rollouts.at(self.session.policy.schedule.steps))
        return images.float().cpu().numpy().reshape(*rollouts.seeds.shape, *images.shape[1:])

    def refresh(self) -> None:
        """Take up the newest weights."""
        import ray

        news = ray.get(self.store.latest.remote(self.attempt, self.version))
        if news is None:
            return
        self.version, (ref,) = news
        self.digest, self.probe = self.hold(ray.get(ref))

    def hold(self, arrays: weights.Arrays) -> tuple[str, np.ndarray]:
        """Put weights into the live model. The digest and the probe are of what it holds afterwards, not of what came."""
        with torch.no_grad():
            for name, p in self.session.model.trained().items():
                p.copy_(torch.from_numpy(np.array(arrays[name])))
        return weights.digest(weights.to_numpy(self.session.model.trained())), weights.probe(self.session)


def fault_of(check: Callable[[], Any]) -> ConfigError | None:
    """What a check raises, to be told when somebody asks."""
    try:
        check()
    except ConfigError as error:
        return error
    return None


def device(num_cpus: float) -> torch.device:
    """The device that Ray gave this actor. On a CPU, its share of threads."""
    import ray

    if ray.get_gpu_ids():
        return torch.device("cuda")
    torch.set_num_threads(max(1, int(num_cpus)))
    return torch.device("cpu")


def _no_rewards(images: Any, prompts: Any) -> Any:
    raise AssertionError("a generator scores nothing")
