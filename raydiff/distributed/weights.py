"""Weights on their way from the learner to the generation pool. proof.py compares what arrives."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydiff.distributed import meter
from raydiff.distributed.hangs import Member, Members
from raydiff.session import Session

Arrays = dict[str, np.ndarray]
PROBE = 64  # values of the probe's output that are compared


class SyncError(RuntimeError):
    """A sample came from weights that it must not come from: the run stops before it learns from it."""


def to_numpy(weights: Mapping[str, Tensor]) -> Arrays:
    """Copies in fp32 on the CPU. (Torch tensors pass Ray's object store twenty times slower.)"""
    return {name: w.detach().float().cpu().numpy().copy() for name, w in weights.items()}


def digest(weights: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of names, shapes and bytes, 32 hex digits: equal weights, equal digest, on any machine."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        sha.update(f"{name}{weights[name].shape}{weights[name].dtype}".encode())
        sha.update(np.ascontiguousarray(weights[name]).tobytes())
    return sha.hexdigest()[:32]


@torch.no_grad()
def probe(session: Session) -> np.ndarray:
    """Some values of the denoiser's output on a fixed input, (PROBE,) fp32. Collective under ZeRO-3."""
    policy = session.policy
    x = policy.noise([0])(-1)
    time = policy.schedule.time(policy.schedule.steps // 2, x)
    out = session.model.predict(policy.denoiser, [""], 1)(x, time).float().flatten()
    return out[torch.linspace(0, len(out) - 1, PROBE, device=out.device).long()].cpu().numpy()


def probe_error(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Relative distance of two probes' outputs."""
    return float(np.linalg.norm(theirs - ours) / max(float(np.linalg.norm(ours)), 1e-12))


class WeightStore:
    """The actor between learner and generators: the newest weights, and who may start when.

    One attempt, from a start of the workers to the next, has its own token: what is left of an earlier one gets no answer that
    could mix with it. Weights come by value and are put into the object store here, as an object dies with the worker that
    made it.
    """

    def __init__(self, run: str, updates: int, blocks: int, max_staleness: int) -> None:
        self.run, self.end = run, updates * blocks  # its name, and its number of blocks
        self.blocks, self.max_staleness = blocks, max_staleness  # blocks of an update
        self.changed = asyncio.Condition()
        self.bytes, self.gate_waited = 0, 0.0
        self.pools: dict[str, dict[str, float]] = {}
        self.gauges: dict[str, Any] = {}
        self.said: list[str] = []  # lines for the driver to print
        self._reset(None, 0)

    def _reset(self, attempt: str | None, generators: int) -> None:
        self.attempt, self.generators, self.closed = attempt, generators, False
        self.version: int | None = None
        self.first = 0  # the version that the attempt started from
        self.box: list[Any] = []  # a reference to the weights; in a list Ray hands it on unread
        self.admitted, self.consumed = 0, 0  # blocks
        self.waiting_for: int | None = None  # the version that the gate waits for
        self.members = Members()

    async def open(self, attempt: str, generators: int) -> None:
        """A new attempt begins, with so many generators: nothing is published yet."""
        async with self.changed:
            self._reset(attempt, generators)
            self.changed.notify_all()

    async def current(self) -> tuple[str | None, int]:
        """The attempt and its number of generators."""
        return self.attempt, self.generators

    async def publish(self, attempt: str, version: int, weights: Arrays, consumed: int) -> None:
        """Make `weights` the newest; the first call of an attempt says where it starts.

        `consumed`: blocks that the learners have used.
        Raises RuntimeError when the attempt is not the current one: the store was lost, or another attempt has begun.
        """
        import ray

        if attempt != self.attempt:
            raise RuntimeError("the weight store has lost this attempt; the workers start again")
        async with self.changed:
            if self.version is None:
                self.first = version
            self.version, self.box = version, [ray.put(weights)]
            self.bytes += sum(w.nbytes for w in weights.values())
            self.consumed = consumed
            self.changed.notify_all()

    async def latest(self, attempt: str, have: int | None) -> tuple[int, list[Any]] | None:
        """(version, [ref to the weights]), None when `have` is it. Raises RuntimeError as `publish` does."""
        if attempt != self.attempt or self.version is None:
            raise RuntimeError("the weight store has lost this attempt; the workers start again")
        return None if have == self.version else (self.version, self.box)

    async def beat(self, attempt: str, actor: str, member: Member) -> None:
        """A member of the pipeline lives."""
        if attempt == self.attempt:
            self.members.beat(actor, member)

    async def tell(self, text: str) -> None:
        """A line for the driver to print."""
        self.said.append(text)

    async def look(self, limit: float) -> tuple[dict[str, Any], list[str], list[tuple[Member, str]]]:
        """What the driver wants to know every moment: status, the lines that were told since, and who hangs."""
        said, self.said = self.said, []
        return await self.status(), said, [] if self.closed else self.members.overdue(limit)

    async def report(self, pool: str, counters: dict[str, float]) -> None:
        """Add to a pool's counters."""
        totals = self.pools.setdefault(pool, {})
        for name, value in counters.items():
            totals[name] = totals.get(name, 0) + value

    async def admit(self, attempt: str, n: int) -> int | None:
        """Wait until the n-th block of an attempt may be sampled, and return its ticket; None when no more are wanted.

        Ticket t belongs to update t // blocks, whose samples may be `max_staleness` versions old and no more.
        """
        start = time.monotonic()
        async with self.changed:
            await self.changed.wait_for(lambda: attempt != self.attempt or self.closed or self.version is not None)
            ticket = self.first * self.blocks + n
            needed = ticket // self.blocks - self.max_staleness
            self.waiting_for = needed if ticket < self.end else None
            await self.changed.wait_for(
                lambda: (
                    attempt != self.attempt
                    or self.closed
                    or ticket >= self.end
                    or (self.version is not None and self.version >= needed)
                )
            )
            if attempt != self.attempt or self.closed or ticket >= self.end:
                return None
            self.waiting_for = None
            self.admitted = max(self.admitted, n + 1)
            self.gate_waited += time.monotonic() - start
        return ticket

    async def close(self, attempt: str) -> None:
        """The attempt needs no more blocks."""
        async with self.changed:
            if attempt == self.attempt:
                self.closed = True
                self.changed.notify_all()

    async def status(self) -> dict[str, Any]:
        """Versions and counters, which Ray's metrics get too, as gauges raydiff_pools_*."""
        status = {
            "version": self.version,
            "waiting_for": self.waiting_for,
            "gate_waited": self.gate_waited,
            "blocks_in_flight": self.admitted - self.consumed,
            "bytes_published": self.bytes,
            "pools": {name: dict(counters) for name, counters in self.pools.items()},
        }
        self._gauge(status)
        return status

    def _gauge(self, status: dict[str, Any]) -> None:
        from ray.util.metrics import Gauge

        for name, value in meter.flat(status).items():
            gauge = f"raydiff_{name.replace('/', '_')}"
            if gauge not in self.gauges:
                self.gauges[gauge] = Gauge(gauge, tag_keys=("run",))
            self.gauges[gauge].set(value, tags={"run": self.run})
