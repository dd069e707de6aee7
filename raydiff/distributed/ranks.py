"""What the workers of a run tell each other beside gradients: verdicts and small objects, on the CPU.

A fault of the run itself (a NaN reward, a full disk) is told from a lost worker by this: all workers are still there to agree
on it. Then it is final, and Ray is not given an exception that it would answer by starting the workers again.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from raydiff.config import ConfigError
from raydiff.core.learner import Metrics, require_finite
from raydiff.core.policy import NonFiniteReward, Policy, RewardFailed
from raydiff.core.rollouts import Rollouts
from raydiff.data.pieces import PairsError
from raydiff.distributed.storage import StorageError
from raydiff.distributed.weights import SyncError

T = TypeVar("T")

PLAIN: dict[str, Callable[[str], Exception]] = {
    kind.__name__: kind
    for kind in (ConfigError, FloatingPointError, NonFiniteReward, PairsError, RewardFailed, StorageError, SyncError)
}
"""Errors whose message says all that a user needs; of any other the traceback is shown."""


def plain(error: BaseException | None) -> Exception | None:
    """The first error of PLAIN in a chain of causes, as Ray wraps what a remote process raised; None when there is none."""
    while error is not None:
        cause = getattr(error, "cause", None)
        if isinstance(cause, BaseException):
            error = cause
        elif type(error).__name__ in PLAIN:
            return error  # type: ignore[return-value]
        else:
            error = error.__cause__
    return None


class Refused(Exception):
    """The run ends here, on every worker, by its own fault."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)  # as they are pickled
        self.kind, self.message = kind, message

    @classmethod
    def of(cls, error: Exception) -> Refused:
        kind = next((k.__name__ for k in type(error).__mro__ if k.__name__ in PLAIN), type(error).__name__)
        return cls(kind, str(error) if kind in PLAIN else "".join(traceback.format_exception(error)).strip())

    def error(self) -> Exception:
        """The exception as a caller of `train` sees it."""
        return PLAIN.get(self.kind, RuntimeError)(self.message)


class Ranks:
    """All workers of a run; every method is collective."""

    def __init__(self, timeout: float) -> None:
        """timeout: seconds after which waiting for another rank raises RuntimeError."""
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """All ranks leave the block alike: an exception on any of them raises the first one's Refused on all."""
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        failed = torch.tensor(int(error is not None))
        dist.all_reduce(failed, group=self.group)  # a lost worker raises here, and Ray starts the workers again
        if failed:
            refusals = self.gather(Refused.of(error) if error else None)
            first = next(refusal for refusal in refusals if refusal is not None)
            raise Refused(first.kind, first.message)


class AgreedLoss:
    """A method whose loss is finite on all workers, or refused on all of them before anyone's backward pass waits."""

    def __init__(self, method: Any, ranks: Ranks) -> None:
        self._method, self._ranks = method, ranks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]:
        with self._ranks.agreed():
            loss, metrics = self._method.loss(policy, batch)
            require_finite(loss, batch)
        return loss, metrics
