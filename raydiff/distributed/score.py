"""The reward pool: replicas that hold the reward models and answer for everyone, with gradients where they are wanted.

Learners send pictures and get (r, dr/dpictures) back; the generation pool's pictures are scored by the same replicas.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydiff import placement
from raydiff.config import Run
from raydiff.contents import Contents, digests
from raydiff.core.policy import checked
from raydiff.core.reward_vjp import Parts, RewardError, score_and_grad, weighted_sum, with_remote_gradient
from raydiff.distributed import rows
from raydiff.distributed.generate import device, fault_of
from raydiff.distributed.ranks import plain
from raydiff.session import Scores, weights

RESTARTS = 10  # of one actor; without an end, a crash at every start would loop for ever
_PATIENCE, _PING = 20.0, 10.0  # seconds: for an answer, before a replica is asked whether it is there; and for that


@dataclass(frozen=True)
class Group:
    """Replicas that hold the same rewards."""

    names: tuple[str, ...]
    replicas: tuple[Any, ...]
    loaded: dict[str, str] = field(default_factory=dict)  # digests of their files


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
        self.fault = fault_of(lambda: held.compare(self.loaded))
        self.waiting: list[_Request] = []
        self.turn = asyncio.Lock()
        self.free_since = time.monotonic()

    async def ready(self) -> dict[str, str]:
        """Answers when the rewards are loaded, with the digests of their files."""
        if self.fault is not None:
            raise self.fault
        return self.loaded

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
        start = time.monotonic()
        answers = await asyncio.to_thread(self._answers, batch)
        end = time.monotonic()
        for request, answer in zip(batch, answers, strict=True):
            if isinstance(answer, _Answer):
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


class _Asked:
    """A share of a question, put to a replica; or to another one of its group when that one has no place any more."""

    def __init__(self, first: int, group: Group, replica: Any, request: tuple[Any, ...]) -> None:
        self.first, self.group, self.replica, self.request = first, group, replica, request  # first: row of the share
        self.ref = replica.score.remote(*request)

    def answer(self, lost: dict[Any, Any]) -> _Answer | RewardError:
        """Adds to `lost` a replica that has no place, with what is ready when it has one again."""
        import ray

        while not ray.wait([self.ref], timeout=_PATIENCE)[0]:
            ping = lost.get(self.replica, self.replica.ready.remote())  # a busy replica answers this too
            others = [replica for replica in self.group.replicas if replica is not self.replica and replica not in lost]
            if not ray.wait([ping], timeout=_PING)[0] and others:
                lost[self.replica] = ping
                self.replica, self.ref = others[0], others[0].score.remote(*self.request)
        return _answer(self.ref)


@dataclass
class RewardClient:
    """What a learner, or the pipeline, asks the pool through. Learners share the replicas out among themselves."""

    groups: Sequence[Group]
    weights: dict[str, float]
    held_out: frozenset[str]
    rank: int = 0
    workers: int = 1
    store: Any = None  # the weight store, which keeps the pools' counters
    lost: dict[Any, Any] = field(default_factory=dict)  # replicas without a place, with what is ready when they are back

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
        there = [replica for replica in replicas if replica not in self.lost] or replicas
        first, last = (r * len(there) // self.workers for r in (self.rank, self.rank + 1))
        return there[first : max(last, first + 1)]

    def _look(self) -> None:
        """Forget lost replicas that are back."""
        import ray

        self.lost = {replica: ping for replica, ping in self.lost.items() if not ray.wait([ping], timeout=0)[0]}

    def _ask(self, images: Tensor, prompts: Sequence[str], *, evaluation: bool, gradient: bool) -> tuple[Tensor, Parts, Tensor]:
        """All groups at once, each picture by one replica of each."""

        start = time.monotonic()
        pixels = images.detach().cpu().numpy()
        asked: list[_Asked] = []
        self._look()
        for group in self.groups:
            if not evaluation and self.held_out.issuperset(group.names):
                continue
            replicas = self.mine(group.replicas)
            for rows_of in np.array_split(np.arange(len(prompts)), len(replicas)):
                if len(rows_of):
                    share, texts = pixels[rows_of[0] : rows_of[-1] + 1], [prompts[i] for i in rows_of]
                    request = (share, texts, evaluation, gradient)
                    asked.append(_Asked(int(rows_of[0]), group, replicas[len(asked) % len(replicas)], request))
        parts: dict[str, np.ndarray] = {}
        grads = np.zeros_like(pixels) if gradient else np.zeros(0)
        counters = {"images": len(prompts), "busy": 0.0, "idle": 0.0}
        for share_of in asked:
            first, answer = share_of.first, share_of.answer(self.lost)
            if isinstance(answer, RewardError):
                raise RewardError(answer.name, answer.message, None if answer.row is None else first + answer.row)
            for name, values in answer.parts.items():
                parts.setdefault(name, np.zeros(len(prompts), values.dtype))[first : first + len(values)] = values
            if answer.gradient is not None:
                grads[first : first + len(answer.gradient)] += answer.gradient
            counters["busy"] += answer.busy
            counters["idle"] += answer.idle
        if self.store is not None:
            self.store.report.remote(placement.REWARD, counters | {"waited": time.monotonic() - start})
        named = {name: torch.from_numpy(values).to(images.device) for name, values in parts.items()}
        total = torch.stack([self.weights[name] * part for name, part in named.items()]).sum(0)
        return total, named, torch.from_numpy(grads).to(images.device)


class Scorer:
    """The pipeline's scoring step: pictures out of a block, rewards in. The pool does the work, so it claims nothing."""

    def __init__(self, client: RewardClient) -> None:
        self.client = client

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

    claim = next(c for c in placement.claims(run, nodes) if c.pool == placement.REWARD)
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
    first, *others = _answer([replica.ready.remote() for replica in group.replicas])
    for other in others:
        Contents(first).compare(other)
    return replace(group, loaded=first)


def client(run: Run, groups: Sequence[Group], store: Any, rank: int = 0, workers: int = 1) -> RewardClient:
    return RewardClient(groups, weights(run), frozenset(run.evaluate.rewards), rank, workers, store)


def _answer(ref: Any) -> Any:
    """ray.get, but a fault that says all by itself is raised as what it is."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise plain(error) or error from None


def _arrays(parts: Parts) -> dict[str, np.ndarray]:
    return {name: part.detach().cpu().numpy() for name, part in parts.items()}
