"""One rank of a small gloo group: gradients of each job's first update, and a round trip of the optimiser's state.

python -m tests.distributed.parity RANK WORLD JOBS.json FOLDER
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from raydiff.config import Run
from raydiff.distributed.engine import Kind, ZeroEngine
from raydiff.distributed.ranks import Ranks
from raydiff.session import Session


def start_weights(session: Session) -> dict[str, Tensor]:
    """Away from LoRA's B = 0, where half of the gradients vanish."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=generator) * p.detach().std().clamp(min=0.3)
        for name, p in session.model.trained().items()
    }


def gradients(session: Session, engine: ZeroEngine, step: int = 0) -> dict[str, Tensor]:
    """One update, its gradients before clipping, and their norm as the engine gives it."""
    found: dict[str, Tensor] = {}
    for batch in session.ready(session.batches(step)):
        loss, _ = session.method.loss(session.policy, batch)
        engine.backward(loss)
        if engine.deepspeed.is_gradient_accumulation_boundary():
            found = engine.full("gradients")
        if (norm := engine.step()) is not None:
            found["norm"] = torch.tensor(norm)
    return found


def plain(run: Run) -> dict[str, Tensor]:
    """The reference: torch alone, in one process."""
    session = Session(run)
    session.prepare()
    with torch.no_grad():
        weights = start_weights(session)
        for name, p in session.model.trained().items():
            p.copy_(weights[name])
    for batch in session.ready(session.batches(0)):
        loss, _ = session.method.loss(session.policy, batch)
        (loss / session.geometry.accumulation).backward()
    return {name: p.grad for name, p in session.model.trained().items() if p.grad is not None}


def round_trip(session: Session, engine: ZeroEngine) -> dict[str, Tensor]:
    """Gradient of update 1 by an engine that got its state through `full` and `restore`, and by the one it came from."""
    weights = engine.full("parameters")
    moments = {"exp_avg": engine.full("exp_avg"), "exp_avg_sq": engine.full("exp_avg_sq")}
    again = Session(session.run, "cpu", session.rank, session.workers)
    restored = ZeroEngine(again, weights=weights, persistence_threshold=0)
    restored.restore(moments, 1)
    assert (restored.lr, restored.scheduler.last_epoch) == (engine.lr, engine.scheduler.last_epoch)
    norm, norm_again = session.update(engine, 1)["grad_norm"], again.update(restored, 1)["grad_norm"]
    assert norm_again == norm, (norm_again, norm)
    kinds: tuple[Kind, ...] = ("parameters", "exp_avg", "exp_avg_sq")
    for kind in kinds:
        _assert_equal(restored.full(kind), engine.full(kind), kind)
    swapped = {name: torch.full(p.shape, 0.5) for name, p in weights.items()}
    before = restored.full("parameters")
    with restored.swapped(swapped):
        inside = {name: tensor.clone() for name, tensor in restored.weights().items()}
        if engine.stage < 3:
            _assert_equal(inside, swapped, "swapped in")
        pictures = again.evaluate()
    _assert_equal(restored.full("parameters"), before, "swapped back")
    return {"pictures": torch.stack([p.image for p in pictures])}


def _assert_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> None:
    differ = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differ, f"{what}: {differ[0]} and {len(differ) - 1} more differ"


def main(rank: int, world: int, jobs: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    for name, job in json.loads(jobs.read_text()).items():
        start = time.perf_counter()
        run = Run.model_validate(job["run"])
        session = Session(run, "cpu", rank, world, gather=Ranks(timeout=120).gather)
        session.prepare()
        engine = ZeroEngine(session, weights=start_weights(session), persistence_threshold=0)
        found = gradients(session, engine)
        if job["round_trip"]:
            found |= round_trip(session, engine)
        print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)
        if rank == 0:
            safetensors.torch.save_file({k: v.contiguous() for k, v in found.items()}, folder / f"{name}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
