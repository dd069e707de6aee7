"""One training worker: the loop on its share of every batch, with checkpoints, and what all workers agree on."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from statistics import mean
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from raydiff import contents, fingerprint, pictures, watch
from raydiff.config import ConfigError, Run
from raydiff.contents import Contents
from raydiff.core.policy import Calls
from raydiff.core.rollouts import Rollouts
from raydiff.distributed import checkpoint, lease, score
from raydiff.distributed.board import Record
from raydiff.distributed.checkpoint import FINISHED, Checkpoint
from raydiff.distributed.engine import ZeroEngine
from raydiff.distributed.hangs import Watchdog, started_again
from raydiff.distributed.meter import Meter
from raydiff.distributed.pipeline import Stream
from raydiff.distributed.ranks import Ranks, Refused
from raydiff.distributed.score import RewardClient
from raydiff.distributed.storage import PATIENCE, Folder
from raydiff.distributed.weights import SyncError
from raydiff.loop import Loop, Row
from raydiff.session import Picture, Session, summary
from raydiff.watch import Best

BEFORE = "pictures/before"  # .safetensors and .json: the untrained model's, for the grid at the end
GRID = "pictures/before_after.png"
ADAPTER, BEST = "adapter", "adapter_best"


def work(config: dict[str, Any]) -> dict[str, Any]:
    """What Ray Train calls on every worker. `config`: run (JSON), timeout, folder, the lease's token, contents, board; store
    and rewards of pools.

    Returns {"finished": {...}}, {"stopped": update} after a stop that the driver asked for, or {"refused": (kind, message)}.
    An exception instead would mean a lost worker to Ray, which starts all of them again.
    """
    import ray.train.torch

    record, rank = Record(config["board"], config["timeout"]), ray.train.get_context().get_world_rank()
    with Watchdog(config["timeout"], lambda why: record.tell(started_again(f"trainer {rank}", why))) as watchdog:
        ranks = Ranks(config["timeout"], watchdog.touch)
        try:
            with ranks.agreed():
                run = Run.model_validate_json(config["run"])
            device = ray.train.torch.get_device()
            if device.type == "cpu":
                torch.set_num_threads(max(1, int(run.pools.train.num_cpus)))
            groups, store = config["rewards"], config["store"]
            rewards = score.client(run, groups, store, ranks.rank, ranks.size, watchdog.touch) if groups else None
            held, folder = Contents.load(config["contents"]), Folder(config["folder"], PATIENCE)
            worker = Worker(run, device, ranks, folder, config["lease"], held, record, store, rewards)
            watchdog.sign = worker.session.spent
            return worker.train()
        except Refused as refusal:
            return {"refused": (refusal.kind, refusal.message)}


class Worker(Loop):
    """One worker's loop, continued from the newest checkpoint if the folder has one. Every method is collective."""

    engine: ZeroEngine

    def __init__(
        self,
        run: Run,
        device: torch.device,
        ranks: Ranks,
        folder: Folder,
        token: str,
        held: Contents,
        record: Record,
        store: Any = None,
        rewards: RewardClient | None = None,
    ) -> None:
        super().__init__()
        self.run, self.ranks, self.folder, self.token, self.store = run, ranks, folder, token, store
        self.record = record
        self.evaluated: tuple[int, list[Picture]] = (-1, [])  # after how many updates, and its pictures
        self.best: Mapping[str, Tensor] = {}  # the weights of watch.best, on rank 0
        self.exported = -1  # the step whose weights are in BEST
        found: Checkpoint | None = None
        with ranks.agreed():
            if ranks.rank == 0:
                for part in ("", PurePosixPath(GRID).parent.as_posix()):
                    folder.clear_drafts(part)
                found = checkpoint.latest(folder, self.record.tell)
                self.start -= self.record.clock(found.seconds if found else 0.0)
        place = ranks.gather(found.folder.uri if found else None)[0]  # rank 0 looked: all continue from the same one
        with ranks.agreed():
            try:
                self.session = Session(run, device, ranks.rank, ranks.size, rewards.scores() if rewards else None)
            except (ValueError, OSError) as error:
                raise ConfigError(str(error)) from error
            saved: dict[str, Mapping[str, Tensor]] = {}
            if place:
                found = checkpoint.read(Folder(place))
                assert found is not None, place
                checkpoint.check_same_run(found.run, run)
                kinds = ("parameters", "exp_avg", "exp_avg_sq", *(("ema",) if self.session.ema else ()))
                saved = {kind: found.tensors(kind) for kind in kinds}
                if ranks.rank == 0 and watch.best(run, found.history):
                    self.best = found.tensors("best")
        self.session.gather, self.session.agreed = ranks.gather, ranks.agreed
        with ranks.agreed():
            try:
                self.session.prepare(self.encoding)
            except (ValueError, OSError) as error:  # the same on all: preparing agrees on it
                raise ConfigError(str(error)) from error
        self.compare(held)
        self.engine = ZeroEngine(self.session, weights=saved.get("parameters"))
        if found:
            self.resume(found, saved)
        self.stream = Stream(self.session, store, ranks, self.base) if run.generation.where == "pool" else None
        self.meter = Meter()

    def compare(self, held: Contents) -> None:
        """End the run when a worker has loaded something else than `held`, or than another worker. What was unknown before is
        written down, as a hub id's commit."""
        with self.ranks.agreed():
            more = ["evaluate.clip"] if self.session.embed else []  # loaded now
            if self.ranks.rank == 0 or self.run.method.judged:  # encoded pairs are the same files for all
                more.append("pairs")
            mine = held.check_session(self.session, *more)
            self.base = fingerprint.of_model(self.session.model)
        first, bases = self.ranks.gather(mine)[0], self.ranks.gather(self.base)
        with self.ranks.agreed():
            Contents(first).compare(mine)
            if others := [name for name, digest in bases[0].items() if bases[self.ranks.rank].get(name) != digest]:
                raise SyncError(f"trainer {self.ranks.rank} holds another {', '.join(others)} than trainer 0")
            if self.ranks.rank == 0 and first.keys() - held.digests.keys():
                self.folder.write(contents.FILE, held.joined(first).dump().encode())

    def resume(self, found: Checkpoint, saved: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.session.restore(found.state)
        self.engine.restore({kind: saved[kind] for kind in ("exp_avg", "exp_avg_sq")}, found.next_step)
        if self.session.ema:
            self.session.ema.updates = found.next_step
            for name, average in self.session.ema.average.items():
                average.copy_(saved["ema"][name])
        if self.ranks.rank == 0:
            self.session.policy.calls = found.calls
            self.record.add(found.history, [])
            self.record.tell(f"continuing after update {found.next_step}")
        self.history, self.done = found.history, found.next_step

    def encoding(self, done: int, pieces: int) -> None:
        if self.ranks.rank == 0 and done == 0:
            self.record.tell(f"encoding the pairs of {self.run.pairs.path}: {pieces} pieces, once")

    def train(self) -> dict[str, Any]:
        """What `work` returns."""
        deque(self.rows(), maxlen=0)
        if self.stopping and not self.reason and self.done < self.run.train.updates:
            return {"stopped": self.done}
        if self.stream:
            self.stream.close()
        return {"finished": self.finish()}

    def require_folder(self) -> None:
        """End the run when another driver has taken its folder over: one that was stopped, or cut off, finds out by this."""
        with self.ranks.agreed():
            if self.ranks.rank == 0:
                lease.require(self.folder, self.token)

    def learn(self, step: int, batches: Iterable[Rollouts] | None = None) -> Row:
        """A gradient that is refused is so on all workers, whose norm is one."""
        try:
            return super().learn(step, self.stream.batches(step) if self.stream else None)
        except FloatingPointError as error:
            raise Refused.of(error) from None

    def weights(self) -> Mapping[str, Tensor]:
        return self.engine.weights()

    def share(self, metrics: Row) -> Row:
        """Hand the weights to the pool. Returns the means over workers, and what the pools did since the last time."""
        import ray

        if self.stream:
            metrics |= self.stream.publish(self.done, self.engine.weights())
        if self.store is not None and self.ranks.rank == 0:
            metrics |= self.meter.since(ray.get(self.store.status.remote()))
        shared = self.ranks.gather((metrics, self.ranks.rank == 0 and self.record.must_stop()))
        self.stopping = shared[0][1] and bool(self.history)  # a run that has nothing yet makes an update first
        return _mean([m for m, _ in shared])

    def stopped(self) -> str | None:
        """As rank 0 sees it: seconds differ."""
        if not self.run.train.stop_when:
            return None
        reason = None
        with self.ranks.agreed():
            if self.ranks.rank == 0:
                reason = super().stopped()
        return self.ranks.gather(reason)[0]

    def require_learning(self) -> None:
        with self.ranks.agreed():
            super().require_learning()

    def keep_best(self) -> None:
        """Take a copy of the weights that were just evaluated."""
        weights = self.averages()
        if self.ranks.rank == 0:
            self.best = {name: w.detach().float().cpu().clone() for name, w in weights.items()}

    def checkpoint(self) -> None:
        train = self.run.train
        if self.stopping or self.reason or self.done % train.checkpoint_every == 0 or self.done == train.updates:
            self.save()

    def evaluate(self) -> list[Picture]:
        """All held-out pictures of the weights that would be exported now, by index; a grid of them goes to storage."""
        with self.ranks.agreed(), self.averaged():
            mine = self.session.evaluate()
        everyone = sorted((p for share in self.ranks.gather(mine) for p in share), key=lambda p: p.index)
        self.evaluated = (self.done, everyone)
        shown = everyone[: self.run.evaluate.grid]
        with self.ranks.agreed():
            if self.ranks.rank == 0 and shown:
                if self.done == 0:
                    self.keep_before(shown)
                self.show(f"pictures/step_{self.done:06d}.png", pictures.sheet(shown))
        return everyone

    def finish(self) -> dict[str, Any]:
        """Export the trained weights and the grid of before and after. The run is finished when FINISHED is written."""
        after = self.evaluated[1] if self.evaluated[0] == self.done else self.evaluate()
        weights, result = self.averages(), self.result(after)
        with self.ranks.agreed():
            if self.ranks.rank == 0:
                self.folder.remove(FINISHED)  # of a run that is continued: it tells of the weights before
                self.export(weights, ADAPTER)
                self.export_best()
                before = self.before()[: self.run.evaluate.grid]
                if before:
                    self.show(GRID, pictures.before_after(before, after[: len(before)]))
                self.folder.write_json(FINISHED, {"updates": self.done, **result})
                self.record.settle()
        return result

    def export(self, weights: Mapping[str, Tensor], name: str, best: Best | None = None) -> None:
        """Write weights as diffusers reads them to a folder of the run's, best.json beside them."""
        with tempfile.TemporaryDirectory() as scratch:
            self.session.model.export(scratch, weights)
            if best:
                best.write(scratch)
            self.folder.upload(Path(scratch), name, watch.BEST)
            self.record.add(
                [], [f"{name}/{f.relative_to(scratch).as_posix()}" for f in Path(scratch).rglob("*") if f.is_file()]
            )

    def export_best(self) -> None:
        """On rank 0, after a checkpoint that has them: what BEST holds is never lost with an attempt."""
        best = watch.best(self.run, self.history)
        if best and best.step != self.exported:
            self.export(self.best, BEST, best)
            self.exported = best.step

    def averages(self) -> Mapping[str, Tensor]:
        """The weights to evaluate and export, whole. Collective."""
        return self.session.ema.average if self.session.ema else self.engine.weights()

    def result(self, after: list[Picture]) -> dict[str, Any]:
        """A run that is resumed with no update left has no row of `after`."""
        best = watch.best(self.run, self.history)
        before, now = ({k: v for k, v in row.items() if k.startswith("held_out/")} for row in (self.history[0], summary(after)))
        return {
            "before": before,
            "after": now,
            "seconds": self.history[-1]["seconds"],
            "best": asdict(best) if best else None,
            "stopped_by": self.reason,
        }

    def save(self) -> None:
        """A checkpoint. Tensors are gathered on all ranks, whatever happens to rank 0's disk."""
        tensors, calls = self.tensors(), self.calls()
        with self.ranks.agreed():
            try:
                if self.ranks.rank == 0:
                    checkpoint.save(
                        self.folder,
                        tensors,
                        run=self.run,
                        next_step=self.done,
                        calls=calls,
                        seconds=self.seconds,
                        history=self.history,
                        state=self.session.state(),
                    )
            finally:
                for _ in tensors:
                    pass
            if self.ranks.rank == 0:
                self.export_best()

    def tensors(self) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
        yield "parameters", self.engine.full("parameters")
        yield "exp_avg", self.engine.full("exp_avg")
        yield "exp_avg_sq", self.engine.full("exp_avg_sq")
        if self.session.ema:
            yield "ema", self.session.ema.average
        if self.best:
            yield "best", self.best

    def report(self, row: Row) -> Row:
        """To the history, to the board, and to Ray, where a sweep listens."""
        import ray.train

        self.require_folder()
        if self.ranks.rank == 0:
            self.record.add([row], [])
        ray.train.report(row)
        return super().report(row)

    def show(self, path: str, picture: Any) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            self.folder.write(path, pictures.save(picture, Path(scratch) / "grid.png").read_bytes())
        self.record.add([], [path])

    def keep_before(self, shown: list[Picture]) -> None:
        about = [{**vars(p), "image": None, "embedding": None} for p in shown]
        self.folder.write(f"{BEFORE}.safetensors", safetensors.torch.save({"images": torch.stack([p.image for p in shown])}))
        self.folder.write_json(f"{BEFORE}.json", about)

    def before(self) -> list[Picture]:
        if self.folder.size(f"{BEFORE}.json") is None:
            return []
        images = safetensors.torch.load(self.folder.read(f"{BEFORE}.safetensors"))["images"]
        about = self.folder.read_json(f"{BEFORE}.json")
        return [Picture(**{**a, "image": image}) for a, image in zip(about, images, strict=True)]

    def averaged(self) -> AbstractContextManager[None]:
        return self.engine.swapped(self.session.ema.average) if self.session.ema else nullcontext()

    @property
    def seconds(self) -> float:
        """Wall time of training so far, over restarts and lost attempts; on rank 0."""
        return time.perf_counter() - self.start

    def calls(self) -> Calls:
        """What all workers have spent."""
        return sum(self.ranks.gather(self.session.policy.calls), Calls())

    def cost(self) -> Row:
        return {"seconds": self.seconds, **vars(self.calls())}


def _mean(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each metric over the workers that have it."""
    names = dict.fromkeys(name for m in metrics for name in m)
    return {name: mean(m[name] for m in metrics if name in m) for name in names}
