"""Training on a dataset of labelled pairs: it learns the labels, costs no sampling, and is the same on any split."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

import raydiff
from raydiff.config import ConfigError, Run, load, override
from raydiff.core.denoising import noised
from raydiff.core.learner import TorchEngine
from raydiff.core.rollouts import Rollouts
from raydiff.data import feedback, pickapic, preferences
from raydiff.data.prompts import slots
from raydiff.models.lora import WEIGHTS
from raydiff.placement import Node
from raydiff.plan import plan
from raydiff.plan.clusters import Machine
from raydiff.plan.cost import Backward
from raydiff.plan.memory import GIB, Live
from raydiff.preflight import faults
from raydiff.session import Session
from tests.data import shards
from tests.tiny import make_pipeline

Make = Callable[..., Run]
LAPTOP = Machine("this machine", (Node(8),), memory=16 * GIB)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shards.pairs(tmp_path_factory.mktemp("pairs") / "p.parquet", 24)


@pytest.fixture
def labelled(tiny_run: Make, pairs: Path) -> Make:
    """labelled("sft", {...}): a tiny run on the pairs."""

    def make(method: str = "diffusion_dpo", changes: dict[str, Any] | None = None) -> Run:
        return tiny_run(method, {"method.source": "dataset", "pairs.path": str(pairs), **(changes or {})})

    return make


def prepared(run: Run, **options: Any) -> Session:
    session = Session(run, **options)
    session.prepare()
    return session


def test_a_sample_is_a_micro_batch_of_labelled_pairs(labelled: Make) -> None:
    session = prepared(labelled(changes={"batch.size": 24, "batch.micro": 4}))
    parts = [session.sample(0, m) for m in range(6)]
    batch = Rollouts.cat(parts)
    assert batch.latents.shape == (24, 2, 1, *session.model.latent_shape) and batch.kept == (4,)
    assert batch.total().sort(1).values.tolist() == [[0.0, 1.0]] * 24
    assert vars(session.policy.calls) == {"images": 0, "reward_queries": 0, "denoiser_forward": 0, "denoiser_backward": 0}
    # A pass is each pair once, and the next one another order of them.
    rows = [tuple(r.tolist()) for r in batch.latents.mean((2, 3, 4, 5))]
    assert len(set(rows)) == 24
    second = Rollouts.cat([session.sample(1, m) for m in range(6)])
    assert sorted(second.prompts) == sorted(batch.prompts) and second.prompts != batch.prompts
    assert not torch.equal(batch.seeds, second.seeds)
    again = prepared(session.run).sample(0, 3)
    assert torch.equal(again.latents, parts[3].latents) and torch.equal(again.seeds, parts[3].seeds)


def test_a_pair_that_comes_again_is_drawn_anew(labelled: Make) -> None:
    """An epoch later the same pair has other seeds, and with them another posterior sample, step and noise."""
    run = labelled(changes={"batch.size": 24, "batch.micro": 24})
    session = prepared(run)
    first, second = session.sample(0, 0), session.sample(1, 0)
    order, later = ([row for row, _ in slots(run, 24, step)] for step in (0, 1))
    second = second.select([later.index(row) for row in order])
    assert first.prompts == second.prompts and torch.equal(first.total(), second.total())
    assert not {*first.flat_seeds()} & {*second.flat_seeds()}
    a, b = (
        noised(session.policy, batch.at(4), batch.flat_prompts(), batch.loss_seeds(shared=True), 0.0)
        for batch in (first, second)
    )
    moved = [(one - other).flatten(1).norm(dim=1) for one, other in ((first.at(4), second.at(4)), (a.target, b.target))]
    assert all(float(m.min()) > 0 for m in moved)
    assert int((a.time != b.time).sum()) > 40  # of 48; two draws of 1000 steps may agree


def test_other_workers_share_the_same_update_and_resumption_changes_nothing(labelled: Make) -> None:
    run = labelled(changes={"batch.size": 8, "batch.micro": 2})
    one = list(prepared(run).batches(1))
    two = [list(prepared(run, rank=rank, workers=2).batches(1)) for rank in (0, 1)]
    interleaved = [batch for together in zip(*two, strict=True) for batch in together]
    for a, b in zip(one, interleaved, strict=True):
        assert torch.equal(a.latents, b.latents) and a.prompts == b.prompts and torch.equal(a.total(), b.total())
    late = prepared(run)
    assert [b.prompts for b in late.batches(2)] == [b.prompts for b in prepared(run).batches(2)]


@pytest.mark.parametrize("flip", [False, True])
def test_fit_is_the_same_on_two_workers(labelled: Make, flip: bool) -> None:
    """Gradients of both workers' shares, averaged, are those of one that has all of them."""
    run = labelled("sft", {"pairs.flip": flip, "batch.size": 4, "batch.micro": 1})

    def gradient(session: Session) -> torch.Tensor:
        for batch in session.batches(0):
            loss, _ = session.method.loss(session.policy, batch)
            (loss / session.geometry.accumulation).backward()
        return torch.cat([p.grad.flatten() for p in session.model.trained().values() if p.grad is not None])

    whole = gradient(prepared(run))
    halves = [gradient(prepared(run, rank=rank, workers=2)) for rank in (0, 1)]
    assert float((sum(halves) / 2 - whole).norm() / whole.norm()) < 1e-5


def test_a_stopped_fit_goes_on_as_if_it_had_not_been(labelled: Make) -> None:
    run = labelled("sft", {"train.updates": 4})
    whole = prepared(run)
    optimizer, scheduler = whole.optimizer()
    engine = TorchEngine(optimizer, scheduler, whole.geometry.step_accumulation, 1.0)
    for step in (0, 1):
        whole.update(engine, step)
    later = prepared(run)
    adam, rate = later.optimizer()
    with torch.no_grad():
        for ours, theirs in zip(later.model.trained().values(), whole.model.trained().values(), strict=True):
            ours.copy_(theirs)
    adam.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    rate.load_state_dict(scheduler.state_dict())
    for session, its in ((whole, engine), (later, TorchEngine(adam, rate, later.geometry.step_accumulation, 1.0))):
        for step in (2, 3):
            session.update(its, step)
    for ours, theirs in zip(later.model.trained().values(), whole.model.trained().values(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def telling_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline whose latents tell blue from red: of unit size, with little noise. A random encoder's are mostly noise."""
    from diffusers import AutoencoderKL

    folder = make_pipeline(tmp_path_factory.mktemp("telling"))
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    flat = torch.tensor([shards.BLUE, shards.RED])[:, :, None, None].expand(-1, -1, 16, 16) / 255 * 2 - 1
    with torch.no_grad():
        weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
        mean = vae.encode(flat).latent_dist.mean  # (2,4,8,8)
        scale = 2 / (mean[0] - mean[1]).square().mean().sqrt() / vae.config.scaling_factor
        weight[:4] *= scale
        bias[:4] = (bias[:4] - mean.mean((0, 2, 3))) * scale
        weight[4:] = 0
        bias[4:] = -8  # log variance
    vae.save_pretrained(folder / "vae")
    return folder


@pytest.mark.parametrize(("train", "lr", "least"), [("lora", 1e-2, 0.7), ("full", 1e-3, 0.9)])
def test_fit_learns_the_labels(labelled: Make, telling_pipeline: Path, train: str, lr: float, least: float) -> None:
    """The implicit accuracy on the pairs, each update's before it moves and on draws of its own, rises from a half."""
    changes = {"model.path": str(telling_pipeline), "model.train": train, "train.updates": 32, "batch.size": 8,
               "batch.micro": 8, "method.beta": 500, "optimizer.lr": lr, "evaluate.every": 1000,
               "train.zero_gradient": "accept"}  # fmt: skip
    history = [m["implicit_accuracy"] for m in raydiff.fit(labelled(changes=changes)) if m["step"]]
    after = sum(history[-12:]) / 12
    print(f"{train}: {history[0]:.3f} -> {after:.3f}")
    assert history[0] == 0.5 and after > least


def test_fit_trains_from_a_shard_of_pickapic_to_an_adapter(tiny_run: Make, tmp_path: Path) -> None:
    """Published columns, JPEGs, ties, missing labels and a broken picture: converted, encoded, trained on."""
    shard = shards.pickapic(tmp_path / "s.parquet", 30, broken=[5])
    pickapic.convert([shard], tmp_path / "pairs")
    changes = {"method.source": "dataset", "pairs.path": str(tmp_path / "pairs"), "rewards": {}, "evaluate.images": 2}
    run = tiny_run("diffusion_dpo", changes)
    assert faults(run) == []
    history = list(raydiff.fit(run, folder=tmp_path / "adapter"))
    assert [m["step"] for m in history] == [0, 1, 2, 3]
    assert {"implicit_accuracy", "policy_error", "reference_error", "margin"} <= history[1].keys()
    assert history[1]["pairs_used"] == 1 and history[1]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert [m["images"] for m in history[1:]] == [0, 0, 0] and history[-1]["reward_queries"] == 0
    assert history[-1]["held_out/total"] == 0
    assert (tmp_path / "adapter/pytorch_lora_weights.safetensors").is_file()


def test_ai_feedback_and_labels_from_files_that_agree_train_the_same(tiny_run: Make, tmp_path: Path) -> None:
    """The same pictures labelled by a reward, by people in a file of paths, and in Pick-a-Pic's columns: one adapter."""
    base = tiny_run("diffusion_dpo", {"batch.size": 5, "batch.micro": 5, "evaluate.images": 2})
    feedback.from_rewards(base, tmp_path / "ai", feedback.Labelling("all"), n=4, seed=7)
    rows = [row for file in preferences.files(tmp_path / "ai") for row in pq.read_table(file).to_pylist()]
    assert len(rows) == 30 and {row["label"] for row in rows} == {0.0, 1.0}

    people: dict[str, list[Any]] = {"prompt": [r["prompt"] for r in rows], "label": [r["label"] for r in rows]}
    for side in (0, 1):
        people[f"image_{side}"] = [f"{i}_{side}.png" for i in range(30)]
        for row, name in zip(rows, people[f"image_{side}"], strict=True):
            (tmp_path / name).write_bytes(row[f"image_{side}"])
    pq.write_table(pa.table(people), tmp_path / "people.parquet")

    shard = {f"jpg_{side}": [row[f"image_{side}"] for row in rows] for side in (0, 1)}
    shard |= {"caption": people["prompt"], "label_0": people["label"], "label_1": [1 - label for label in people["label"]]}
    pq.write_table(pa.table(shard), tmp_path / "shard.parquet")
    pickapic.convert([tmp_path / "shard.parquet"], tmp_path / "converted")

    def trained(name: str) -> tuple[list[tuple[float, ...]], dict[str, torch.Tensor]]:
        run = override(base, {"method.source": "dataset", "pairs.path": str(tmp_path / name)})
        updates = [m for m in raydiff.fit(run, folder=tmp_path / "adapter") if m["step"]]
        return [(m["loss"], m["margin"], m["grad_norm"]) for m in updates], load_file(tmp_path / "adapter" / WEIGHTS)

    history, adapter = trained("ai")
    assert len(set(history)) == 3
    for name in ("people.parquet", "converted"):
        same, weights = trained(name)
        assert same == history
        assert all(torch.equal(weights[key], tensor) for key, tensor in adapter.items())


def test_rewards_of_a_labelled_run_are_only_evaluated(labelled: Make) -> None:
    run = labelled("sft", {"evaluate.rewards": {"mirror": {"kind": "symmetry"}}})
    start, *_, last = raydiff.fit(run)
    assert {"held_out/total", "held_out/blue", "held_out/mirror"} <= start.keys()
    assert start["held_out/total"] == pytest.approx(start["held_out/blue"])
    assert not any(name.startswith("reward/") for name in last) and last["reward_queries"] == 0


def test_the_plan_counts_what_a_labelled_run_does(labelled: Make) -> None:
    run = labelled(changes={"train.updates": 2, "evaluate.images": 2})
    planned, (*_, last) = plan(run, LAPTOP), raydiff.fit(run)
    assert {name: 2 * n for name, n in vars(planned.update).items()} == {name: last[name] for name in vars(planned.update)}
    assert planned.update.images == planned.update.reward_queries == 0 and planned.problems == ()
    (missing,) = plan(override(run, {"pairs.path": "/nowhere.parquet"}), LAPTOP).problems
    assert missing.startswith("pairs.path = '/nowhere.parquet': there is no Parquet file")


def test_the_plan_traces_the_memory_of_a_labelled_micro_batch(labelled: Make) -> None:
    run = labelled(changes={"batch.size": 2})
    estimate, session = plan(run, LAPTOP).memory, prepared(run)
    for p in session.model.trained().values():
        p.grad = torch.zeros_like(p)
    parts = [m for m in vars(session.model.pipe).values() if isinstance(m, torch.nn.Module)]
    known = [t for m in parts for t in [*m.parameters(), *m.buffers()]]
    with Live([*known, *(p.grad for p in session.model.trained().values() if p.grad is not None)]) as live:
        session.update(Backward(), 0)
    assert estimate is not None and estimate.update == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("diffusion_dpo", {"pairs.path": None}, r"pairs.path is not set, and method.source = \"dataset\" trains on it"),
        ("diffusion_dpo", {"method.source": "rollouts"}, "pairs.path = .* is not used"),
        ("sft", {"method.attempts": 4}, "method.attempts = 4: a labelled pair has two sides"),
        ("sft", {"generation.where": "pool"}, 'method.source = "dataset" samples nothing'),
        ("sft", {"method.source": "dataste"}, "method.source: Input should be 'rollouts' or 'dataset'"),
        ("rwr", {}, "method: unknown key 'source'"),
        ("sft", {"pairs.pth": "a"}, "pairs: unknown key 'pth'; did you mean 'path'?"),
    ],
)
def test_a_labelled_run_that_cannot_work_says_which_field(
    labelled: Make, method: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        labelled(method, changes)


def test_only_a_labelled_run_may_have_no_rewards(labelled: Make, tmp_path: Path) -> None:
    run = override(labelled("sft"), {"rewards": {}})
    assert run.rewards.named == {} and Run.model_validate_json(run.model_dump_json()) == run
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\nkind = "stable_diffusion"\n[method]\nkind = "sft"\nsource = "dataset"\n[pairs]\npath = "p"\n')
    assert load(recipe).rewards.named == {} and load(recipe).method.attempts == 2
    with pytest.raises(ConfigError, match=r"rewards: there is none; a reward is a table"):
        override(run, {"method.source": "rollouts", "pairs.path": None})


@pytest.mark.parametrize(("beta", "warned"), [(0.1, True), (0.99, True), (1, False), (5000, False), (200_000, True)])
def test_a_beta_of_another_convention_is_warned_of(labelled: Make, beta: float, warned: bool) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        labelled(changes={"method.beta": beta})
    texts = [str(w.message) for w in found if "method.beta" in str(w.message)]
    assert bool(texts) == warned
    assert all(f"method.beta = {beta:g} is outside 1 to 100000: here it is the factor of squared errors" in t for t in texts)
