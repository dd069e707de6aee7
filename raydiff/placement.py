"""Where a run's processes go: what each pool claims, and whether a machine or a cluster has room for all of them.

raydiff checks this before anything starts; Ray itself would wait forever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from raydiff.config import Pool, Run
from raydiff.rewards.base import RewardConfig

TRAIN, GENERATE, REWARD = "train", "generate", "reward"


@dataclass(frozen=True)
class Node:
    """One machine of a cluster, with everything that it has."""

    cpus: float
    gpus: float = 0
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """Processes of one pool, each with what it claims and the labels that its node must carry."""

    pool: str
    replicas: int
    cpus: float
    gpus: float
    labels: Mapping[str, str]
    options: bool = False  # its fields are options of a command, and not of a run file

    def named(self, field: str) -> str:
        """How a user sets one of its fields."""
        option = {"labels": "label"}.get(field, field).replace("_", "-")
        return f"--{option}" if self.options else f"pools.{self.pool}.{field}"

    def fits(self, node: Node) -> bool:
        return all(node.labels.get(key) == value for key, value in self.labels.items())

    def __str__(self) -> str:
        return f"{self.replicas} × ({self.cpus:g} CPUs{f', {self.gpus:g} GPUs' if self.gpus else ''})"


def claims(run: Run, nodes: Sequence[Node]) -> list[Claim]:
    """What the pools of a run claim on this cluster, the trainers first. The rest that raydiff starts claims nothing."""
    pools = run.pools
    found = [claim(TRAIN, pools.train, nodes)]
    if run.generation.where == "pool":
        found.append(claim(GENERATE, pools.generate, nodes))
    if run.rewards.where == "pool":
        found.append(claim(REWARD, pools.reward, nodes, groups=len(reward_groups(run))))
    return found


def of(run: Run, nodes: Sequence[Node], pool: str) -> Claim:
    """What one of the run's pools claims."""
    return next(claim for claim in claims(run, nodes) if claim.pool == pool)


def claim(name: str, pool: Pool, nodes: Sequence[Node], groups: int = 1, options: bool = False) -> Claim:
    """One pool's claim: where the run leaves GPUs open, one for each replica on a cluster that has any."""
    gpus = float(any(node.gpus >= 1 for node in nodes)) if pool.num_gpus is None else pool.num_gpus
    return Claim(name, pool.replicas * groups, pool.num_cpus, gpus, pool.labels, options)


def reward_groups(run: Run) -> list[dict[str, RewardConfig]]:
    """Rewards that share replicas: all that need no runtime environment, and by themselves those that need the same one."""
    groups: dict[str, dict[str, RewardConfig]] = {}
    for name, reward in {**run.rewards.named, **run.evaluate.rewards}.items():
        groups.setdefault(repr(reward.runtime_env), {})[name] = reward
    return list(groups.values())


def faults(run: Run, nodes: Sequence[Node], where: str) -> list[str]:
    """One line for each pool of a run that has no room beside the others; [] when all fit."""
    return no_room(claims(run, nodes), nodes, where)


def copies(run: Run, nodes: Sequence[Node], most: int) -> int:
    """How many copies of a run, up to `most`, have room at once."""
    each = claims(run, nodes)
    return next((n for n in range(most, 0, -1) if not no_room(each * n, nodes, "")), 0)


def no_room(claims: Sequence[Claim], nodes: Sequence[Node], where: str) -> list[str]:
    """One line for each claim that has no room beside the others, with the sum and the field to change; [] when all fit."""
    found = []
    for claim, left, placed in _placed(claims, nodes):
        if not left:
            there = sorted({f"{key}={value}" for node in nodes for key, value in node.labels.items() if key in claim.labels})
            found.append(
                f"{claim.named('labels')} = {dict(claim.labels)}: no node of {where} carries them"
                f"{'; there are ' + ', '.join(there) if there else ''}; start a node with them, or leave the labels empty"
            )
        elif placed < claim.replicas:
            found.append(_shortage(claim, placed, left, where))
    return found


def room(run: Run, nodes: Sequence[Node], pool: str) -> int:
    """How many of a pool's replicas have room beside the run's other pools."""
    return sum(placed for claim, _, placed in _placed(claims(run, nodes), nodes) if claim.pool == pool)


def _placed(claims: Sequence[Claim], nodes: Sequence[Node]) -> Iterator[tuple[Claim, list[tuple[float, float]], int]]:
    """Each claim, CPUs and GPUs that the others before it left on the nodes that it may use, and its replicas with room."""
    free = [[node.cpus, node.gpus] for node in nodes]
    # The choosy first: a pool without labels can go where the others leave room.
    for claim in sorted(claims, key=lambda c: (not c.labels, -c.gpus, -c.cpus)):
        able = [i for i, node in enumerate(nodes) if claim.fits(node)]
        left = [(free[i][0], free[i][1]) for i in able]
        yield claim, left, sum(_place(claim, free, able) for _ in range(claim.replicas))


def _place(claim: Claim, free: list[list[float]], able: list[int]) -> bool:
    """Put one replica on the node where it leaves the least of what is scarce."""
    fitting = [i for i in able if free[i][0] >= claim.cpus - 1e-9 and free[i][1] >= claim.gpus - 1e-9]
    if not fitting:
        return False
    best = min(fitting, key=lambda i: (free[i][1], free[i][0]))
    free[best][0] -= claim.cpus
    free[best][1] -= claim.gpus
    return True


def _shortage(claim: Claim, placed: int, left: list[tuple[float, float]], where: str) -> str:
    cpus, gpus = zip(*left, strict=True)
    need = f"{claim.replicas * claim.cpus:g} CPUs" + (f" and {claim.replicas * claim.gpus:g} GPUs" if claim.gpus else "")
    have = f"{sum(cpus):g} CPUs" + (f" and {sum(gpus):g} GPUs" if claim.gpus else "")
    if placed:
        way_out = f"set {claim.named('replicas')} to {placed}"
    elif claim.gpus > max(gpus):
        way_out = f"set {claim.named('num_gpus')} to {max(gpus):g}"
    else:
        way_out = f"set {claim.named('num_cpus')} to {max(cpus):g} or less" if max(cpus) > 0 else "use a larger machine"
    pool = "the pool" if claim.options else f"pools.{claim.pool}"
    return (
        f"{pool}: {claim} = {need}; {where} has {have} left for it on {len(cpus)} node{'s' if len(cpus) > 1 else ''},"
        f" room for {placed}: {way_out}, make the other pools smaller, or add nodes"
    )
