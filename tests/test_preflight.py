"""What a run's parts do to each other is told before anything starts, by train, sweep, submit and plan alike."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydiff.config import ConfigError, Run, Sampler
from raydiff.distributed import generate_batch
from raydiff.models.stable_diffusion import Plugin
from raydiff.plan import plan
from raydiff.plan.clusters import Machine, Node
from raydiff.preflight import faults
from raydiff.session import Session

TRAJECTORY = {"sampler.eta": 1.0, "sampler.final_alpha": None}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
OWN = {"sampler.spacing": None, "sampler.final_alpha": None}
MISFITS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "beyond the last training step": (
        "draft_k", {"sampler.steps": 1000, "sampler.spacing": "leading"}, {},
        "sampler: steps = 1000: the leading grid with steps_offset = 1 begins at 1000, beyond the last of 1000 training steps",
    ),
    "more steps than training had": ("draft_k", {"sampler.steps": 1001}, {}, r"steps = 1001 is outside 1\.\.1000"),
    "a grid that is not followed": ("draft_k", OWN, {"use_karras_sigmas": True}, "sampler: the scheduler's own grid is not"),
    "no signal": ("draft_k", {}, {"rescale_betas_zero_snr": True}, "cannot start at zero signal"),
    "a flow grid has no spacing": ("draft_k", {"sampler.spacing": "leading"}, FLOW, "sampler.spacing = 'leading' has no meaning"),
    "a flow step without density": ("d3po", {**OWN, "sampler.eta": 1.0}, FLOW, "method.kind = 'd3po' needs the density"),
    "a step without density": ("ddpo", TRAJECTORY, {"set_alpha_to_one": True}, "step 3 of 4 is deterministic"),
    "no such target": ("draft_k", {"model.lora.targets": ["to_w"]}, {}, "model.lora.targets: the denoiser has no module named 'to_w'"),
    "a target that is no layer": ("draft_k", {"model.lora.targets": ["norm1"]}, {}, "^model.lora.targets = .*norm1.*GroupNorm"),
}  # fmt: skip


def with_scheduler(pipeline: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A copy of a pipeline with other fields of its scheduler; those with a class are all of it."""
    shutil.copytree(pipeline, folder)
    for name, part in (("scheduler/scheduler_config.json", None), ("model_index.json", "scheduler")):
        tree = json.loads((folder / name).read_text())
        if part is None:
            tree = changes if "_class_name" in changes else tree | changes
        elif "_class_name" in changes:
            tree[part] = ["diffusers", changes["_class_name"]]
        (folder / name).write_text(json.dumps(tree))
    return folder


@pytest.mark.parametrize("which", MISFITS)
def test_what_does_not_go_together_is_told_before_anything_starts(
    tiny_pipeline: Path, tiny_run: Callable[..., Run], tmp_path: Path, which: str
) -> None:
    method, changes, scheduler, message = MISFITS[which]
    folder = with_scheduler(tiny_pipeline, tmp_path / "model", scheduler)
    run = tiny_run(method, {**changes, "model.path": str(folder), "storage": str(tmp_path)})
    (fault,) = faults(run)
    assert re.search(message, fault)
    with pytest.raises(ValueError, match=message.partition(": ")[2] or message):
        Session(run)  # as a worker would find out
    assert plan(run, Machine("here", (Node(8),))).problems == (fault,)  # once


@pytest.mark.parametrize(
    ("method", "changes"), [("draft_k", {}), ("ddpo", TRAJECTORY), ("d3po", {**TRAJECTORY, **OWN, "sampler.eta": 1.0})]
)
def test_what_goes_together_is_no_fault(
    tiny_run: Callable[..., Run], tmp_path: Path, method: str, changes: dict[str, Any]
) -> None:
    assert faults(tiny_run(method, {**changes, "storage": str(tmp_path)})) == []


def test_pictures_on_ray_are_refused_a_grid_before_an_actor_starts(tiny_pipeline: Path, tmp_path: Path) -> None:
    sampler = Sampler(steps=1000, spacing="leading")
    with pytest.raises((ConfigError, ValueError), match="beyond the last of 1000 training steps"):
        generate_batch.generate(
            str(tmp_path / "x.parquet"), model=Plugin(path=str(tiny_pipeline)), sampler=sampler, prompts=["a"]
        )
    assert not list(tmp_path.iterdir())
