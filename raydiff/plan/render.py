"""A plan as rich tables."""

from __future__ import annotations

from typing import Any

from raydiff.placement import GENERATE
from raydiff.plan import Plan
from raydiff.plan.memory import gib


def render(plan: Plan) -> Any:
    """A rich renderable: the figures as tables, then problems and notes."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_row("run", plan.name)
    facts.add_row("batch", str(plan.geometry))
    if plan.parameters:
        others = ", ".join(f"{name} {_millions(n)}" for name, n in plan.parameters.items() if name != "trained")
        facts.add_row("trained", f"{plan.parameters['trained']:,} parameters (frozen: {others})")
    for claim in plan.claims:
        labels = f", on nodes with {', '.join(f'{k}={v}' for k, v in claim.labels.items())}" if claim.labels else ""
        facts.add_row(f"{claim.pool} pool", f"{claim}{labels}")
    cpus, gpus = (sum(c.replicas * each for c, each in zip(plan.claims, per, strict=True))
                  for per in ([c.cpus for c in plan.claims], [c.gpus for c in plan.claims]))  # fmt: skip
    needs = f"{cpus:g} CPUs" + (f", {gpus:g} GPUs" if gpus else "")
    facts.add_row("in all", f"{needs}; {plan.machine.where} has {plan.machine.cpus:g} CPUs, {plan.machine.gpus:g} GPUs")

    cost = Table(title="cost, in pictures", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, column in enumerate(("", "an update", f"an evaluation, {plan.evaluations} of them", "the run")):
        cost.add_column(column, justify="right" if i else "left")
    for name, label in (
        ("images", "sampled"), ("reward_queries", "reward queries"),
        ("denoiser_forward", "denoiser forward"), ("denoiser_backward", "denoiser backward"),
    ):  # fmt: skip
        cost.add_row(label, *(f"{getattr(calls, name):,}" for calls in (plan.update, plan.evaluation, plan.total)))

    parts: list[Any] = [facts, Text(), cost]
    if plan.memory is not None:
        m = plan.memory
        memory = Table(title="memory of a worker", title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
        memory.add_column()
        memory.add_column(justify="right")
        for label, size in (
            ("frozen weights", m.frozen), ("trained weights", m.trained), ("gradients", m.gradients), ("Adam", m.optimizer),
            ("moving average", m.ema), ("peak of a micro-batch", m.update), ("peak of an evaluation batch", m.evaluation),
            ("in all", m.total),
        ):  # fmt: skip
            memory.add_row(label, gib(size))
        if any(claim.pool == GENERATE for claim in plan.claims):
            memory.add_row("a generator, in all", gib(m.of_generator))
        parts += [Text(), memory]
    if plan.disk is not None:
        facts.add_row("storage", f"{gib(plan.disk)} of checkpoints and adapters")
    if plan.traffic:
        facts.add_row("an update moves", ", ".join(f"{gib(size)} of {what}" for what, size in plan.traffic.items()))
    parts += [Text(f"\nnote: {note}", style="dim") for note in plan.notes]
    parts += [Text(f"\ncannot work: {problem}", style="bold red") for problem in plan.problems]
    return Group(*parts)


def _millions(n: int) -> str:
    return f"{n / 1e6:.1f} M"
