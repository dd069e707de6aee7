"""What a run costs: the run's own method goes through `Session.update` on a stub of one weight, whose calls are counted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raydiff.config import Batch, Evaluate, Generation, Pools, Prompts, Rewards, Run
from raydiff.core.denoise import Predict
from raydiff.core.learner import LossScale
from raydiff.core.policy import Calls
from raydiff.core.schedule import Schedule
from raydiff.models.base import ModelConfig
from raydiff.rewards.base import RewardConfig
from raydiff.session import Session

_DRAWS = 16  # updates to average a method's cost over, where it draws its point


def count(run: Run) -> tuple[Calls, Calls, Calls]:
    """Calls of an update, of an evaluation and of making the drift probe, counted while the run's own method trains one weight.

    Where a method draws its point, the mean over the run's first updates.
    """
    session = Session(small(run, _Stub(), micro=1))
    session.pairs = _Labels()  # type: ignore[assignment]
    updates = min(_DRAWS, run.train.updates)
    for step in range(updates):
        session.update(Backward(), step)
    picture = _evaluation(session)
    session.run = session.run.model_copy(update={"evaluate": Evaluate(images=1, batch=1, drift_images=1, clip=None)})
    first, probed = _evaluation(session), _evaluation(session)
    has_reference = run.model.train == "lora" or run.method.needs_reference
    probes = min(run.evaluate.drift_images, run.evaluate.images) if has_reference else 0

    def each(images: int, probes: int, more: Calls, less: Calls) -> Calls:
        return Calls(**{n: images * vars(picture)[n] + probes * (vars(more)[n] - vars(less)[n]) for n in vars(picture)})

    return (
        Calls(**{name: round(run.batch.size * n / updates) for name, n in vars(session.policy.calls).items()}),
        each(run.evaluate.images, probes, probed, picture),
        each(0, probes, first, probed),
    )


def _evaluation(session: Session) -> Calls:
    """Of a single picture."""
    session.judge.calls = Calls(reward_queries=1)
    session.evaluate()
    return session.judge.calls


class _Stub(ModelConfig):
    kind: str = "stub"

    def build(self, device: torch.device | str = "cpu", **_: Any) -> _StubModel:
        return _StubModel()


class _StubModel:
    """A Model of one weight, whose output is 0."""

    device = torch.device("cpu")
    latent_shape = (1, 1, 1)
    picture_size = 1
    has_reference = True

    def __init__(self) -> None:
        self.denoiser: nn.Module = nn.Linear(1, 1, bias=False)
        self._in_reference = False

    def schedule(self, steps: int, spacing: Any = None, final_alpha: float | None = None) -> Schedule:
        config = {"num_train_timesteps": max(1000, steps), "set_alpha_to_one": False}
        return Schedule.from_config(config, steps, spacing=spacing or "trailing", final_alpha=final_alpha)

    def predict(self, denoiser: nn.Module, prompts: Sequence[str], guidance: float, detach_negative: bool = False) -> Predict:
        def run(x: Tensor, time: Tensor) -> Tensor:
            (weight,) = self.denoiser.parameters()
            return 0 * nn.functional.linear(x, weight.detach() if self._in_reference else weight)

        return run

    def decode(self, latents: Tensor) -> Tensor:
        return latents.expand(-1, 3, -1, -1)

    def parts(self) -> dict[str, nn.Module]:
        return {"denoiser": self.denoiser}

    def settings(self) -> dict[str, Any]:
        return {}

    def passes(self, guidance: float) -> int:
        return 1 if guidance == 1 else 2

    def encode(self, images: Tensor) -> Tensor:
        return images[:, :1]

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images[:, :1], torch.zeros_like(images[:, :1])

    def encoder_digest(self) -> str:
        return ""

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        self._in_reference = True
        yield
        self._in_reference = False

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.denoiser.named_parameters())

    def export(self, folder: str | Path, state: Mapping[str, Tensor]) -> None:
        raise NotImplementedError("nothing of it is worth keeping")

    def load(self, folder: str | Path) -> None:
        raise NotImplementedError("it takes up nothing")


class _Labels:
    """Labelled pairs of one number."""

    def __len__(self) -> int:
        return 1

    def read(self, rows: Sequence[int], seeds: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        return torch.zeros(len(rows), 2, 1, 1, 1), torch.tensor([[1.0, 0.0]] * len(rows)), ("a",) * len(rows)


class _Mean(RewardConfig):
    kind: str = "mean"

    def build(self, device: torch.device | str = "cpu") -> Any:
        return lambda images, prompts: images.mean((1, 2, 3))


class Backward:
    """An engine that accumulates gradients and moves nothing."""

    loss_scale: LossScale | None = None
    lr = 0.0

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        return None


def small(run: Run, model: Any, micro: int, **sampler: Any) -> Run:
    """The run with another model, one micro-batch an update, one picture an evaluation, and rewards without weights."""
    return run.model_copy(
        update={
            "model": model,
            "method": run.method.model_copy(update={"minibatches": 1}),
            "batch": Batch(size=micro, micro=micro),
            "pools": Pools(),
            "optimizer": run.optimizer.model_copy(update={"ema": None}),
            "sampler": run.sampler.model_copy(update=sampler),
            "generation": Generation(),
            "prompts": Prompts(train=("a",), held_out=("b",)),
            "rewards": Rewards.model_validate({"mean": _Mean()}),
            "evaluate": Evaluate(images=1, batch=1, drift_images=0, clip=None),
        }
    )
