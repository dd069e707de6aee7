"""The tree of a run: one table a subject, each field with what it does and in which unit."""

from __future__ import annotations

import math
import operator
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, field_validator, model_validator

from raydiff.config.base import Config, InputPath, MethodField, ModelField, RewardField, nearest

QUOTED = r"%[0-9A-Fa-f]{2}"
"""What MLflow reads as a quoted character in a path, and so as another path."""

_RESERVED = {
    "total": "the name of the weighted sum", "best": "the name of the best attempt's total", "where": "a setting of [rewards]",
}  # fmt: skip


def check_names(rewards: Iterable[str]) -> None:
    """Raise ValueError for a name that MLflow, the command line's dotted paths or another metric stand against."""
    seen: dict[str, str] = {}
    for name in rewards:
        if not re.fullmatch(r"\w[\w-]{0,99}", name):
            raise ValueError(
                f"{name!r} cannot be a reward's name, which MLflow and dotted paths must take: use letters, digits, _ and -, up"
                " to 100 of them, and begin with no -"
            )
        same = unicodedata.normalize("NFKC", name).casefold()
        if same in _RESERVED:
            raise ValueError(f"a reward cannot be named {name!r}, {_RESERVED[same]}; rename it")
        if same in seen:
            raise ValueError(
                f"rewards {seen[same]!r} and {name!r} differ only by case, which not every store tells apart: rename one"
            )
        seen[same] = name


class Rewards(Config):
    """Named rewards, `[rewards.NAME]`; the total is their weighted sum, and each part is logged."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, RewardField] = Field(init=False)

    where: Literal["learner", "pool"] = "learner"
    """Whether each training worker scores its own pictures, or asks the pool of `[pools.reward]`, for gradients too."""

    @property
    def named(self) -> dict[str, RewardField]:
        return self.__pydantic_extra__

    @model_validator(mode="after")
    def _names(self) -> Self:
        check_names(self.named)
        return self


class Generation(Config):
    """Where training's samples come from."""

    where: Literal["learner", "pool"] = "learner"
    """Whether each training worker samples for itself, or the pool of `[pools.generate]` does, while the learner trains.
    With the DRaFT family the pool samples up to the step where the gradient starts, and the learner continues from there."""
    max_staleness: int = Field(1, ge=0)
    """Strict bound on the updates by which a sample's weights may be older than the weights that it trains. 0 is on-policy:
    the pool then idles while the learner trains."""


class Pool(Config):
    """Replicas of one kind of worker, and where they go."""

    replicas: int = Field(1, ge=1)
    num_cpus: float = Field(1, gt=0)
    """CPUs that each replica claims."""
    num_gpus: float | None = Field(None, ge=0)
    """GPUs that each replica claims, a fraction to share one. None: 1 when the cluster has any, else 0."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Node labels that a replica's node must carry, e.g. {raydiff-pool = "generate"}. Empty: any node."""

    @field_validator("num_gpus")
    @classmethod
    def _whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("more than one GPU can only be claimed whole; use a fraction below 1, or a whole number")
        return gpus


class TrainPool(Pool):
    min_replicas: int | None = Field(None, ge=1)
    """The fewest workers that continue when nodes are lost. Each then takes more micro-batches, so that the batch stays the
    same. None: wait for new nodes."""
    ports: tuple[int, int] = (29500, 29599)
    """First and last of the ports at which a node takes the workers' first connection, one for each run there. They pass
    messages at ports that the kernel picks. Both only on the node's address in the cluster: see docs/clusters.md."""

    @field_validator("ports")
    @classmethod
    def _ascending(cls, ports: tuple[int, int]) -> tuple[int, int]:
        if not 1024 <= ports[0] <= ports[1] <= 65535:
            raise ValueError("the first and the last of some ports, between 1024 and 65535; e.g. [29500, 29599]")
        return ports

    @model_validator(mode="after")
    def _fewer(self) -> Self:
        if self.min_replicas is not None and self.min_replicas > self.replicas:
            raise ValueError(f"min_replicas = {self.min_replicas} is more than replicas = {self.replicas}")
        return self


class Pools(Config):
    """Who runs where. The generate and reward pools are started only when `generation.where` and `rewards.where` say so."""

    train: TrainPool = TrainPool()
    """The workers that share each batch and, by ZeRO, the optimiser."""
    generate: Pool = Pool()
    reward: Pool = Pool()


class Prompts(Config):
    """Where prompts come from: "embedded", a .txt (one a line) or .parquet (column `prompt`) file, or a list."""

    train: InputPath | tuple[str, ...] = "embedded"
    """Prompts to train on, drawn in shuffled passes."""
    held_out: InputPath | tuple[str, ...] = "embedded"
    """Prompts for evaluation only; one that is in `train` too is refused."""


class Pairs(Config):
    """Labelled pairs of pictures, which `method.source = "dataset"` trains on in place of samples."""

    path: InputPath | None = None
    """Parquet file, or folder of them, in the schema of raydiff.data.preferences; `raydiff pairs` makes one."""
    split: str | None = None
    """Split to use where `path` is a folder of several splits in Hugging Face's layout, e.g. "train"; "all" for all."""
    outside: bool = False
    """Whether pictures that are given by path may lie anywhere. Otherwise they must lie below the dataset's folder, also where
    a link leads there."""
    max_bad_rows: int = Field(100, ge=0)
    """Rows that may be left out, for a broken or too small picture, before training is refused. A file lists them."""
    enlarge: bool = False
    """Scale pictures up that are smaller than the model's, in place of leaving their rows out. Larger ones are always scaled
    down, the shorter side to the model's size, and cut from the centre."""
    flip: bool = False
    """Mirror half of the pairs, both pictures alike, chosen anew each time a pair is used. The cache of latents is twice as
    large."""
    cache: str | None = None
    """Folder for the latents, on a disk that every worker sees; None: `path` with ".latents" behind it."""


class Sampler(Config):
    """The sampling grid, for training and evaluation alike."""

    steps: int = Field(50, ge=1)
    """Denoising steps S."""
    guidance: float = Field(7.5, ge=0)
    """Classifier-free guidance scale; 1 turns guidance off and halves the cost."""
    eta: float = Field(0.0, ge=0, le=1)
    """0 = DDIM, deterministic; 1 = DDPM's posterior noise."""
    spacing: Literal["leading", "trailing", "linspace"] | None = "trailing"
    """How the grid's points are spaced; None takes the model's own. On Stable Diffusion's usual leading grid the last step is
    so small that a DRaFT-1 gradient is an eleventh of the one here."""
    final_alpha: float | None = Field(1.0, gt=0, le=1)
    """alpha-bar at the clean end; None takes the model's own. 1 makes the last step land on x0_hat."""
    detach_negative: bool = False
    """Stop the gradient through the unconditional half of guidance."""


class Batch(Config):
    """size = micro × accumulation × workers (pools.train.replicas)."""

    size: int = Field(8, ge=1)
    """Prompts per update, over all workers. Each brings `method.attempts` samples."""
    micro: int = Field(4, ge=1)
    """Prompts per forward and backward pass of one worker."""


class Optimizer(Config):
    """AdamW."""

    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    """The global gradient norm is clipped to this."""
    warmup: int = Field(0, ge=0)
    """Updates over which the learning rate rises linearly to `lr`, optimiser step by optimiser step."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: hold, or fall to 0 at the last update."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the trained weights, which then is what is evaluated and exported."""


@dataclass(frozen=True)
class Threshold:
    """A condition on one metric: `NAME < NUMBER`, or with <=, > or >=."""

    metric: str
    sign: str
    value: float

    SIGNS: ClassVar[dict[str, Callable[[float, float], bool]]] = {
        "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
    }  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> Threshold:
        """Raises ValueError when the text is no such condition."""
        if not (found := re.fullmatch(r"\s*([^\s<>=]+)\s*([<>=!]+)\s*(\S+)\s*", text)):
            raise ValueError(f'{text!r} is not a condition; write "NAME < NUMBER", e.g. "held_out/alignment < 0.2"')
        metric, sign, number = found.groups()
        if sign not in cls.SIGNS:
            raise ValueError(f"{text!r}: {sign!r} is no comparison; there are {', '.join(cls.SIGNS)}")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{text!r}: {number!r} is not a finite number")
        return cls(metric, sign, value)

    def holds(self, value: float) -> bool:
        return self.SIGNS[self.sign](value, self.value)


class Train(Config):
    """How long, and on what."""

    updates: int = Field(100, ge=1)
    stop_when: tuple[str, ...] = ()
    """Conditions on metrics, e.g. ["held_out/alignment < 0.2", "drift > 0.5"], looked at after each evaluation: when one holds,
    the run ends there as finished. Against over-optimisation."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """DeepSpeed ZeRO: 0 = data parallel, 1 shards optimiser states, 2 also gradients, 3 also parameters."""
    checkpoint_every: int = Field(10, ge=1)
    """Updates between checkpoints; the last update always makes one."""
    keep_checkpoints: int = Field(2, ge=1)
    max_failures: int = Field(3, ge=0)
    """Restarts after a lost worker before the run gives up."""
    timeout: float = Field(1800.0, ge=1)
    """Seconds in which every process of the run must show progress: a worker, a generator at its micro-batch, a reward replica
    at its pictures, the weight store. One that hangs is started again. Must exceed the time rank 0 needs to write a
    checkpoint."""
    zero_gradient: Literal["refuse", "accept"] = "refuse"
    """What to do with an update whose whole gradient is exactly 0 though its samples differ. "refuse" ends the run: numbers too
    small for `model.dtype` and rewards that depend on nothing look like that. "accept" continues: every pair may be beyond the
    clip."""
    gradient_checkpointing: bool = True
    """Recompute activations step by step in the backward pass: memory flat in K for about a third more compute."""

    @field_validator("stop_when")
    @classmethod
    def _conditions(cls, conditions: tuple[str, ...]) -> tuple[str, ...]:
        for text in conditions:
            Threshold.parse(text)
        return conditions


class Evaluate(Config):
    """Held-out prompts with fixed seeds, the same pictures at every evaluation."""

    every: int = Field(10, ge=1)
    """Updates between evaluations; before the first and after the last update there is always one."""
    images: int = Field(32, ge=1)
    """Pictures to score: held-out prompts in order, each with its own seed."""
    batch: int = Field(16, ge=1)
    """Pictures sampled at once by one worker."""
    grid: int = Field(16, ge=0)
    """Of these, how many go into the picture grid."""
    seed: int = 1_000_003
    rewards: dict[str, RewardField] = Field(default_factory=dict)
    """Rewards that are measured and never trained on: the guard against over-optimisation."""
    best: str | None = None
    """held_out/NAME, whose highest value after an update marks the weights that are kept as adapter_best. None: the first of
    `rewards`, else held_out/total."""
    drift_images: int = Field(8, ge=0)
    """How many of the pictures form the fixed probe for the metrics `drift` and `latent_norm`, which measure how far training
    has moved from the base model. Each costs four denoiser calls at every evaluation, and is sampled once by the base model.
    0 turns it off."""
    clip: InputPath | None = "embedded"
    """CLIP whose image embeddings measure `diversity`, the mean cosine distance of the pictures' pairs: "embedded", a folder or
    a hub id. A field of its own, as rewards may live in a pool and need not be a CLIP. None turns it off."""

    @field_validator("rewards")
    @classmethod
    def _names(cls, rewards: dict[str, RewardField]) -> dict[str, RewardField]:
        check_names(rewards)
        return rewards

    @property
    def best_metric(self) -> str:
        return self.best or f"held_out/{next(iter(self.rewards), 'total')}"


class Tracking(Config):
    """MLflow."""

    uri: str | None = None
    """Tracking server; None keeps a SQLite file in the storage folder."""
    experiment: str = Field("raydiff", max_length=500)
    """Its name in MLflow. Without a server, its artifacts go below a folder of this name in the storage."""

    @property
    def served(self) -> bool:
        """Whether a server keeps the artifacts, and not the storage."""
        return self.uri is not None and self.uri.startswith(("http:", "https:", "databricks"))

    @model_validator(mode="after")
    def _inside(self) -> Self:
        """A server's experiments may be paths; a folder's name must not lead out of the storage."""
        if not self.experiment.isprintable() or not self.experiment.strip():
            raise ValueError(f"experiment = {self.experiment!r} is not a printable name; rename it")
        parts = self.experiment.split("/")
        if not self.served and any(part.strip() in ("", ".", "..") or len(part.encode()) > 255 for part in parts):
            raise ValueError(
                f"experiment = {self.experiment!r} must be a folder below the storage: leave out '..', a '/' at either end and"
                " long names, or name a server in tracking.uri"
            )
        if not self.served and re.search(QUOTED, self.experiment):
            raise ValueError(
                f"experiment = {self.experiment!r} holds a % that MLflow takes for a quoted character; leave it out"
            )
        return self


class Run(Config):
    """A whole fine-tuning run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Recipe's name; a started run appends a time stamp, so a fresh run never continues another by accident."""
    seed: int = Field(0, ge=0)
    storage: str = "runs"
    """Folder, or any URI that pyarrow writes to, for checkpoints, pictures and the adapter."""
    model: ModelField
    method: MethodField
    rewards: Rewards
    """What scores the training samples. With `method.source = "dataset"` labels decide instead: these rewards are then only
    evaluated, and there may be none."""
    prompts: Prompts = Prompts()
    pairs: Pairs = Pairs()
    sampler: Sampler = Sampler()
    generation: Generation = Generation()
    pools: Pools = Pools()
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    tracking: Tracking = Tracking()

    @model_validator(mode="before")
    @classmethod
    def _rewards_where_needed(cls, data: Any) -> Any:
        """A run on a dataset may leave the table out."""
        method = data.get("method") if isinstance(data, Mapping) else None
        labelled = isinstance(method, Mapping) and method.get("source") == "dataset"
        return {"rewards": {}, **data} if labelled else data

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        geometry(self)
        if not self.rewards.named and not self.method.labelled:
            raise ValueError('rewards: there is none; a reward is a table, [rewards.NAME] with kind = "..."')
        if twice := self.rewards.named.keys() & self.evaluate.rewards.keys():
            raise ValueError(f"evaluate.rewards: {sorted(twice)} is trained on too; a held-out reward needs another name")
        check_names([*self.rewards.named, *self.evaluate.rewards])
        measured = [f"held_out/{name}" for name in ("total", *self.rewards.named, *self.evaluate.rewards)]
        if self.evaluate.best_metric not in measured:
            best = self.evaluate.best_metric
            raise ValueError(f"evaluate.best = {best!r} is not measured{nearest(best, measured)}")
        for part in (self.model, self.method, *self.rewards.named.values(), *self.evaluate.rewards.values()):
            part.check(self)
        return self


class Geometry(Config):
    """The numbers that follow from a run: size = micro × accumulation × workers, and the optimiser's steps on it."""

    micro: int
    accumulation: int
    """Micro-batches that a worker samples for an update."""
    workers: int
    size: int
    minibatches: int = 1
    inner_epochs: int = 1

    @property
    def step_accumulation(self) -> int:
        """Micro-batches of one worker that an engine accumulates before the optimiser moves."""
        return self.accumulation // self.minibatches

    @property
    def optimizer_steps(self) -> int:
        """Of one update. Checkpoints, tickets and history count updates; the optimiser and its schedule count these."""
        return self.minibatches * self.inner_epochs

    def __str__(self) -> str:
        steps = f", {self.optimizer_steps} optimiser steps" if self.optimizer_steps > 1 else ""
        return (
            f"{self.size} prompts an update = {self.micro} a micro-batch × {self.accumulation} accumulated"
            f" × {self.workers} worker{'s' if self.workers > 1 else ''}{steps}"
        )


def geometry(run: Run, workers: int | None = None) -> Geometry:
    """Batch geometry of a run. Raises ValueError, with numbers that would do, when the batch cannot be divided."""
    workers, size, micro = workers or run.pools.train.replicas, run.batch.size, run.batch.micro
    if size % (micro * workers):
        unit = micro * workers
        lower, upper = size // unit * unit, (size // unit + 1) * unit
        nearest = f"{lower} or {upper}" if lower else f"{upper}"
        raise ValueError(
            f"batch.size = {size} is not divisible by batch.micro × pools.train.replicas = {micro} × {workers} = {unit}:"
            f" set batch.size to {nearest}, or change batch.micro or pools.train.replicas"
        )
    accumulation, minibatches = size // (micro * workers), run.method.minibatches
    if accumulation % minibatches:
        divisors = [str(n) for n in range(1, accumulation + 1) if accumulation % n == 0]
        raise ValueError(
            f"method.minibatches = {minibatches} does not divide the {accumulation} micro-batches that each worker has of"
            f" batch.size = {size}: set it to {' or '.join(divisors)}, or batch.size to {micro * workers * minibatches}"
        )
    return Geometry(
        micro=micro, accumulation=accumulation, workers=workers, size=size,
        minibatches=minibatches, inner_epochs=run.method.inner_epochs,
    )  # fmt: skip
