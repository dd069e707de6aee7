"""Half an hour of a run with pools, in which processes of every role are killed, stopped for a moment, and stopped for good.

    python benchmarks/soak.py [--minutes 30] [--every 20] [--seed 0]

Afterwards the same updates are made undisturbed: weights, moments and metrics must be equal to the last bit, and MLflow must
have each step once. Prints a JSON summary, and exits with 1 when they are not, or memory still grew after the first third.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import psutil
import torch

from raydiff.config import Run, load, override
from raydiff.distributed import checkpoint, launch
from raydiff.distributed.storage import Folder
from raydiff.distributed.tracking import Tracker

RECIPE = "jobs/recipes/emoji_draft_lv_pools.toml"
VICTIMS = {
    "generator": "MapBatches(Generator)", "reward replica": "RewardReplica", "trainer": "RayTrainWorker",
    "gate": "MapBatches(Gate)", "board": "ray::Board", "weight store": "ray::WeightStore",
}  # fmt: skip
_KEEP = ("raylet", "gcs_server", *(v.removeprefix("ray::") for v in VICTIMS.values()), "TrainController", "SplitCoordinator")
_MOMENT = 10.0  # seconds at most that a process is stopped for a moment
_TIMEOUT = 60.0  # train.timeout: one that is stopped for good is started again after that
_LOOK = 1.0  # seconds between looks at memory
FLAT = 1.15  # what counts as flat: the last third's median over the middle third's


@dataclass
class Soak:
    """What happens to the run while it goes on."""

    every: float
    seed: int
    end: float
    deeds: Counter[str] = field(default_factory=Counter)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))  # role: (time, MiB)
    over: threading.Event = field(default_factory=threading.Event)

    def disturb(self) -> None:
        """Kill or stop one process after another by a fixed list, then ask the run to stop as Ctrl-C does."""
        draw = random.Random(self.seed)
        while not self.over.wait(self.every):
            if time.monotonic() > self.end:
                os.kill(os.getpid(), signal.SIGINT)
                return
            role = draw.choice(sorted(VICTIMS))
            deed, moment = (
                draw.choices(["killed", "stopped for a moment", "stopped for good"], [5, 4, 1])[0],
                draw.uniform(1, _MOMENT),
            )
            if found := [p for p in ray_processes() if VICTIMS[role] in title(p)]:
                victim = draw.choice(found)
                with suppress(psutil.NoSuchProcess):
                    victim.send_signal(signal.SIGKILL if deed == "killed" else signal.SIGSTOP)
                    self.deeds[f"{role} {deed}"] += 1
                    if deed == "stopped for a moment":
                        self.over.wait(moment)
                        victim.send_signal(signal.SIGCONT)

    def watch(self) -> None:
        """Resident memory of the largest process of each role, and what the object store holds."""
        import ray

        whole = ray.cluster_resources()["object_store_memory"]
        while not self.over.wait(_LOOK):
            now, largest = time.monotonic(), defaultdict[str, float](float)
            for process in [psutil.Process(), *ray_processes()]:
                try:
                    role, size = role_of(process), process.memory_info()
                except psutil.Error:
                    continue
                if role:
                    largest[role] = max(largest[role], (size.rss - size.shared) / 2**20)
            largest["object store"] = (whole - ray.available_resources().get("object_store_memory", whole)) / 2**20
            for role, size in largest.items():
                self.memory[role].append((now, size))

    def growth(self) -> dict[str, dict[str, float]]:
        """By role, MiB in the middle third and in the last one, medians."""
        found = {}
        for role, seen in sorted(self.memory.items()):
            first, last = seen[0][0], self.end
            third = (last - first) / 3
            middle = [size for at, size in seen if first + third <= at < first + 2 * third]
            late = [size for at, size in seen if first + 2 * third <= at <= last]
            if middle and late:
                found[role] = {
                    "middle": statistics.median(middle),
                    "last": statistics.median(late),
                    "most": max(s for _, s in seen),
                }
        return found


def ray_processes() -> list[psutil.Process]:
    """What this process has started, but not what is ending."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def role_of(process: psutil.Process) -> str | None:
    if process.pid == os.getpid():
        return "driver"
    return next((role.removeprefix("MapBatches(").removesuffix(")") for role in _KEEP if role in title(process)), None)


def soak(run: Run, minutes: float, every: float, seed: int) -> dict[str, Any]:
    """Run and disturb; then make the same updates undisturbed."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    state = Soak(every, seed, time.monotonic() + 60 * minutes)
    threads = [threading.Thread(target=target, daemon=True) for target in (state.disturb, state.watch)]
    for thread in threads:
        thread.start()
    start = time.monotonic()
    try:
        launch.train(run)
    except KeyboardInterrupt:
        pass
    finally:
        state.over.set()
    seconds = time.monotonic() - start
    for thread in threads:
        thread.join()
    (folder,) = (Folder(run.storage) / name for name in Folder(run.storage).folders() if name.startswith(run.name))
    last = checkpoint.latest(folder)
    assert last is not None, "no update was made"
    run = override(run, {"train.updates": last.next_step})
    disturbed = launch.train(run, resume=folder.uri)  # nothing is left to do but to export
    with tempfile.TemporaryDirectory() as storage:
        calm = launch.train(override(run, {"storage": storage}))
        found = differences(disturbed, calm)
    ray.shutdown()
    return {
        "seconds": round(seconds),
        "updates": last.next_step,
        "deeds": dict(sorted(state.deeds.items())),
        "pictures": last.calls.images,
        "differences": found,
        "memory_mib": {role: {k: round(v, 1) for k, v in sizes.items()} for role, sizes in state.growth().items()},
    }


def differences(ours: launch.Result, theirs: launch.Result) -> list[str]:
    """What differs between two runs in the last bit of their newest checkpoints, and in MLflow's steps; [] when nothing."""
    left, right = (checkpoint.latest(Folder(result.folder)) for result in (ours, theirs))
    assert left is not None
    assert right is not None
    found = []
    for kind in ("parameters", "exp_avg", "exp_avg_sq"):
        a, b = left.tensors(kind), right.tensors(kind)
        found += [f"{kind} {name}" for name in b if not torch.equal(a[name], b[name])]
    for mine, yours in zip(left.history, right.history, strict=True):
        found += [
            f"{name} after update {yours['step']:g}: {mine[name]}, {yours[name]} undisturbed"
            for name in yours
            if name != "seconds" and not name.startswith("pools/") and mine[name] != yours[name]
        ]
    client = Tracker(ours.mlflow_uri, ours.mlflow_run_id).client()
    steps = [metric.step for metric in client.get_metric_history(ours.mlflow_run_id, "seconds")]
    if sorted(steps) != list(range(len(right.history))):
        found.append(f"MLflow's steps: {steps}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        run = override(
            load(RECIPE),
            {
                "name": "soak", "storage": storage, "generation.max_staleness": 0, "optimizer.ema": None,
                "pools.reward.replicas": 2, "pools.generate.replicas": 2, "pools.generate.num_cpus": 0.5,
                "train": {"updates": 10000, "checkpoint_every": 1, "max_failures": 1000, "timeout": _TIMEOUT},
                "evaluate": {"images": 4, "every": 10000, "grid": 0},
            },
        )  # fmt: skip
        summary = soak(run, arguments.minutes, arguments.every, arguments.seed)
    grown = {role: sizes for role, sizes in summary["memory_mib"].items() if sizes["last"] > FLAT * sizes["middle"] + 20}
    print(json.dumps(summary | {"grown": grown}, indent=1))
    return int(bool(summary["differences"] or grown))


if __name__ == "__main__":
    sys.exit(main())
