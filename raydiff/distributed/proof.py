"""The proof that samples come from the weights that they must come from.

A sync that silently does nothing trains on samples of the wrong model while every curve looks alive. So a generator states what
it holds: a digest of its trained weights, one of each part of its base, and the output of its network on a fixed probe; the
learner compares all of them with its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from raydiff.config import Run
from raydiff.distributed.rows import Columns
from raydiff.distributed.weights import SyncError, probe_error

_NOISE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}  # relative, of one network on two devices


class Published:
    """What a learner has published, and holds: what samples may come from."""

    def __init__(self, run: Run, base: Mapping[str, str]) -> None:
        """`base`: digests of what this learner holds and does not train."""
        self.most, self.noise, self.base = run.generation.max_staleness, _NOISE[run.model.dtype], base
        self.digests: dict[int, str] = {}
        self.probes: dict[int, np.ndarray] = {}

    def add(self, version: int, digest: str, probe: np.ndarray) -> None:
        self.digests[version], self.probes[version] = digest, probe
        self.probes = {v: p for v, p in self.probes.items() if v >= version - self.most}

    def check(self, columns: Columns, step: int, expected: int) -> tuple[int, float]:
        """How many versions old a block is, and its relative error on the probe.

        Raises SyncError unless it is the `expected` one, of weights that are young enough and were published, by a generator
        that holds them on the learner's own base.
        """
        ticket, version = int(columns["ticket"][0]), int(columns["version"][0])
        if ticket != expected:
            raise SyncError(f"update {step}: block {ticket} came where {expected} was due; no sample may be lost or used twice")
        staleness = step - version
        if not 0 <= staleness <= self.most:
            raise SyncError(
                f"update {step}: its samples are from weights of version {version}, {staleness} updates old, and"
                f" generation.max_staleness = {self.most}: a generator does not take up new weights"
            )
        theirs = json.loads(str(columns["base"][0]))
        if others := [name for name, digest in self.base.items() if theirs.get(name) != digest]:
            raise SyncError(
                f"update {step}: a generator holds another {', '.join(others)} than the trainer, and no update would change"
                " that: were the model's files replaced for a while, or does its family build another one there?"
            )
        given = str(columns["digest"][0])
        if self.digests.get(version) != given:
            raise SyncError(
                f"update {step}: a generator holds weights of digest {given} and calls them version {version}, which was"
                f" published as {self.digests.get(version)}: the weights did not arrive"
            )
        error = probe_error(columns["probe"][0], self.probes[version])
        if error > self.noise:
            raise SyncError(
                f"update {step}: a generator holds the weights of version {version}, but its network answers as if it did not"
                f" (relative difference {error:.1e} on the probe, of which rounding explains {self.noise:.0e})"
            )
        return staleness, error
