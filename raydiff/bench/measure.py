"""One run of the comparison: `raydiff.fit` in a process of one thread, and what it cost and reached at each evaluation.

Legend: E evaluations, P pictures, H W pixels.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from raydiff.config import Run

COSTS = ("reward_queries", "images", "denoiser_forward", "denoiser_backward", "seconds")
FRAMES, SHOWN = 6, 2  # pictures of the strip: evaluations along the run, and prompts


@dataclass(frozen=True)
class Job:
    """A run, and where its record goes. `strip`: keep pictures along the way."""

    run: Run
    file: Path
    strip: bool = False

    def done(self) -> bool:
        """Whether the record is there, of this very run."""
        return self.file.is_file() and json.loads(self.file.read_text())["run"] == _key(self.run)


def measure(run: Run, show: Callable[[int, Sequence[Any]], Any] | None = None) -> dict[str, Any]:
    """Train, and return the record: {"run", "prompts" (P,), "evaluations": [...]}.

    Each evaluation has "step", the costs so far, which leave evaluations out, and "rewards" {name: (P,)} with "total"; and
    "grad_norm", the last update's.
    """
    from raydiff.local import fit

    rewards: dict[int, dict[str, list[float]]] = {}
    prompts: list[str] = []

    def keep(step: int, pictures: Sequence[Any]) -> None:
        rewards[step] = {name: [p.rewards[name] for p in pictures] for name in pictures[0].rewards}
        prompts[:] = [p.prompt for p in pictures]
        if show:
            show(step, pictures)

    evaluations: list[dict[str, Any]] = []
    trained = asked = ahead = 0.0  # seconds of updates; when the next one was asked for; fit's clock ahead of ours
    for row in fit(run, show=keep):
        step = int(row["step"])
        if step == 0:
            ahead = row["seconds"] - time.perf_counter()
        else:
            trained += row["seconds"] - (asked + ahead)
        if step in rewards:
            costs = {name: 0 if step == 0 else row[name] for name in COSTS[:-1]} | {"seconds": trained}
            evaluations.append({"step": step, **costs, "grad_norm": row.get("grad_norm"), "rewards": rewards[step]})
        asked = time.perf_counter()
    return {"run": _key(run), "prompts": prompts, "evaluations": evaluations}


def work(job: Job) -> None:
    """Make a job's record, and the frames of its strip."""
    import numpy as np

    frames: dict[int, Any] = {}

    def keep(step: int, pictures: Sequence[Any]) -> None:
        frames[step] = np.stack([p.image.numpy() for p in pictures[:SHOWN]])  # (SHOWN,3,H,W)

    record = measure(job.run, keep if job.strip else None)
    job.file.parent.mkdir(parents=True, exist_ok=True)
    if frames:
        steps = sorted(frames)
        kept = sorted({steps[round(i * (len(steps) - 1) / (FRAMES - 1))] for i in range(FRAMES)})
        np.savez(job.file.with_suffix(".npz"), steps=kept, frames=np.stack([frames[s] for s in kept]))
    draft = job.file.with_suffix(".draft")
    draft.write_text(json.dumps(record))
    draft.rename(job.file)


def work_all(jobs: Iterable[Job], processes: int, say: Callable[[str], Any]) -> None:
    """Make the records that are missing, in processes of one thread each. Ctrl-C loses the runs under way, no others."""
    todo = [job for job in jobs if not job.done()]
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process imports torch
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        start, futures = time.monotonic(), {pool.submit(work, job): job for job in todo}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                future.result()
                say(f"{count} of {len(todo)} runs, {time.monotonic() - start:.0f} s: {futures[future].run.name}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _key(run: Run) -> Mapping[str, Any]:
    return json.loads(run.model_dump_json())
