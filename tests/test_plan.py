"""plan: its counts and bytes are those of a real run, and what cannot work is refused with the number to change."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from raydiff.config import ConfigError, Run, geometry, load, override
from raydiff.core.policy import Calls
from raydiff.distributed import checkpoint, rows
from raydiff.distributed.storage import Folder
from raydiff.local import fit
from raydiff.placement import Node
from raydiff.plan import clusters, plan
from raydiff.plan.clusters import Machine
from raydiff.plan.cost import Backward
from raydiff.plan.memory import GIB, Live, Memory
from raydiff.plan.render import render
from raydiff.session import Session

Make = Callable[..., Run]
LAPTOP = Machine("this machine", (Node(8),), memory=16 * GIB)
GPUS = Machine("the cluster", (Node(64, 4),), gpu_memory=16 * GIB)
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("draft", {}),
    ("draft_k", {"method.k": 2, "sampler.guidance": 1.0}),
    ("draft_k", {"method.kl": 0.1, "train.gradient_checkpointing": False}),
    ("draft_lv", {"method.n": 3}),
    ("diffusion_dpo", {"method.attempts": 3}),
    ("rwr", {}),
    ("d3po", {"sampler.eta": 1.0, "sampler.final_alpha": None, "method.inner_epochs": 2}),
    ("ddpo", {"sampler.eta": 1.0, "sampler.final_alpha": None, "train.gradient_checkpointing": False}),
]


@pytest.mark.parametrize(("method", "changes"), METHODS)
def test_counts_are_those_of_a_real_run(tiny_run: Make, method: str, changes: dict[str, Any]) -> None:
    run = tiny_run(method, {"train.updates": 2, "evaluate.images": 2, **changes})
    *_, last = fit(run)
    planned = plan(run, LAPTOP)
    assert {name: n * 2 for name, n in vars(planned.update).items()} == {name: last[name] for name in vars(planned.update)}
    assert planned.evaluations == 2  # before, and after update 2
    assert planned.total.images == 2 * 4 * run.method.attempts + 2 * 2 + 2  # and the base model's, which drift is measured from


def test_a_drawn_point_is_averaged(tiny_run: Make) -> None:
    """ReFL at S = 4, guidance 2: i is 2 or 3, so 2-3 steps before it, one with gradient and its recomputation."""
    update = plan(tiny_run("refl", {"method.last_steps": 2, "train.updates": 16}), LAPTOP).update
    assert 4 * 2 * 4 <= update.denoiser_forward <= 4 * 2 * 5
    assert (update.images, update.denoiser_backward) == (4, 8)


@pytest.mark.parametrize("changes", [{}, {"model.train": "full"}, {"model.lora.rank": 5, "model.lora.targets": ["to_q"]}])
def test_trained_parameters_are_those_of_the_built_model(tiny_run: Make, changes: dict[str, Any]) -> None:
    run = tiny_run("draft_k", changes)
    built = run.model.build()
    parts = plan(run, LAPTOP).parameters
    assert parts["trained"] == sum(p.numel() for p in built.trained().values())
    everything = sum(p.numel() for m in (built.pipe.unet, built.pipe.vae, built.pipe.text_encoder) for p in m.parameters())
    assert sum(parts.values()) == everything


@pytest.mark.parametrize(("method", "changes"), METHODS)
def test_peak_is_that_of_a_real_micro_batch(tiny_run: Make, method: str, changes: dict[str, Any]) -> None:
    """The same count of live bytes over a real update: real kernels, walk and reward included."""
    run = tiny_run(method, {"batch.size": 2, **changes})
    estimate = plan(run, LAPTOP).memory
    session = Session(run)
    for p in session.model.trained().values():
        p.grad = torch.zeros_like(p)
    known = [
        t for m in vars(session.model.pipe).values() if isinstance(m, torch.nn.Module) for t in [*m.parameters(), *m.buffers()]
    ]
    with Live([*known, *(p.grad for p in session.model.trained().values())]) as live:
        session.update(Backward(), 0)
    assert estimate is not None
    assert estimate.update == pytest.approx(live.peak, rel=0.1)


def test_many_steps_with_gradient_are_extrapolated_well(tiny_run: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run("draft", {"sampler.steps": 8, "train.gradient_checkpointing": False})
    extrapolated = plan(run, LAPTOP).memory
    monkeypatch.setattr("raydiff.plan.memory._POINTS", 8)
    traced = plan(run, LAPTOP).memory
    assert extrapolated is not None
    assert traced is not None
    assert extrapolated.update == pytest.approx(traced.update, rel=0.02)


def test_states_follow_the_zero_stage_and_dtype(tiny_run: Make) -> None:
    def memory(**changes: Any) -> Memory:
        run = tiny_run(
            "draft_k", {"pools.train.replicas": 2, "batch.micro": 2, **{k.replace("_", ".", 1): v for k, v in changes.items()}}
        )
        found = plan(run, LAPTOP).memory
        assert found is not None
        return found

    zero = [memory(train_zero_stage=stage) for stage in range(4)]
    p = zero[0].trained
    assert [m.trained for m in zero] == [p, p, p, p / 2]
    assert [m.gradients for m in zero] == [p, p, p / 2, p / 2]
    assert [m.optimizer for m in zero] == [2 * p, 1.5 * p, 1.5 * p, 1.5 * p]  # Adam's two states, and ZeRO's flat fp32 copy
    half = memory(model_dtype="bfloat16", optimizer_ema=0.9)
    assert half.frozen == pytest.approx(zero[0].frozen / 2, rel=0.01)
    assert (half.trained, half.ema) == (p, p)
    assert half.update < 0.7 * zero[0].update


def test_what_cannot_be_known_is_said(tiny_run: Make) -> None:
    planned = plan(tiny_run("draft_k", {"model.path": "someone/not-here"}), LAPTOP)
    assert planned.memory is None
    assert not planned.problems
    assert "'someone/not-here' is neither a folder nor in the Hugging Face cache" in planned.notes[0]
    assert planned.update.images == 4  # what needs no weights is known all the same


def test_all_missing_files_are_listed(tiny_run: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    changes = {
        "model.path": str(tmp_path / "nowhere"),
        "prompts.train": str(tmp_path / "p.txt"),
        "storage": str(tmp_path / "file" / "runs"),
    }
    problems = "\n".join(plan(tiny_run("draft_k", changes), LAPTOP).problems)
    assert "model.path = " in problems
    assert "prompts.train = " in problems
    assert "cannot write there" in problems


def test_too_few_cpus_and_gpus_name_the_number(tiny_run: Make) -> None:
    run = tiny_run(
        "draft_k", {"pools.train.replicas": 4, "batch.micro": 1, "pools.train.num_cpus": 3, "pools.train.num_gpus": 1}
    )
    (gpus,) = plan(run, LAPTOP).problems
    assert "pools.train: 4 × (3 CPUs, 1 GPUs) = 12 CPUs and 4 GPUs; this machine has 8 CPUs and 0 GPUs left" in gpus
    assert "set pools.train.num_gpus to 0" in gpus
    assert not plan(run, GPUS).problems
    (cpus,) = plan(override(run, {"pools.train.num_gpus": 0}), LAPTOP).problems
    assert "room for 2: set pools.train.replicas to 2" in cpus


def test_too_little_memory_names_a_batch_that_fits(tiny_run: Make) -> None:
    run = tiny_run("draft_k", {"batch.size": 12, "batch.micro": 12, "evaluate.batch": 4})
    memory = plan(run, LAPTOP).memory
    assert memory is not None
    room = memory.states + memory.update // 2
    (problem,) = plan(run, Machine("this machine", (Node(8),), memory=room)).problems
    assert problem.startswith("batch.micro = 12 needs about")
    assert problem.endswith("set batch.micro to 6")
    tight = plan(run, Machine("this machine", (Node(8),), memory=memory.states)).problems[0]
    assert 'model.dtype to "bfloat16"' in tight


def test_impossible_runs_are_refused_while_parsed(tiny_run: Make) -> None:
    with pytest.raises(ConfigError, match=r"method\.k = 9 is more than sampler\.steps = 4"):
        tiny_run("draft_k", {"method.k": 9})
    with pytest.raises(ConfigError, match="set batch.size to 4 or 6"):
        tiny_run("draft_k", {"batch.size": 5})


def test_rendering_shows_figures_and_problems(tiny_run: Make) -> None:
    run = tiny_run("draft_k", {"pools.train.replicas": 2})
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render(plan(run, Machine("this machine", (Node(1),), memory=GIB))))
    text = console.export_text()
    assert str(geometry(run)) in text
    assert "denoiser forward" in text
    assert "cannot work: pools.train: 2 × (1 CPUs)" in text


def test_generators_that_can_never_all_work_are_told_of(tiny_run: Make) -> None:
    pool = {"generation.where": "pool", "generation.max_staleness": 1, "pools.generate.replicas": 5}
    (note,) = [n for n in plan(tiny_run("draft_k", pool), LAPTOP).notes if "generate" in n]
    assert "an update is 2 micro-batches, and with generation.max_staleness = 1 at most 4 are under way" in note
    assert not [n for n in plan(tiny_run("draft_k", {**pool, "batch.micro": 1}), LAPTOP).notes if "generate" in n]


ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["kuberay/raycluster.yaml", "kuberay/rayjob.yaml", "ray-up/aws.yaml", "ray-up/gcp.yaml"])
def test_clusters_of_files(name: str) -> None:
    machine = clusters.of_file(ROOT / "cluster" / name)
    assert machine.at_first is not None
    by_pool = [
        {pool: sum(node.labels.get("raydiff-pool") == pool for node in nodes) for pool in ("train", "generate", "reward")}
        for nodes in (machine.at_first, machine.nodes)
    ]
    assert by_pool == [{"train": 1, "generate": 4, "reward": 1}, {"train": 1, "generate": 8, "reward": 2}]
    assert {(node.gpus, node.cpus >= 3) for node in machine.nodes if node.labels} == {(1, True)}

    run = load(ROOT / "jobs/recipes/sd15_draft_lv_pools.toml")
    fits, grown, never = (plan(override(run, {"pools.generate.replicas": n}), machine) for n in (4, 8, 9))
    assert not [text for text in (*fits.problems, *fits.notes) if "pools." in text]
    assert [note for note in grown.notes if "has to grow" in note and "room for 4" in note]
    assert [problem for problem in never.problems if "room for 8: set pools.generate.replicas to 8" in problem]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "while parsing"),
        ("kind: Deployment", "neither a RayCluster"),
        ("available_node_types: {worker: {max_workers: 2}}", "group 'worker' does not tell its CPUs"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"(?s)x.yaml: .*{message}"):
        clusters.of_file(tmp_path / "x.yaml")


@pytest.mark.parametrize(("method", "changes"), METHODS[1:])
def test_traffic_is_what_the_pools_send(tiny_run: Make, method: str, changes: dict[str, Any]) -> None:
    """Against the rows of an update's blocks, and the calls of a reward that counts bytes."""
    pools = {"generation.where": "pool", "rewards.where": "pool", "pools.generate.replicas": 2}
    run = tiny_run(method, {**changes, **pools})
    session = Session(override(run, {"rewards.where": "learner", "generation.where": "learner"}))
    blocks = [rows.to_columns(session.sample(0, m), 0) for m in range(run.batch.size // run.batch.micro)]
    traffic = plan(run, Machine("", (Node(9),))).traffic
    assert traffic["latents"] == sum(block["latents"].nbytes for block in blocks)
    assert traffic["weights"] == 3 * sum(p.nbytes for p in session.model.trained().values())
    picture = session.model.decode(torch.zeros(1, *session.model.latent_shape)).nbytes
    both = 1 if run.method.needs_rewards else 2
    assert traffic["pictures and gradients"] == both * picture * plan(run, LAPTOP).update.reward_queries


def test_disk_is_what_checkpoints_take(tiny_run: Make, tmp_path: Path) -> None:
    run = tiny_run(changes={"optimizer.ema": 0.9, "train.keep_checkpoints": 2, "model.lora.rank": 16})
    trained = Session(run).model.trained()
    for step in (1, 2):
        tensors = dict.fromkeys(("parameters", "exp_avg", "exp_avg_sq", "ema", "best"), trained)
        checkpoint.save(Folder(tmp_path), tensors.items(), run=run, next_step=step, calls=Calls(), seconds=0.0, history=[])
    taken = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    planned = plan(run, LAPTOP).disk
    assert planned is not None
    assert 0.9 < (taken / 2 * 3 + 2 * sum(p.nbytes for p in trained.values())) / planned < 1.1
