"""Five minutes of a run with pools, in which a generator, a reward replica or a trainer is killed every 20 seconds.

    python benchmarks/soak.py [--minutes 5] [--every 20] [--seed 0]

Afterwards the same updates are made in one process without pools: an equal adapter means that no sample was lost or used twice.
Prints a JSON summary, and exits with 1 when the adapters differ, or memory still grew after the first third.
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
from pathlib import Path
from typing import Any

import psutil
import safetensors.torch
import torch

import raydiff
from raydiff.config import Run, load, override
from raydiff.distributed import checkpoint, launch
from raydiff.distributed.storage import Folder

RECIPE = "jobs/recipes/emoji_draft_lv_pools.toml"
VICTIMS = {"generator": "MapBatches(Generator)", "reward replica": "RewardReplica", "trainer": "RayTrainWorker"}
_KEEP = ("raylet", "gcs_server", *VICTIMS.values(), "WeightStore", "Board", "TrainController", "SplitCoordinator", "Gate")
_LOOK = 1.0  # seconds between looks at memory
FLAT = 1.15  # what counts as flat: the last third's median over the middle third's


@dataclass
class Soak:
    """What happens to the run while it goes on."""

    every: float
    seed: int
    end: float
    kills: Counter[str] = field(default_factory=Counter)
    memory: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))  # role: (time, MiB)
    over: threading.Event = field(default_factory=threading.Event)

    def disturb(self) -> None:
        """Kill one process after another by a fixed list, then ask the run to stop as Ctrl-C does."""
        draw = random.Random(self.seed)
        while not self.over.wait(self.every):
            if time.monotonic() > self.end:
                os.kill(os.getpid(), signal.SIGINT)
                return
            victim = draw.choice(sorted(VICTIMS))
            if found := [p for p in ray_processes() if VICTIMS[victim] in title(p)]:
                found[0].kill()
                self.kills[victim] += 1

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
    disturbed = launch.train(run, resume=folder.uri).adapter  # nothing is left to do but to export
    ray.shutdown()
    alone = {"generation.where": "learner", "rewards.where": "learner"}
    with tempfile.TemporaryDirectory() as undisturbed:
        rows = list(raydiff.fit(override(run, alone), folder=undisturbed))
        error = distance(Path(disturbed), Path(undisturbed))
    return {
        "seconds": round(seconds),
        "updates": last.next_step,
        "kills": dict(state.kills),
        "pictures": last.calls.images,
        "pictures_undisturbed": int(rows[-1]["images"]),
        "adapter_distance": error,
        "memory_mib": {role: {k: round(v, 1) for k, v in sizes.items()} for role, sizes in state.growth().items()},
    }


def distance(ours: Path, theirs: Path) -> float:
    """Relative L2 distance of two exported adapters."""
    sides = [
        {name: w.double() for file in folder.rglob("*.safetensors") for name, w in safetensors.torch.load_file(file).items()}
        for folder in (ours, theirs)
    ]
    assert sides[0].keys() == sides[1].keys()
    a, b = (torch.cat([side[name].flatten() for name in sorted(side)]) for side in sides)
    return float((a - b).norm() / b.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--every", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:
        run = override(
            load(RECIPE),
            {
                "name": "soak", "storage": storage, "generation.max_staleness": 0, "optimizer.ema": None,
                "pools.reward.replicas": 2, "pools.generate.replicas": 2, "pools.generate.num_cpus": 0.5,
                "train": {"updates": 1000, "checkpoint_every": 1, "max_failures": 100},
                "evaluate": {"images": 4, "every": 1000, "grid": 0},
            },
        )  # fmt: skip
        summary = soak(run, arguments.minutes, arguments.every, arguments.seed)
    grown = {role: sizes for role, sizes in summary["memory_mib"].items() if sizes["last"] > FLAT * sizes["middle"] + 20}
    print(json.dumps(summary | {"grown": grown}, indent=1))
    wrong = summary["adapter_distance"] > 1e-4 or summary["pictures"] != summary["pictures_undisturbed"]
    return int(wrong or bool(grown))


if __name__ == "__main__":
    sys.exit(main())
