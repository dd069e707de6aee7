"""A run's checkpoints: whole fp32 tensors by name and one JSON, for any number of workers and any ZeRO stage.

    checkpoint_000020/
        parameters.safetensors       the trained weights
        exp_avg.safetensors          Adam's first moments
        exp_avg_sq.safetensors       Adam's second moments
        ema.safetensors              the moving average, where the run has one
        best.safetensors             the best weights so far, where there are any
        checkpoint.json              written last: size and SHA-256 of the others and of itself, and the history

Without checkpoint.json, or with a file of another size or content, the checkpoint does not exist. So a kill, a full disk or a
byte that changes later leaves the checkpoint before it. A run does not use Ray's own index of checkpoints, which is rewritten
in place: a full disk destroys it.

The scheduler's and the moving average's step is the number of updates done, times the optimiser steps of one for the scheduler.
Adam's is the number of optimiser steps less those that loss scaling skipped, which `state` counts (`Session.state`). Samples
follow from run, update and slot, so there is no state of a random generator.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from raydiff import sealed
from raydiff.config import ConfigError, Run, flat
from raydiff.contents import within
from raydiff.core.policy import Calls
from raydiff.distributed.storage import Folder

MAY_CHANGE = (
    "storage",
    "tracking",
    "batch.micro",
    "train.updates",
    "train.stop_when",
    "generation",
    "pools",
    "rewards.where",
    "train.zero_stage",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_failures",
    "train.zero_gradient",
    "train.timeout",
    "train.gradient_checkpointing",
    "evaluate.every",
    "evaluate.batch",
    "evaluate.grid",
    "evaluate.rewards",
    "pairs.cache",
    "evaluate.drift_images",
    "evaluate.clip",
)
"""Fields, or tables of them, that a resumed run may set anew: where and how it runs, not what it computes. The exception is
train.updates, which a linear or cosine learning-rate schedule depends on. evaluate.best stays: the weights that another metric
would have kept are gone."""

_INDEX, _FORMAT = "checkpoint.json", 4
FINISHED = "finished.json"  # in the folder of a run that has made all its updates


class Unusable(ValueError):
    """A checkpoint that is incomplete, or holds something else than was written; says what."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint. The tensors are read when they are asked for."""

    folder: Folder
    next_step: int  # updates done, and so the index of the next
    run: Mapping[str, Any]
    calls: Calls  # over all workers
    seconds: float
    history: list[dict[str, float]]  # the metrics of every update so far
    state: Mapping[str, Any]  # Session.state()
    digests: Mapping[str, str]  # SHA-256 of each file of tensors, when it was written

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """kind: parameters, exp_avg, exp_avg_sq, ema or best. Raises FileNotFoundError."""
        return safetensors.torch.load(self.folder.read(f"{kind}.safetensors"))


def save(
    folder: Folder,
    tensors: Iterable[tuple[str, Mapping[str, Tensor]]],
    *,
    run: Run,
    next_step: int,
    calls: Calls,
    seconds: float,
    history: list[dict[str, float]],
    state: Mapping[str, Any] | None = None,
) -> None:
    """Write one checkpoint, then delete all but the newest `train.keep_checkpoints`. `tensors` yields (kind, {name: tensor}).

    Raises StorageError, and FloatingPointError for a tensor that is not finite; what was there before is then still there.
    """
    mine = _name(next_step)
    place = folder / mine
    folder.delete(mine)  # an incomplete one
    try:
        files = {}
        for kind, group in tensors:
            _require_finite(kind, group)
            data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in group.items()})
            place.write(f"{kind}.safetensors", data)
            files[f"{kind}.safetensors"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        index = {
            "format": _FORMAT, "next_step": next_step, "seconds": seconds, "calls": vars(calls), "files": files,
            "run": run.model_dump(mode="json"), "history": history, "state": state or {},
        }  # fmt: skip
        place.write(_INDEX, sealed.dump(index, indent=1))
    except (OSError, FloatingPointError):
        folder.delete(mine)  # the room that it took is needed
        raise
    # Of a later step is only what was passed over when this run was resumed
    complete = [name for name in _names(folder) if _step(name) <= next_step and read(folder / name)]
    for name in _names(folder):
        if name not in complete[-run.train.keep_checkpoints :]:
            folder.delete(name)


def latest(folder: Folder, told: Callable[[str], object] = warnings.warn) -> Checkpoint | None:
    """The newest checkpoint of a run's folder whose files all hold what was written, which takes reading them.

    `told` hears which newer ones are passed over, and why. Raises ConfigError for one that another version of raydiff wrote.
    """
    for name in reversed(_names(folder)):
        try:
            found = _opened(folder / name)
            _verify(found)
            return found
        except Unusable as error:
            told(f"{folder / name} is passed over: {error}")
    return None


def check_same_run(saved: Mapping[str, Any], run: Run) -> None:
    """Raise ConfigError, with each differing path, when `run` would compute something else than the saved run's JSON."""
    fixed = MAY_CHANGE if run.optimizer.schedule == "constant" else tuple(p for p in MAY_CHANGE if p != "train.updates")
    if differ := differing(saved, run, fixed):
        raise ConfigError(
            "the run to resume was started with another config; set these back, or start a fresh run:\n  " + "\n  ".join(differ)
        )


def differing(saved: Mapping[str, Any], run: Run, may_change: Sequence[str]) -> list[str]:
    """A line for each path in which `run` differs from the saved run's JSON, but for those that may. Raises ConfigError."""
    try:
        before, now = (flat(r) | {"evaluate.best": r.evaluate.best_metric} for r in (Run.model_validate(saved), run))
    except ValidationError as error:
        raise ConfigError(f"the saved run cannot be read by this version of raydiff: {error}") from None
    return [
        f"{path}: {before.get(path)!r} then, {now.get(path)!r} now"
        for path in sorted(before.keys() | now.keys())
        if before.get(path) != now.get(path) and not within(path, may_change)
    ]


def _name(step: int) -> str:
    return f"checkpoint_{step:06d}"


def _step(name: str) -> int:
    return int(name.removeprefix("checkpoint_"))


def _names(folder: Folder) -> list[str]:
    """Of checkpoints, complete or not, in the order of their steps."""
    return sorted((name for name in folder.folders() if re.fullmatch(r"checkpoint_\d+", name)), key=_step)


def _require_finite(kind: str, group: Mapping[str, Tensor]) -> None:
    for name, tensor in group.items():
        if not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(f"no checkpoint is written: {kind} of {name} is not finite; the ones before it stay")


def read(folder: Folder) -> Checkpoint | None:
    """The checkpoint in a folder, None when it is not complete. Its tensors' files are known by their sizes alone."""
    try:
        return _opened(folder)
    except Unusable:
        return None


def _opened(folder: Folder) -> Checkpoint:
    """Raises Unusable; ConfigError for a checkpoint of another format."""
    try:
        text = folder.read(_INDEX)
    except FileNotFoundError:
        raise Unusable(f"{_INDEX}, which is written last, is missing") from None
    try:
        index = sealed.load(text)
    except sealed.BrokenSeal as error:
        if (other := _older(text)) is not None:
            raise ConfigError(
                f"{folder}: this checkpoint has format {other}, and this raydiff reads {_FORMAT}; go on with the raydiff that"
                " wrote it, or start a fresh run"
            ) from None
        raise Unusable(f"{_INDEX} {error}") from None
    if index["format"] != _FORMAT:
        raise ConfigError(f"{folder}: this checkpoint has format {index['format']}, and this raydiff reads {_FORMAT}")
    for file, about in index["files"].items():
        if (size := folder.size(file)) != about["size"]:
            there = "is missing" if size is None else f"has {size} bytes"
            raise Unusable(f"{file} {there}, and {about['size']} were written")
    return Checkpoint(
        folder, index["next_step"], index["run"], Calls(**index["calls"]), index["seconds"], index["history"], index["state"],
        {file: about["sha256"] for file, about in index["files"].items()},
    )  # fmt: skip


def _older(text: bytes) -> int | None:
    """The format of an index from before it had a digest."""
    try:
        found = json.loads(text)["format"]
    except (ValueError, TypeError, KeyError):
        return None
    return found if found in range(1, _FORMAT) and "sha256" not in json.loads(text) else None


def _verify(checkpoint: Checkpoint) -> None:
    """Raise Unusable for a file that holds something else than was written."""
    for file, digest in checkpoint.digests.items():
        if checkpoint.folder.sha256(file) != digest:
            raise Unusable(f"{file} holds something else than was written: its SHA-256 is not {digest[:12]}…")
