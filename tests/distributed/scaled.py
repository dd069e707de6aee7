"""One rank of a small gloo group: at each ZeRO stage a step that overflows, one that does not, and a gradient that is NaN.

python -m tests.distributed.scaled RANK WORLD RUNS.json FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from raydiff.config import Run
from raydiff.core.learner import Engine, LossScale, Metrics
from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts
from raydiff.distributed.engine import ZeroEngine
from raydiff.distributed.ranks import Ranks
from raydiff.methods import draft_k
from raydiff.session import Session
from tests.distributed.parity import start_weights

TOO_LARGE, USUAL = 2.0**60, 2.0**16


class Broken(draft_k.Plugin):
    """A finite loss, with a slope that is no number."""

    def loss(self, policy: Policy, batch: Rollouts) -> tuple[Tensor, Metrics]:
        value, metrics = super().loss(policy, batch)
        return value + (0 * value).square().sqrt(), metrics


def three_updates(session: Session, engine: Engine) -> dict[str, Any]:
    """The first searches its scale, the second has one that overflows, the third a usual one: what they reported."""
    assert session.loss_scale is not None
    told = {}
    for step, scale in enumerate((LossScale.MOST, TOO_LARGE, USUAL)):
        session.loss_scale.scale = scale
        told[f"metrics_{step}"] = session.update(engine, step)
    return told


def zero_engine(session: Session) -> ZeroEngine:
    return ZeroEngine(session, weights=start_weights(session), persistence_threshold=0)


def after_overflow(run: Run, rank: int, world: int, gather: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    session = Session(run, "cpu", rank, world, gather=gather)
    engine = zero_engine(session)
    told = three_updates(session, engine)
    steps = {int(state["step"]) for state in engine.adam.state.values() if "step" in state}
    return engine.full("parameters"), {**told, "lr": engine.lr, "adam_steps": sorted(steps)}


def after_nan(run: Run, rank: int, world: int, gather: Any) -> tuple[str, bool]:
    """What was said, and whether any weight moved."""
    session = Session(run, "cpu", rank, world, gather=gather)
    engine = zero_engine(session)
    before = engine.full("parameters")
    session.method = Broken(**run.method.model_dump(exclude={"kind"}))
    try:
        session.update(engine, 0)
    except FloatingPointError as error:
        after = engine.full("parameters")
        return str(error), any(not torch.equal(after[name], before[name]) for name in before)
    return "nothing", True


def main(rank: int, world: int, runs: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    gather = Ranks(timeout=120).gather
    for name, tree in json.loads(runs.read_text()).items():
        half, exact = (Run.model_validate(tree[kind]) for kind in ("half", "exact"))
        weights, told = after_overflow(half, rank, world, gather)
        told["said"], told["moved"] = after_nan(exact, rank, world, gather)
        if rank == 0:
            safetensors.torch.save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
