"""The reward pool: replicas that hold the reward models and answer for everyone, with gradients where they are wanted.

Learners send pictures and get (r, dr/dpictures) back; the generation pool's pictures are scored by the same replicas.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydiff import fingerprint, placement
from raydiff.config import Run
from raydiff.contents import Contents, digests
from raydiff.core.policy import checked
from raydiff.core.reward_vjp import Parts, RewardError, score_and_grad, weighted_sum, with_remote_gradient
from raydiff.distributed import hangs, rows
from raydiff.distributed.generate import device, fault_of
from raydiff.distributed.hangs import Beat, started_again
from raydiff.distributed.ranks import PoolLost, plain
from raydiff.distributed.weights import SyncError
from raydiff.session import Scores, weights

RESTARTS = 10  # of one actor; without an end, a crash at every start would loop for ever
_PATIENCE, _PING = 20.0, 10.0  # seconds: for an answer, before a replica is asked whether it is there; and for that


@dataclass(frozen=True)
class Group:
    """Replicas that hold the same rewards."""

    names: tuple[str, ...]
    replicas: tuple[Any, ...]
    loaded: dict[str, str] = field(default_factory=dict)  # digests of their files
    held: dict[str, str] = field(default_factory=dict)  # of each reward in memory

    def __str__(self) -> str:
        return ", ".join(map(repr, self.names))


@dataclass
class _Request:
    images: np.ndarray  # (B,3,H,W)
    prompts: list[str]
    evaluation: bool
    gradient: bool
    answer: Any = None  # an asyncio.Future

    def like(self, other: _Request) -> bool:
        """Whether both can be one batch."""
        mine, theirs = ((r.evaluation, r.gradient, r.images.shape[1:], r.images.dtype) for r in (self, other))
        return mine == theirs


@dataclass
class _Answer:
    parts: dict[str, np.ndarray]  # (B,)
    gradient: np.ndarray | None  # of the weighted sum, (B,3,H,W)
    held: dict[str, str] = field(default_factory=dict)  # digest of each reward of the replica
    busy: float = 0.0  # seconds, the request's share
    idle: float = 0.0  # seconds that the replica had been waiting


class RewardReplica:
    """An actor with some of a run's rewards. Requests that wait together are answered as one batch.

    What it loads is compared with `contents`, and a fault there answers whoever asks.
    """

    def __init__(self, run: str, names: Sequence[str], contents: str | None = None) -> None:
        config = Run.model_validate_json(run)
        place = device(config.pools.reward.num_cpus)
        every = {**config.rewards.named, **config.evaluate.rewards}
        self.rewards = {name: every[name].build(place) for name in names}
        self.trained = {name: self.rewards[name] for name in names if name in config.rewards.named}
        self.weights, self.device, self.most = weights(config), place, config.evaluate.batch
        tables = [f"rewards.{name}" if name in self.trained else f"evaluate.rewards.{name}" for name in names]
        held = Contents({}) if contents is None else Contents.load(contents)
        self.loaded = digests(config, tables)
        self.held = {name: fingerprint.of_reward(reward) for name, reward in self.rewards.items()}
        self.fault = fault_of(lambda: held.compare(self.loaded))
        self.waiting: list[_Request] = []
        self.turn = asyncio.Lock()
        self.free_since = time.monotonic()
        self.busy_since: float | None = None

    async def ready(self) -> tuple[dict[str, str], dict[str, str]]:
        """Answers when the rewards are loaded, with the digests of their files, and of each reward in memory."""
        if self.fault is not None:
            raise self.fault
        return self.loaded, self.held

    async def busy(self) -> float:
        """Seconds that the rewards have been working at one batch, 0 when they are not: whoever waits asks this."""
        return 0.0 if self.busy_since is None else time.monotonic() - self.busy_since

    async def score(self, images: np.ndarray, prompts: list[str], evaluation: bool, gradient: bool) -> _Answer | RewardError:
        """Rewards of images (B,3,H,W) in [0,1]; `evaluation` asks for the held-out ones too."""
        if self.fault is not None:  # of a replica that was started again
            raise self.fault
        mine = _Request(images, prompts, evaluation, gradient, asyncio.get_running_loop().create_future())
        self.waiting.append(mine)
        async with self.turn:
            while not mine.answer.done():
                await self._serve()
        return mine.answer.result()

    async def _serve(self) -> None:
        """Answer the first request, and those behind it that fit into its batch."""
        first, size = self.waiting[0], 0
        batch: list[_Request] = []
        for request in self.waiting:
            if request.like(first) and (not batch or size + len(request.prompts) <= self.most):
                batch.append(request)
                size += len(request.prompts)
        self.waiting = [request for request in self.waiting if not any(request is b for b in batch)]
        self.busy_since = start = time.monotonic()
        answers = await asyncio.to_thread(self._answers, batch)
        end, self.busy_since = time.monotonic(), None
        for request, answer in zip(batch, answers, strict=True):
            if isinstance(answer, _Answer):
                answer.held = self.held
                answer.busy = (end - start) * len(request.prompts) / size
                answer.idle = (start - self.free_since) * len(request.prompts) / size
            request.answer.set_result(answer)
        self.free_since = end

    def _answers(self, batch: list[_Request]) -> list[_Answer | RewardError]:
        """Of each request. What raises together is asked apart, so one's fault is not the others'."""
        images = np.concatenate([request.images for request in batch])
        prompts = [prompt for request in batch for prompt in request.prompts]
        try:
            whole = self._call(images, prompts, batch[0])
        except RewardError as error:
            if len(batch) > 1:
                return [answer for request in batch for answer in self._answers([request])]
            return [error]
        cuts = np.cumsum([len(request.prompts) for request in batch])[:-1]
        parts = {name: np.split(values, cuts) for name, values in whole.parts.items()}
        gradients = [None] * len(batch) if whole.gradient is None else np.split(whole.gradient, cuts)
        return [_Answer({name: values[i] for name, values in parts.items()}, gradients[i]) for i in range(len(batch))]

    def _call(self, images: np.ndarray, prompts: list[str], request: _Request) -> _Answer:
        rewards = self.rewards if request.evaluation else self.trained
        score = weighted_sum(rewards, self.weights)
        pixels = torch.from_numpy(np.array(images)).to(self.device)
        if request.gradient:
            _, parts, gradient = score_and_grad(score)(pixels, prompts)
            return _Answer(_arrays(parts), gradient.cpu().numpy())
        with torch.no_grad():
            return _Answer(_arrays(score(pixels, prompts)[1]), None)


@dataclass
class _Silent:
    """A replica that does not answer: it has no place any more, or it hangs."""

    ping: Any  # is ready when the replica answers again
    since: float = field(default_factory=time.monotonic)
    killed: bool = False


class _Asked:
    """A share of a question, put to a replica; or to another one of its group when that one does not answer."""

    def __init__(self, client: RewardClient, first: int, group: Group, replica: Any, request: tuple[Any, ...]) -> None:
        self.client, self.first, self.group = client, first, group  # first: row of the share
        self.request = request
        self.ask(replica)

    def ask(self, replica: Any) -> None:
        self.replica, self.ref = replica, replica.score.remote(*self.request)

    def answer(self) -> _Answer | RewardError:
        """Raises PoolLost when the replica died too often."""
        import ray

        patience, silent = min(_PATIENCE, self.client.limit / 4), self.client.silent
        while not ray.wait([self.ref], timeout=patience)[0]:
            self.client.waits()
            if self.replica not in silent:
                silent[self.replica] = _Silent(self.replica.busy.remote())
            if ray.wait([silent[self.replica].ping], timeout=min(_PING, patience))[0]:
                self.client.watch(self.replica, hangs.answer(silent.pop(self.replica).ping) or 0.0)
                continue
            self.client.look()
            others = [replica for replica in self.group.replicas if replica is not self.replica and replica not in silent]
            if others:
                self.ask(others[0])
        return _answer(self.ref, self.group)


@dataclass
class RewardClient:
    """What a learner, or the pipeline, asks the pool through. Learners share the replicas out among themselves."""

    groups: Sequence[Group]
    weights: dict[str, float]
    held_out: frozenset[str]
    rank: int = 0
    workers: int = 1
    store: Any = None  # the weight store, which keeps the pools' counters
    limit: float = math.inf  # seconds after which a replica that does not answer, or works at one batch, hangs
    waits: Callable[[], None] = lambda: None  # called while replicas are waited for
    silent: dict[Any, _Silent] = field(default_factory=dict)

    def scores(self) -> Scores:
        """For a Session: exact gradients of rewards that are computed elsewhere."""
        return Scores(with_remote_gradient(self.score_and_grad, self.score), self.evaluate)

    def score(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
        total, parts, _ = self._ask(images, prompts, evaluation=False, gradient=False)
        return total, parts

    def evaluate(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts]:
        total, parts, _ = self._ask(images, prompts, evaluation=True, gradient=False)
        return total, parts

    def score_and_grad(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Parts, Tensor]:
        return self._ask(images, prompts, evaluation=False, gradient=True)

    def mine(self, replicas: Sequence[Any]) -> Sequence[Any]:
        """This learner's replicas: its share of many, or one that it shares with other learners."""
        there = [replica for replica in replicas if replica not in self.silent] or replicas
        first, last = (r * len(there) // self.workers for r in (self.rank, self.rank + 1))
        return there[first : max(last, first + 1)]

    def look(self) -> None:
        """Forget silent replicas that answer again, and start those again that have been silent for too long: each once, as one
        that waits for a place is silent too."""
        import ray

        for replica, silent in list(self.silent.items()):
            if ray.wait([silent.ping], timeout=0)[0]:
                del self.silent[replica]
            elif time.monotonic() - silent.since > self.limit and not silent.killed:
                silent.killed = True
                self.end(replica, f"has not answered for {self.limit:g} s")

    def watch(self, replica: Any, busy: float) -> None:
        """Start a replica again that has been working at one batch for too long."""
        if busy > self.limit:
            self.end(replica, f"has worked at one batch for {busy:.0f} s")

    def end(self, replica: Any, why: str) -> None:
        """Kill a replica, which Ray then starts again and asks anew."""
        import ray

        group = next(group for group in self.groups if replica in group.replicas)
        if self.store is not None:
            self.store.tell.remote(started_again(f"reward replica {group.replicas.index(replica)} with {group}", why))
        ray.kill(replica, no_restart=False)

    def _ask(self, images: Tensor, prompts: Sequence[str], *, evaluation: bool, gradient: bool) -> tuple[Tensor, Parts, Tensor]:
        """All groups at once, each picture by one replica of each."""

        start = time.monotonic()
        pixels = images.detach().cpu().numpy()
        asked: list[_Asked] = []
        self.look()
        for group in self.groups:
            if not evaluation and self.held_out.issuperset(group.names):
                continue
            replicas = self.mine(group.replicas)
            for rows_of in np.array_split(np.arange(len(prompts)), len(replicas)):
                if len(rows_of):
                    share, texts = pixels[rows_of[0] : rows_of[-1] + 1], [prompts[i] for i in rows_of]
                    request = (share, texts, evaluation, gradient)
                    asked.append(_Asked(self, int(rows_of[0]), group, replicas[len(asked) % len(replicas)], request))
        parts: dict[str, np.ndarray] = {}
        grads = np.zeros_like(pixels) if gradient else np.zeros(0)
        counters = {"images": len(prompts), "busy": 0.0, "idle": 0.0}
        for share_of in asked:
            first, given = share_of.first, share_of.answer()
            if isinstance(given, RewardError):
                raise RewardError(given.name, given.message, None if given.row is None else first + given.row)
            _require_same(share_of.group, given.held)
            for name, values in given.parts.items():
                parts.setdefault(name, np.zeros(len(prompts), values.dtype))[first : first + len(values)] = values
            if given.gradient is not None:
                grads[first : first + len(given.gradient)] += given.gradient
            counters["busy"] += given.busy
            counters["idle"] += given.idle
        if self.store is not None:
            self.store.report.remote(placement.REWARD, counters | {"waited": time.monotonic() - start})
        named = {name: torch.from_numpy(values).to(images.device) for name, values in parts.items()}
        total = torch.stack([self.weights[name] * part for name, part in named.items()]).sum(0)
        return total, named, torch.from_numpy(grads).to(images.device)


class Scorer:
    """The pipeline's scoring step: pictures out of a block, rewards in. The pool does the work, so it claims nothing."""

    def __init__(self, client: RewardClient, attempt: str, limit: float) -> None:
        self.client = client
        Beat(client.store, attempt, "scorer", limit)

    def __call__(self, block: rows.Columns) -> rows.Columns:
        if not len(block["ticket"]):
            return block
        images = torch.from_numpy(np.array(block["images"]))
        prompts = [str(prompt) for prompt in block["prompt"] for _ in range(images.shape[1])]
        total, parts = checked(self.client.score, images.flatten(0, 1), prompts, block["seeds"].flatten().tolist())
        shape = images.shape[:2]
        return rows.with_rewards(block, {name: r.view(shape).numpy() for name, r in {"total": total, **parts}.items()})


def start(run: Run, nodes: Sequence[placement.Node], held: Contents | None = None) -> list[Group]:
    """Start the reward pool, owned by the caller. Returns when all replicas have loaded. Raises what their loading raised, and
    ConfigError when they have loaded something else than `held`, or than each other."""
    import ray

    claim = placement.of(run, nodes, placement.REWARD)
    groups = []
    for rewards in placement.reward_groups(run):
        environment = next(iter(rewards.values())).runtime_env
        actor = ray.remote(
            num_cpus=claim.cpus,
            num_gpus=claim.gpus,
            label_selector=dict(claim.labels) or None,
            runtime_env=environment or None,
            max_restarts=RESTARTS,
            max_task_retries=-1,  # a node that is gone takes many tries to be called dead
        )(RewardReplica)
        arguments = run.model_dump_json(), tuple(rewards), held.dump() if held else None
        replicas = tuple(actor.remote(*arguments) for _ in range(run.pools.reward.replicas))
        groups.append(Group(tuple(rewards), replicas))
    return [_loaded(group) for group in groups]


def _loaded(group: Group) -> Group:
    """The group when all its replicas have loaded."""
    (files, held), *others = (_answer(ref, group) for ref in [replica.ready.remote() for replica in group.replicas])
    loaded = replace(group, loaded=files, held=held)
    for other_files, other_held in others:
        Contents(files).compare(other_files)
        _require_same(loaded, other_held)
    return loaded


def _require_same(group: Group, held: Mapping[str, str]) -> None:
    """Raise SyncError when a replica holds another reward than the group's first one did at the start."""
    if others := [name for name, digest in group.held.items() if held.get(name) != digest]:
        raise SyncError(
            f"a reward replica holds other weights of {', '.join(map(repr, others))} than the pool did at the start: were its"
            " files replaced for a while, or does it draw weights at random?"
        )


def client(
    run: Run,
    groups: Sequence[Group],
    store: Any,
    rank: int = 0,
    workers: int = 1,
    waits: Callable[[], None] = lambda: None,
) -> RewardClient:
    held_out = frozenset(run.evaluate.rewards)
    return RewardClient(groups, weights(run), held_out, rank, workers, store, run.train.timeout, waits)


def _answer(ref: Any, group: Group) -> Any:
    """ray.get, but a fault that says all by itself is raised as what it is, and PoolLost for a replica that is not started
    again."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise plain(error) or error from None
    except ray.exceptions.ActorDiedError as error:
        if (cause := plain(error)) is not None:
            raise cause from None
        raise PoolLost(
            f"a reward replica with {group} has died {RESTARTS + 1} times, and is not started again; the last time:"
            f" {_why(error)}"
        ) from None


def _why(error: Exception) -> str:
    """What Ray says of a death, without its identifiers."""
    text = " ".join(str(error).split())
    return text.rpartition("Worker exit detail: ")[2].rpartition("The actor is dead because ")[2][-500:]


def _arrays(parts: Parts) -> dict[str, np.ndarray]:
    return {name: part.detach().cpu().numpy() for name, part in parts.items()}
