"""What a run will do and need, before anything is loaded: geometry, cost, memory, files, cluster.

Nothing here repeats a method's arithmetic: the run's own method goes through `Session.update`, once on a stub of a few
numbers whose calls are counted, and once on the model's shapes (torch's meta device), whose live bytes are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from raydiff import placement, watch
from raydiff.config import Geometry, Run, geometry
from raydiff.core.policy import Calls
from raydiff.placement import Claim
from raydiff.plan.clusters import Machine
from raydiff.plan.cost import count
from raydiff.plan.memory import Memory, Model, gib, measure
from raydiff.preflight import faults, metrics_fault


@dataclass(frozen=True)
class Plan:
    name: str
    geometry: Geometry
    parameters: dict[str, int]  # by part, with "trained"; empty when the model's config is not at hand
    update: Calls
    evaluation: Calls
    evaluations: int
    total: Calls
    memory: Memory | None
    disk: int | None  # bytes of the checkpoints and adapters that a run keeps
    traffic: dict[str, int]
    """Bytes that an update moves between the pools, by what they are."""
    claims: tuple[Claim, ...]
    machine: Machine
    problems: tuple[str, ...]
    """Why the run cannot work, each with what to change."""
    notes: tuple[str, ...]
    """What the figures assume, and what could not be known."""


def plan(run: Run, machine: Machine) -> Plan:
    """Look at a run and at a machine, or at a cluster's resources. Loads no weights."""
    problems, notes = faults(run, hub=False) + placement.faults(run, machine.nodes, machine.where), []
    problems += [fault] if (fault := metrics_fault(run)) else []
    claims = placement.claims(run, machine.nodes)
    notes += _idle_generators(run) + _growth(run, machine)

    update, evaluation, probe = count(run)
    evaluations = 1 + sum(watch.due(run, s) for s in range(1, run.train.updates + 1))
    total = Calls(
        *(
            u * run.train.updates + e * evaluations + p
            for u, e, p in zip(*(vars(calls).values() for calls in (update, evaluation, probe)), strict=True)
        )
    )

    model: Model | None = None
    folder = run.model.config_folder()
    if folder is None:
        notes.append(
            f"model: {getattr(run.model, 'path', run.model.kind)!r} is neither a folder nor in the Hugging Face cache here:"
            " parameters and memory are not known until it is downloaded"
        )
    elif not any(fault.startswith(("model", "sampler", "method")) for fault in problems):
        model = measure(run, folder)
    if model is not None:
        problems += _too_big(run, machine, model.memory, gpu=claims[0].gpus > 0)
        notes.append(
            "memory: bytes live at once, traced on the model's shapes with flash-type attention; the allocator's slack (about"
            " a tenth), the CUDA context or the Python process (0.5-1 GiB), DeepSpeed's buckets and the rewards' own weights"
            " and activations come on top"
        )
    return Plan(
        run.name, geometry(run), model.parameters if model else {}, update, evaluation, evaluations, total,
        model.memory if model else None, _disk(run, model) if model else None, _traffic(run, model, update) if model else {},
        tuple(claims), machine, tuple(problems), tuple(notes),
    )  # fmt: skip


def _disk(run: Run, model: Model) -> int:
    """Bytes of a run's folder at its largest: the checkpoints that are kept and one that is written, and both adapters."""
    kinds = 3 + (run.optimizer.ema is not None) + 1  # weights, Adam's two moments, the average, the best weights
    return 4 * model.parameters["trained"] * (kinds * (run.train.keep_checkpoints + 1) + 2)


def _traffic(run: Run, model: Model, update: Calls) -> dict[str, int]:
    """Bytes between the pools in an update: weights out, latents in, pictures to the reward pool and gradients back."""
    found: dict[str, int] = {}
    if run.generation.where == "pool":
        found["weights"] = 4 * model.parameters["trained"] * (1 + run.pools.generate.replicas)
        kept = len(run.method.keep(run.sampler.steps, torch.Generator().manual_seed(0)))
        found["latents"] = 4 * update.images * kept * model.latent
    if run.rewards.where == "pool":
        both = 1 if run.method.needs_rewards else 2  # a reward's gradient is as large as its picture
        found["pictures and gradients"] = 4 * update.reward_queries * model.picture * both
    return found


def _growth(run: Run, machine: Machine) -> list[str]:
    """Whether a cluster that grows has to, for this run."""
    if machine.at_first is None or not (short := placement.faults(run, machine.at_first, f"{machine.where} at first")):
        return []
    return ["the cluster has to grow for this run, so submit it with --grows: " + "; ".join(short)]


def _idle_generators(run: Run) -> list[str]:
    """Generators that the staleness bound never lets work all at once."""
    blocks = run.batch.size // run.batch.micro
    most = blocks * (run.generation.max_staleness + 1)
    if run.generation.where != "pool" or run.pools.generate.replicas <= most:
        return []
    return [
        f"pools.generate.replicas = {run.pools.generate.replicas}: an update is {blocks} micro-batches, and with"
        f" generation.max_staleness = {run.generation.max_staleness} at most {most} are under way; the other generators idle."
        " Lower batch.micro, or allow more staleness"
    ]


def _too_big(run: Run, machine: Machine, memory: Memory, gpu: bool) -> list[str]:
    """Workers whose memory does not fit, with the batch that would."""
    if gpu:
        room, where = machine.gpu_memory, "a GPU"
    else:
        room, where = machine.memory and machine.memory // run.pools.train.replicas, f"a worker's share of {machine.where}"
    if room is None or memory.total <= room:
        return []
    found = []
    for peak, field, value in (
        (memory.update, "batch.micro", run.batch.micro), (memory.evaluation, "evaluate.batch", run.evaluate.batch),
    ):  # fmt: skip
        if memory.states + peak <= room:
            continue
        fits = max(0, (room - memory.states) * value // peak)
        if field == "batch.micro":
            fits = max((m for m in range(1, fits + 1) if run.batch.size % (m * run.pools.train.replicas) == 0), default=0)
        cheaper = " or train.gradient_checkpointing to true" if not run.train.gradient_checkpointing else ""
        remedy = f"set {field} to {fits}" if fits else f'set model.dtype to "bfloat16"{cheaper}, or use a larger machine'
        found.append(
            f"{field} = {value} needs about {gib(memory.states + peak)} of memory, and {where} has {gib(room)}: {remedy}"
        )
    return found
