"""A run's checkpoints: whole fp32 tensors by name and one JSON, for any number of workers and any ZeRO stage.

`checkpoint_000020/` holds parameters, exp_avg, exp_avg_sq and, where there are any, ema and the best weights so far (which the
history tells the step and value of) as safetensors, and
`checkpoint.json`, written last with the sizes of the others: without it, or with a file of another size, the checkpoint does
not exist. So a kill or a full disk while one is written leaves the one before it. Ray's own index of checkpoints is rewritten
in place, and a full disk destroys it; a run does not use it.

Adam's step, the scheduler's and the moving average's are all the number of updates done. Samples follow from run, update and
slot, so there is no state of a random generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from pydantic import ValidationError
from torch import Tensor

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

_INDEX, _FORMAT = "checkpoint.json", 2


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

    Raises StorageError; what was there before is then still there.
    """
    place = folder / _name(next_step)
    folder.delete(_name(next_step))  # an incomplete one
    try:
        sizes = {}
        for kind, group in tensors:
            data = safetensors.torch.save({name: tensor.contiguous() for name, tensor in group.items()})
            place.write(f"{kind}.safetensors", data)
            sizes[f"{kind}.safetensors"] = len(data)
        place.write_json(
            _INDEX,
            {
                "format": _FORMAT, "next_step": next_step, "seconds": seconds, "calls": vars(calls), "files": sizes,
                "run": run.model_dump(mode="json"), "history": history, "state": state or {},
            },
        )  # fmt: skip
    except OSError:
        folder.delete(_name(next_step))  # the room that it took is needed
        raise
    complete = [name for name in _names(folder) if read(folder / name)]
    for name in _names(folder):
        if name not in complete[-run.train.keep_checkpoints :]:
            folder.delete(name)


def latest(folder: Folder) -> Checkpoint | None:
    """The newest complete checkpoint of a run's folder."""
    return next((found for name in reversed(_names(folder)) if (found := read(folder / name))), None)


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


def _names(folder: Folder) -> list[str]:
    return [name for name in folder.folders() if name.startswith("checkpoint_")]


def read(folder: Folder) -> Checkpoint | None:
    """The checkpoint in a folder, None when it is not complete."""
    try:
        index = folder.read_json(_INDEX)
    except (FileNotFoundError, ValueError):
        return None
    if any(folder.size(file) != size for file, size in index["files"].items()):
        return None
    return Checkpoint(
        folder, index["next_step"], index["run"], Calls(**index["calls"]), index["seconds"], index["history"], index["state"]
    )  # fmt: skip
