"""DeepSpeed's gradients against plain torch's, at every ZeRO stage."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
from torch import Tensor

from raydiff.config import Run
from raydiff.distributed.engine import deepspeed_config
from tests.distributed.parity import plain

NOISY = {"sampler.eta": 1.0, "sampler.final_alpha": None}  # each step has a density
METHODS: dict[str, dict[str, object]] = {
    "draft": {}, "draft_k": {"method.k": 2}, "draft_lv": {"method.n": 2}, "diffusion_dpo": {"method.beta": 50},
    "d3po": NOISY, "ddpo": {"method.attempts": 2, **NOISY}, "rwr": {"method.attempts": 2, "method.beta": 50},
}  # fmt: skip
# ZeRO-3 is slow: of the methods that differ by their loss alone, one with a reference and one with advantages try it.
STAGES = {m: (2, 3) if m in ("diffusion_dpo", "ddpo") else (2,) if m in ("d3po", "rwr") else (0, 1, 2, 3) for m in METHODS}
MakeRun = Callable[..., Run]


def test_config_is_the_runs_geometry(tiny_run: MakeRun) -> None:
    run = tiny_run(changes={"batch.size": 24, "batch.micro": 3, "optimizer.max_grad_norm": 0.5, "train.zero_stage": 1})
    config = deepspeed_config(run, workers=4)
    assert config["train_batch_size"] == 24 == 3 * config["gradient_accumulation_steps"] * 4
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"]["stage"] == 1
    assert not {"bf16", "fp16", "optimizer", "scheduler"} & config.keys()


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_persistence_threshold_is_for_stage_3(tiny_run: MakeRun, stage: int) -> None:
    config = deepspeed_config(tiny_run(changes={"train.zero_stage": stage}), 1, persistence_threshold=0)
    assert (config["zero_optimization"].get("stage3_param_persistence_threshold") == 0) == (stage == 3)
    json.dumps(config)


@pytest.fixture(scope="module")
def gradients(tiny_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Tensor]]:
    """Gradients by job: "draft_k-2" is two workers at ZeRO-2, "draft_k-alone" one worker."""

    def run(method: str, stage: int, **changes: object) -> Run:
        # ZeRO-3 is slow: one method accumulates and has a step without gradient, which the others need not
        size, steps = (4, 3) if method == "draft_k" else (2, 2)
        small = {"batch.size": size, "batch.micro": 1, "sampler.steps": steps, "evaluate.images": 2, "train.zero_stage": stage}
        return tiny_run(method, {**METHODS[method], **small, **changes})

    two = {f"{method}-{stage}": run(method, stage) for method, stages in STAGES.items() for stage in stages}
    full = {"model": {"kind": "stable_diffusion", "path": run("draft", 2).model.path, "train": "full"}}
    two |= {f"full-{stage}": run("draft_k", stage, **full) for stage in (0, 2)}
    two |= {"full_dpo-3": run("diffusion_dpo", 3, **full)}  # whose reference is a frozen copy that DeepSpeed does not see
    one = {f"{method}-alone": run(method, 2) for method in METHODS}
    folder = tmp_path_factory.mktemp("parity")
    for world, runs in ((2, two), (1, one)):
        jobs = {name: {"run": r.model_dump(mode="json"), "round_trip": name.startswith("draft_lv")} for name, r in runs.items()}
        path = folder / f"jobs-{world}.json"
        path.write_text(json.dumps(jobs))
        command = [sys.executable, "-m", "tests.distributed.parity"]
        ranks = [
            subprocess.Popen(
                [*command, str(rank), str(world), str(path), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            for rank in range(world)
        ]
        said = [process.communicate(timeout=300)[0].decode() for process in ranks]
        assert all(process.returncode == 0 for process in ranks), "\n".join(text[-4000:] for text in said)
        print(*(line for line in said[0].splitlines() if line.endswith(" s")), sep="\n")
        (folder / "rendezvous").unlink(missing_ok=True)
    reference = {method: plain(two[f"{method}-2"]) for method in METHODS}
    reference |= {"full": plain(two["full-0"]), "full_dpo": plain(two["full_dpo-3"])}
    return lambda name: reference[name] if name in reference else safetensors.torch.load_file(folder / f"{name}.safetensors")


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative L2 over all tensors."""
    difference = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return (difference / sum(float(t.double().square().sum()) for t in b.values())) ** 0.5


CASES = [
    *((method, stage) for method, stages in STAGES.items() for stage in (*stages, "alone")),
    ("full", 0),
    ("full", 2),
    ("full_dpo", 3),
]


@pytest.mark.ray
@pytest.mark.parametrize(("method", "stage"), CASES)
def test_gradients_are_plain_torchs(gradients: Callable[[str], dict[str, Tensor]], method: str, stage: object) -> None:
    found, expected = gradients(f"{method}-{stage}"), gradients(method)
    error = distance(found, expected)
    norm = float(torch.stack([g.double().norm() for g in expected.values()]).norm())
    print(f"{method} {stage}: relative error {error:.1e}")
    assert norm > 0
    assert error < 1e-5
    assert float(found["norm"]) == pytest.approx(norm, rel=1e-5)


@pytest.mark.ray
def test_state_survives_a_round_trip_at_every_stage(gradients: Callable[[str], dict[str, Tensor]]) -> None:
    """The jobs themselves check that restored weights and moments continue bit for bit; here, what swapped weights draw."""
    pictures = [gradients(f"draft_lv-{stage}")["pictures"].int() for stage in range(4)]
    assert pictures[0].float().std() > 1
    for other in pictures[1:]:
        assert (other - pictures[0]).abs().max() <= 1
