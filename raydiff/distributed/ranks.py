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

from raydiff.config import ConfigError
from raydiff.core.policy import NonFiniteReward, RewardFailed
from raydiff.data.pieces import PairsError
from raydiff.distributed.storage import StorageError
from raydiff.distributed.weights import SyncError

T = TypeVar("T")


class PoolLost(RuntimeError):
    """A member of a pool has died more often than it is started again."""


PLAIN: dict[str, Callable[[str], Exception]] = {
    kind.__name__: kind
    for kind in (
        ConfigError,
        FloatingPointError,
        NonFiniteReward,
        PairsError,
        PoolLost,
        RewardFailed,
        StorageError,
        SyncError,
    )
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

    def __init__(self, timeout: float, touch: Callable[[], None] = lambda: None) -> None:
        """timeout: seconds after which waiting for another rank raises RuntimeError. `touch` is called whenever this rank gets
        anywhere."""
        self.touch = touch
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank."""
        self.touch()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """All ranks leave the block alike: an exception on any of them raises the first one's Refused on all."""
        error: Exception | None = None
        self.touch()
        try:
            yield
        except Exception as caught:
            error = caught
        self.touch()
        failed = torch.tensor(int(error is not None))
        dist.all_reduce(failed, group=self.group)  # a lost worker raises here, and Ray starts the workers again
        if failed:
            refusals = self.gather(Refused.of(error) if error else None)
            first = next(refusal for refusal in refusals if refusal is not None)
            raise Refused(first.kind, first.message)
