"""One batch, split among micro-batches and workers in any way: the same gradient and the same metrics."""

from collections.abc import Callable
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from raydiff.config import Run
from raydiff.core.learner import TorchEngine
from raydiff.session import Session
from tests.core.tiny import Tiny
from tests.tied import run_changes

Make = Callable[..., Run]
NOISY = {"sampler.eta": 1.0, "sampler.final_alpha": None}
UNCLIPPED = {**NOISY, "method.clip": 0.99}
PROMPTS = ["a cat", "a dog", "an ant", "a bee"]
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "draft": ("draft", {"method.kl": 0.1}),
    "draft_k": ("draft_k", {"method.k": 2}),
    "draft_lv": ("draft_lv", {}),
    "refl": ("refl", {"method.last_steps": 3}),
    "diffusion_dpo": ("diffusion_dpo", {"method.beta": 50}),
    "diffusion_dpo, all pairs": ("diffusion_dpo", {"method.beta": 50, "method.pairs": "all", "method.attempts": 3}),
    "d3po": ("d3po", UNCLIPPED),
    "d3po, half of the steps": ("d3po", {**UNCLIPPED, "method.timestep_fraction": 0.5}),
    "d3po, ties kept": ("d3po", {**UNCLIPPED, "method.ties": "keep"}),
    "ddpo": ("ddpo", {**NOISY, "method.attempts": 2, "method.timestep_fraction": 0.5}),
    "rwr": ("rwr", {"method.attempts": 2, "method.beta": 50}),
    "rwr, top": ("rwr", {"method.attempts": 2, "method.top": 0.25}),
    "sft": ("sft", {"method.attempts": 2}),
}
SPLITS = [(2, 1), (1, 1), (2, 2), (1, 2)]  # micro, workers


def one_update(run: Run, workers: int) -> tuple[Tensor, dict[str, float]]:
    """The mean gradient of all workers, each a thread, and their mean metrics."""
    barrier, shared = Barrier(workers), [None] * workers
    gradients, metrics = [[] for _ in range(workers)], [{} for _ in range(workers)]

    def gather_of(rank: int) -> Callable[[Any], list[Any]]:
        def gather(value: Any) -> list[Any]:
            shared[rank] = value
            barrier.wait()
            values = list(shared)
            barrier.wait()
            return values

        return gather

    def worker(rank: int) -> None:
        session = sessions[rank]
        adam, scheduler = session.optimizer()

        def keep(*_: Any) -> None:
            gradients[rank].append(torch.cat([p.grad.flatten() for p in session.model.trained().values()]))

        adam.register_step_pre_hook(keep)
        engine = TorchEngine(adam, scheduler, session.geometry.step_accumulation, 1e9)
        metrics[rank] = session.update(engine, 0)

    sessions = [Session(run, rank=rank, workers=workers, gather=gather_of(rank)) for rank in range(workers)]
    threads = [Thread(target=worker, args=(rank,)) for rank in range(workers)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    mean = {name: sum(m[name] for m in metrics) / workers for name in metrics[0]}
    return torch.stack([torch.stack(g).sum(0) for g in gradients]).mean(0), mean


def tied_run(make: Make, name: str, tied: list[str], micro: int) -> Run:
    method, changes = METHODS[name]
    same = {"prompts.train": PROMPTS, "batch": {"size": 4, "micro": micro}, **run_changes(tied)}
    same |= {"train.zero_gradient": "accept"}  # a worker here knows its own gradient alone, and may have nothing but ties
    return make(method, {**same, **changes}).model_copy(update={"model": Tiny()})


@pytest.mark.parametrize("tied", [[], ["a cat", "an ant", "a bee"], ["a dog"]], ids=["no ties", "three tied", "one tied"])
@pytest.mark.parametrize("name", METHODS)
def test_a_split_changes_neither_gradient_nor_metrics(tiny_run: Make, name: str, tied: list[str]) -> None:
    gradient, metrics = one_update(tied_run(tiny_run, name, tied, 4), 1)
    assert gradient.norm() > 0
    for micro, workers in SPLITS:
        other, told = one_update(tied_run(tiny_run, name, tied, micro), workers)
        error = float((other - gradient).norm() / gradient.norm())
        print(f"{name}, {tied}: micro {micro}, {workers} workers: {error:.1e}")
        assert error < 1e-9, (micro, workers)
        compared = told.keys() - ({"grad_norm"} if workers > 1 else set())  # which these engines have each of its own share
        assert {k: told[k] for k in compared} == pytest.approx({k: metrics[k] for k in compared}, rel=1e-6, abs=1e-9)


def test_optimiser_steps_of_one_update_have_each_their_own_count(tiny_run: Make) -> None:
    """Two steps of two prompts: in the first one is tied, in the second none."""
    first = {"method.minibatches": 2, "prompts.train": ["a cat"], "batch": {"size": 4, "micro": 1}}
    session = Session(tiny_run("d3po", {**NOISY, **first}).model_copy(update={"model": Tiny()}))
    batches = list(session.batches(0))
    tie = torch.zeros_like(batches[0].total())
    batches[0] = type(batches[0])(**{**vars(batches[0]), "rewards": {"blue": tie, "total": tie}})
    assert [b.terms for b in session.ready(batches)] == [0.5, 0.5, 1.0, 1.0]
