"""Gradients that float16 cannot hold unscaled, that are exactly 0, or that are no number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raydiff.config import Run, load, override
from raydiff.core.learner import LossScale, TorchEngine
from raydiff.core.policy import RewardFailed
from raydiff.core.reward_vjp import score_and_grad, weighted_sum
from raydiff.local import fit
from raydiff.session import Session
from tests.tiny import make_pipeline

Make = Callable[..., Run]
NOISY = {"sampler.eta": 1.0, "sampler.final_alpha": None}
ROOT = Path(__file__).parents[1]


def first_gradient(run: Run) -> Tensor:
    """Of the first update whose step is taken, away from LoRA's B = 0, where half of the gradients vanish."""
    session, found = Session(run), list[Tensor]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in session.model.trained().values():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    adam, scheduler = session.optimizer()
    adam.register_step_pre_hook(
        lambda *_: found.append(torch.cat([p.grad.flatten() for p in session.model.trained().values() if p.grad is not None]))
    )
    engine = TorchEngine(adam, scheduler, session.geometry.step_accumulation, 1e9, session.loss_scale)
    while not found:
        session.update(engine, 0)
    return found[0].double()


def assert_float16_is_float32(run: Run, least: float) -> None:
    exact, half = first_gradient(run), first_gradient(override(run, {"model.dtype": "float16"}))
    cosine = float(torch.nn.functional.cosine_similarity(exact, half, dim=0))
    print(f"{run.method.kind}: cosine {cosine:.6f}, norms {float(exact.norm()):.3g}, {float(half.norm()):.3g}")
    assert cosine > least and float(half.norm() / exact.norm()) == pytest.approx(1, abs=0.05)
    assert float((half == 0).double().mean()) <= float((exact == 0).double().mean()) + 1e-3


@pytest.mark.parametrize("method", ["draft_k", "d3po", "diffusion_dpo"])
def test_float16_finds_the_gradient_of_float32(method: str) -> None:
    """On the embedded model. Unscaled, D3PO's cosine was 0.945."""
    small = ["batch.size=1", "batch.micro=1", "sampler.steps=2", "sampler.guidance=1", "pools.train.replicas=1"]
    run = load(ROOT / "jobs/recipes/emoji_draft_lv.toml", small)
    noisy: dict[str, Any] = NOISY if method == "d3po" else {}
    assert_float16_is_float32(override(run, {"method": {"kind": method}, **noisy}), 0.999)


def test_float16_trains_latents_of_stable_diffusions_size(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4·64·64 numbers, over which D3PO's ratio is a mean: unscaled, its gradient was exactly 0."""
    monkeypatch.setattr(LossScale, "MOST", 2.0**20)  # a shorter search: convolutions in float16 are slow on a CPU
    small = {"sampler.steps": 2, "sampler.guidance": 1, "batch": {"size": 1, "micro": 1}}
    run = tiny_run("d3po", {**NOISY, **small, "model.path": str(make_pipeline(tmp_path / "large", size=128))})
    assert_float16_is_float32(run, 0.99)


@pytest.mark.parametrize("weight", [pytest.param(1.0, marks=pytest.mark.slow), 0.01])
def test_float16_trains_through_a_decoder_of_256_pixels(tiny_run: Make, tmp_path: Path, weight: float) -> None:
    """Unscaled, DRaFT-1's cosine was 0.21, and 92 % of the numbers were 0; at a weight of 0.01 a scale of 2^16 is too small."""
    path = str(make_pipeline(tmp_path / "large", size=256))
    same = {"model.path": path, "sampler.steps": 1, "sampler.guidance": 1, "batch": {"size": 1, "micro": 1}}
    assert_float16_is_float32(tiny_run("draft_k", {**same, "rewards.blue.weight": weight}), 0.999)


def test_a_scale_is_searched_falls_with_each_overflow_and_rises_after_good_steps() -> None:
    scale = LossScale()
    scale.overflowed()
    scale.overflowed()
    assert (scale.scale, scale.skipped) == (2.0**24, 0)
    scale.fitted()
    scale.overflowed()
    assert (scale.scale, scale.skipped) == (2.0**23, 1)
    for _ in range(LossScale.GROWTH):
        scale.fitted()
    assert (scale.scale, scale.skipped, scale.good) == (2.0**24, 1, 0)
    again = LossScale()
    again.restore(scale.state())
    assert vars(again) == vars(scale)
    assert scale.vanished() and scale.scale == 2.0**32 and not scale.vanished()
    for _ in range(42):
        scale.overflowed()
    with pytest.raises(FloatingPointError, match="not finite at any loss scale"):
        scale.overflowed()


def test_the_first_update_is_repeated_until_its_scale_is_found(tiny_run: Make) -> None:
    half = tiny_run("draft_k", {"model.dtype": "float16", "sampler.steps": 1, "train.updates": 2, "evaluate.images": 1})
    rows, exact = (list(fit(run))[1:] for run in (half, override(half, {"model.dtype": "float32"})))
    assert [row["skipped_steps"] for row in rows] == [0, 0] and rows[0]["loss_scale"] < LossScale.MOST
    assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in exact], rel=0.02)


def test_an_overflowing_step_is_skipped_and_counted(tiny_run: Make) -> None:
    session = Session(tiny_run("draft_k", {"model.dtype": "float16", "sampler.steps": 1, "optimizer.schedule": "linear"}))
    assert session.loss_scale is not None
    adam, scheduler = session.optimizer()
    engine = TorchEngine(adam, scheduler, session.geometry.step_accumulation, 1.0, session.loss_scale)
    session.update(engine, 0)
    before = [p.detach().clone() for p in session.model.trained().values()]
    session.loss_scale.scale = 2.0**60  # beyond what float16's activations take
    told = session.update(engine, 1)
    assert told["skipped_steps"] == 1 and told["loss_scale"] == 2.0**59 and "grad_norm" not in told
    assert all(torch.equal(p, b) for p, b in zip(session.model.trained().values(), before, strict=True))
    assert scheduler.get_last_lr()[0] == pytest.approx(1e-2 / 3)  # of 3 updates, 2 are over
    session.loss_scale.scale = 2.0**16
    assert session.update(engine, 2)["grad_norm"] > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["draft_k", "draft_lv", "refl"])
def test_a_gradient_of_exactly_zero_is_an_error_that_says_so(tiny_run: Make, dtype: str, method: str) -> None:
    small = {"model.dtype": dtype, "sampler.steps": 1, "evaluate.images": 1} | (
        {"method.last_steps": 1} if method == "refl" else {}
    )
    constant = tiny_run(method, {"rewards": {"blue": {"kind": "tests.rough"}}, **small})
    with pytest.raises(FloatingPointError, match=r"gradient of the whole update is exactly 0.*train.zero_gradient"):
        list(fit(constant))
    with pytest.raises(FloatingPointError, match="exactly 0"):
        list(fit(tiny_run(method, {"rewards.blue.weight": 0.0, **small})))
    rows = list(fit(override(constant, {"train.zero_gradient": "accept", "train.updates": 1})) if dtype != "float16" else [])
    assert all(row["grad_norm"] == 0 for row in rows[1:])


@pytest.mark.parametrize(
    ("method", "changes"), [("d3po", NOISY), ("diffusion_dpo", {}), ("ddpo", {**NOISY, "method.attempts": 2})]
)
def test_samples_that_nothing_tells_apart_are_an_error_until_some_differ(
    tiny_run: Make, method: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """In the first update there may be a mistake behind it; later, an update of ties alone passes."""
    small = {**changes, "sampler.steps": 2, "evaluate.images": 1, "train.updates": 3, "batch": {"size": 1, "micro": 1}}
    alike = {"rewards": {"blue": {"kind": "tests.rough"}}}
    with pytest.raises(FloatingPointError, match=r"every gradient up to update 1 was exactly 0"):
        list(fit(tiny_run(method, {**alike, **small})))
    prompts = ["a cat", "a dog", "an ant"]
    first = next(iter(Session(tiny_run(method, {**small, "prompts.train": prompts})).batches(0))).prompts[0]
    tied = {"rewards": {"blue": {"kind": "tests.tied", "tied": [p for p in prompts if p != first]}}}
    rows = list(fit(tiny_run(method, {**tied, **small, "prompts.train": prompts})))
    assert rows[1]["grad_norm"] > 0 and [row["grad_norm"] for row in rows[2:]] == [0, 0]


@pytest.mark.parametrize("steepness", [1.0, 1e4])
def test_a_reward_in_float16_keeps_its_gradient(steepness: float) -> None:
    """One of 786432 numbers has a slope below float16's smallest; a steep reward overflows at the larger scale, and is right too."""

    def half(images: Tensor, prompts: Any) -> Tensor:
        return steepness * images.half().square().flatten(1).mean(1).float()

    images = torch.rand(1, 3, 512, 512, generator=torch.Generator().manual_seed(0))
    _, parts, gradient = score_and_grad(weighted_sum({"half": half}, {"half": 1.0}))(images, ["a cat"])
    exact = steepness * 2 * images / images.numel()
    assert float((gradient - exact).norm() / exact.norm()) < 2e-3 and torch.isfinite(parts["half"]).all()


def test_a_finite_reward_with_a_gradient_that_is_no_number_is_named_with_its_prompt(tiny_run: Make) -> None:
    run = tiny_run("draft_k", {"rewards": {"rough": {"kind": "tests.rough", "what": "root"}}, "sampler.steps": 1})
    for dtype in ("float32", "float16"):
        with pytest.raises(
            RewardFailed, match=r"reward 'rough' failed for prompt '.*', seed \d+: .*gradient of it is not finite"
        ):
            list(fit(override(run, {"model.dtype": dtype})))


def test_a_gradient_that_is_no_number_reaches_no_weight(tiny_run: Make) -> None:
    """Of a loss, when no reward is to blame."""
    session = Session(tiny_run("draft_k", {"sampler.steps": 1}))
    before = {name: p.detach().clone() for name, p in session.model.trained().items()}
    engine = TorchEngine(*session.optimizer(), 1, 1.0)
    total = sum(p.sum() for p in session.model.trained().values())
    engine.backward((0 * total).sqrt())
    with pytest.raises(FloatingPointError, match=r"norm is nan, though the loss is finite"):
        engine.step()
    assert all(torch.equal(p, before[name]) for name, p in session.model.trained().items())
