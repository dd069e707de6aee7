"""Several optimiser steps on one round of samples: what is counted, and that it is the loop one would write by hand."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from raydiff.config import ConfigError, Run, geometry, override
from raydiff.core.learner import TorchEngine
from raydiff.core.rollouts import Rollouts
from raydiff.distributed.engine import deepspeed_config
from raydiff.local import fit
from raydiff.session import Session

Make = Callable[..., Run]
DDPO = {"sampler.steps": 2, "sampler.eta": 1.0, "sampler.final_alpha": None, "batch.size": 4, "batch.micro": 1}
TWICE = {**DDPO, "method.minibatches": 2, "method.inner_epochs": 3}


def engine_of(session: Session) -> TorchEngine:
    return TorchEngine(*session.optimizer(), session.geometry.step_accumulation, session.run.optimizer.max_grad_norm)


def weights(session: Session) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in session.model.trained().values()])


def test_one_place_says_how_many_steps_there_are(tiny_run: Make) -> None:
    run = override(tiny_run("ddpo", {**TWICE, "batch.size": 8}), {"pools.train.replicas": 2})
    numbers = geometry(run)
    assert (numbers.accumulation, numbers.step_accumulation, numbers.optimizer_steps) == (4, 2, 6)
    assert "6 optimiser steps" in str(numbers)
    config = deepspeed_config(run, 2)
    assert config["gradient_accumulation_steps"] == 2 and config["train_batch_size"] == 4 == 2 * 1 * 2
    plain = geometry(tiny_run())
    assert (plain.step_accumulation, plain.optimizer_steps) == (2, 1) and "optimiser" not in str(plain)


def test_minibatches_that_do_not_divide_are_refused_with_numbers_that_do(tiny_run: Make) -> None:
    with pytest.raises(
        ConfigError, match=r"method.minibatches = 3 does not divide the 4 micro-batches.*1 or 2 or 4, or batch.size to 3"
    ):
        tiny_run("ddpo", {**DDPO, "method.minibatches": 3})


def test_an_update_is_the_loop_written_by_hand(tiny_run: Make) -> None:
    """Sampled once, then 3 passes of 2 optimiser steps, each on the mean gradient of 2 micro-batches."""
    run = tiny_run("ddpo", {**TWICE, "train.updates": 2, "optimizer.warmup": 1, "optimizer.schedule": "linear"})
    ours = Session(run)
    engine = engine_of(ours)
    rates = [engine.scheduler.get_last_lr()[0]]
    step = engine.scheduler.step
    engine.scheduler.step = lambda: (step(), rates.append(engine.scheduler.get_last_lr()[0]))  # type: ignore[method-assign]
    metrics = [ours.update(engine, update) for update in range(2)]
    assert engine.optimizer.state[next(iter(ours.model.trained().values()))]["step"] == 12
    # a rise over 6 steps, and down to 0 at the 12th
    assert [round(rate / 1e-2 * 42) for rate in rates] == [6, 12, 18, 24, 30, 36, 42, 35, 28, 21, 14, 7, 0]

    hand = Session(run)
    parameters = list(hand.model.trained().values())
    adam = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for update in range(2):
        sampled = list(hand.weighed([hand.scored(hand.sample(update, m)) for m in range(4)]))
        for epoch in range(3):
            for half in (sampled[:2], sampled[2:]):
                adam.param_groups[0]["lr"] = rates.pop(0)
                adam.zero_grad()
                losses = [hand.method.loss(hand.policy, replace(batch, epoch=epoch))[0] for batch in half]
                torch.stack(losses).mean().backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                adam.step()
    assert metrics[0]["approximate_kl"] > 0  # later steps are off-policy
    assert float((weights(ours) - weights(hand)).norm() / weights(hand).norm()) < 1e-4


def test_all_samples_are_drawn_before_the_weights_move(tiny_run: Make) -> None:
    session = Session(tiny_run("sft", {"batch.micro": 1, "method.minibatches": 4}))
    before, seen = weights(session), []
    sample = session.sample

    def watched(step: int, m: int) -> Rollouts:
        seen.append(torch.equal(weights(session), before))
        return sample(step, m)

    session.sample = watched  # type: ignore[method-assign]
    session.update(engine_of(session), 0)
    assert seen == [True] * 4 and not torch.equal(weights(session), before)


def test_a_pass_is_told_to_the_loss_and_an_update_stays_one_round(tiny_run: Make) -> None:
    run = tiny_run("diffusion_dpo", {"method.inner_epochs": 2, "train.updates": 3})
    session, epochs = Session(run), []

    class Watched(type(run.method)):  # type: ignore[misc]
        def loss(self, policy, batch):  # type: ignore[no-untyped-def]
            epochs.append(batch.epoch)
            return super().loss(policy, batch)

    session.method = Watched(**run.method.model_dump())
    session.update(engine_of(session), 0, list(Session(run).batches(0)))
    assert epochs == [0, 0, 1, 1]
    history = list(fit(run))
    assert [row["step"] for row in history] == [0, 1, 2, 3] and history[-1]["images"] == 3 * 4 * 2
