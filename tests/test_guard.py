"""Guard, stop_when and best: drift against a computation by hand, what a guard may not touch, and which weights are kept."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raydiff import watch
from raydiff.config import ConfigError, Run, Threshold, override
from raydiff.core import guard
from raydiff.core.learner import TorchEngine
from raydiff.local import best_folder, fit
from raydiff.models.lora import WEIGHTS
from raydiff.session import Session, summary

MakeRun = Callable[..., Run]
YELLOW = {"yellow": {"kind": "colour", "rgb": [0.9, 0.7, 0.1]}}  # falls as blue rises


def trained(run: Run) -> Session:
    """A session after its updates."""
    session = Session(run)
    optimizer, scheduler = session.optimizer()
    engine = TorchEngine(optimizer, scheduler, session.geometry.accumulation, run.optimizer.max_grad_norm)
    for step in range(run.train.updates):
        session.update(engine, step)
    return session


def test_drift_is_nothing_before_training(tiny_run: MakeRun) -> None:
    metrics = summary(Session(tiny_run()).evaluate())
    assert metrics["drift"] == 0
    assert metrics["latent_norm"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_drift_is_that_of_two_models_side_by_side(tiny_run: MakeRun, eta: float) -> None:
    """Against a second, untrained model, with no adapter switched: images 0 to 2 of 4, points 0, 2, 3, 5 of 6."""
    run = tiny_run(changes={"evaluate.drift_images": 3, "sampler.steps": 6, "sampler.eta": eta, "optimizer.lr": 0.1})
    session, base = trained(run), Session(run)
    pictures = session.evaluate()
    assert [bool(p.moved) for p in pictures] == [True, True, True, False]
    shown = pictures[:3]
    prompts, seeds = [p.prompt for p in shown], [p.seed for p in shown]
    clean, points = base.judge.sample(prompts, seeds, keep=range(6))
    drifts = []
    for i in (0, 2, 3, 5):
        x, time = points[:, i], base.judge.schedule.time(i, points[:, i])
        with torch.no_grad():
            drifts.append((session.judge.predict(prompts)(x, time) - base.judge.predict(prompts)(x, time)).pow(2).mean())
    metrics = summary(pictures)
    assert metrics["drift"] == pytest.approx(float(torch.stack(drifts).mean()), rel=1e-5)
    assert metrics["drift"] > 1e-4
    norms = [s.flatten(1).norm(dim=1) for s in (session.judge.sample(prompts, seeds)[0], clean)]
    assert metrics["latent_norm"] == pytest.approx(float((norms[0] / norms[1]).mean()), rel=1e-5)


def test_drift_is_the_kl_of_a_step_up_to_its_factor(tiny_run: MakeRun) -> None:
    session, base = trained(tiny_run(changes={"sampler.eta": 1.0, "optimizer.lr": 0.1})), Session(tiny_run())
    x, schedule = torch.randn(2, *session.model.latent_shape), session.judge.schedule
    with torch.no_grad():
        outs = [s.judge.predict(["a", "b"])(x, schedule.time(1, x)) for s in (session, base)]
    (mean, std), (other, _) = (schedule.transition(1, x, out, 1.0) for out in outs)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), torch.distributions.Normal(other, std))
    slope = (schedule.transition(1, x, outs[0] + 1, 1.0)[0] - mean).mean()  # b of mean = a·x + b·out
    factor = slope**2 * x[0].numel() / (2 * std**2)
    torch.testing.assert_close(kl.sum((1, 2, 3)), factor * guard.squared_distance(*outs), rtol=1e-4, atol=1e-7)


def test_the_guard_changes_neither_training_nor_its_cost(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(changes={"evaluate.every": 1})
    off = {"evaluate.drift_images": 0, "evaluate.clip": None}
    (*_, guarded), (*_, plain) = (fit(override(run, c), folder=tmp_path / name) for name, c in (("on", {}), ("off", off)))
    assert guarded.keys() - plain.keys() == set(guard.METRICS)
    assert {k: guarded[k] for k in plain if k != "seconds"} == {k: plain[k] for k in plain if k != "seconds"}
    files = [load_file(tmp_path / name / WEIGHTS) for name in ("on", "off")]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_reference_weights_are_put_back(tiny_run: MakeRun) -> None:
    session = trained(tiny_run(changes={"optimizer.lr": 0.1}))
    flags = {name: p.requires_grad for name, p in session.model.denoiser.named_parameters()}
    first = session.evaluate()
    assert {name: p.requires_grad for name, p in session.model.denoiser.named_parameters()} == flags
    again = session.evaluate()
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    assert summary(first) == summary(again)
    assert any(not torch.equal(a.image, b.image) for a, b in zip(first, Session(session.run).evaluate(), strict=True))


def test_workers_share_the_probe(tiny_run: MakeRun) -> None:
    """Five pictures and two workers in batches of two: the second worker's last batch is a picture to discard."""
    run = tiny_run(changes={"evaluate.images": 5, "evaluate.drift_images": 3, "evaluate.batch": 2, "optimizer.lr": 0.1})
    alone = trained(run)
    shares, calls = [], []
    for rank in (0, 1):
        session = Session(run, rank=rank, workers=2)
        for name, p in session.model.trained().items():
            p.data.copy_(alone.model.trained()[name])
        forward = session.model.denoiser.forward
        count: list[int] = []
        session.model.denoiser.forward = lambda *a, f=forward, n=count, **k: (n.append(1), f(*a, **k))[1]
        shares += session.evaluate()
        calls.append(len(count))
    assert calls[0] == calls[1]  # or ZeRO-3 would wait for ever
    together, single = summary(sorted(shares, key=lambda p: p.index)), summary(alone.evaluate())
    assert together == pytest.approx(single, rel=1e-5)


def test_full_fine_tuning_is_probed_where_a_frozen_copy_is(tiny_run: MakeRun) -> None:
    full = {"model.train": "full", "train.updates": 1, "optimizer.lr": 1e-3, "evaluate.clip": None}
    (*_, without), (*_, with_copy) = fit(tiny_run(changes=full)), fit(tiny_run(changes={**full, "method.kl": 0.1}))
    assert "drift" not in without
    assert with_copy["drift"] > 0


def test_diversity_by_all_pairs() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), dim=1)
    pairs = [1 - float(vectors[i] @ vectors[j]) for i in range(6) for j in range(i)]
    assert guard.diversity(vectors) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    assert guard.diversity(vectors[:1].expand(4, -1)) == pytest.approx(0, abs=1e-12)
    assert guard.diversity(torch.eye(3)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("held_out/alignment < 0.2", Threshold("held_out/alignment", "<", 0.2)),
        ("drift>=5e-1", Threshold("drift", ">=", 0.5)),
        (" diversity<= -1 ", Threshold("diversity", "<=", -1.0)),
    ],
)
def test_conditions_are_read(text: str, parsed: Threshold) -> None:
    assert Threshold.parse(text) == parsed


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drift = 0.5", "'=' is no comparison; there are <, <=, >, >="),
        ("drift != 0.5", "'!=' is no comparison"),
        ("drift > half", "'half' is not a finite number"),
        ("drift > nan", "'nan' is not a finite number"),
        ("drift", "is not a condition; write"),
        ("> 0.5", "is not a condition"),
        ("drift > 0.5 or so", "is not a condition"),
    ],
)
def test_a_malformed_condition_is_refused_while_the_run_is_parsed(tiny_run: MakeRun, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.stop_when: ") as error:
        tiny_run(changes={"train.stop_when": ["drift > 1", text]})
    assert message in str(error.value)


def test_best_is_a_held_out_reward(tiny_run: MakeRun) -> None:
    assert tiny_run().evaluate.best_metric == "held_out/total"
    assert tiny_run(changes={"evaluate.rewards": YELLOW}).evaluate.best_metric == "held_out/yellow"
    with pytest.raises(ConfigError, match=r"evaluate.best = 'held_out/bleu' is not measured; did you mean 'held_out/blue'\?"):
        tiny_run(changes={"evaluate.best": "held_out/bleu"})


def rows(*values: float) -> list[dict[str, float]]:
    return [{"step": i, "held_out/total": v, **({"loss": 1.0} if i else {})} for i, v in enumerate(values)]


def test_stopping_and_best_of_rows(tiny_run: MakeRun) -> None:
    run = tiny_run(changes={"train.stop_when": ["held_out/total < 0", "loss > 2"]})
    assert watch.stopped(run, rows(1, 2, 0)) is None
    assert watch.stopped(run, rows(1, 2, -1)) == "held_out/total < 0: held_out/total = -1 after update 2"
    assert watch.stopped(run, [*rows(1), {"step": 1, "loss": 3.0}]) is None  # no evaluation, no look
    assert watch.stopped(run, [*rows(1), {"step": 1, "loss": 3.0, "held_out/total": 1}]) == "loss > 2: loss = 3 after update 1"
    assert watch.best(run, rows(9)) is None  # the untrained model is no candidate
    assert watch.best(run, rows(9, 2, 3, 3, 1)) == watch.Best(2, "held_out/total", 3, 9)
    assert watch.improved(run, rows(9, 2, 3)) is not None
    assert watch.improved(run, rows(9, 2, 3, 3)) is None
    assert watch.improved(run, [*rows(9, 2), {"step": 2, "loss": 1.0}]) is None


@pytest.mark.parametrize(
    ("condition", "steps", "message"),
    [
        ("held_out/green < 0", 0, r"names 'held_out/green', which this run does not measure; there are .*held_out/blue"),
        ("diversity < 0", 0, r"names 'diversity', which this run does not measure"),
        ("lost > 0", 1, r"names 'lost', which this run does not measure; there are .*grad_norm.*loss"),
        ("drift < 1", 0, r"'drift < 1' holds before training: drift is 0; set another number"),
    ],
)
def test_a_condition_that_cannot_be_meant_is_named(tiny_run: MakeRun, condition: str, steps: int, message: str) -> None:
    run = tiny_run(changes={"train.stop_when": [condition], "evaluate.clip": None})
    seen: list[dict[str, float]] = []
    with pytest.raises(ConfigError, match=message):
        seen.extend(fit(run))
    assert len(seen) == steps


def test_fit_stops_and_keeps_the_best_weights(tiny_run: MakeRun, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"evaluate": {"images": 4, "every": 1, "rewards": YELLOW, "clip": None}, "optimizer.lr": 0.05}
    run = tiny_run(changes={**changes, "train.updates": 4})
    yellow = [row["held_out/yellow"] for row in fit(run)]
    assert max(yellow) == yellow[2] and yellow[3] < yellow[0]  # over-optimised from the third update on
    limit = (yellow[0] + yellow[3]) / 2
    stopped = override(run, {"train.stop_when": [f"held_out/yellow < {limit}"]})
    history = list(fit(stopped, folder=tmp_path / "adapter"))
    assert [row["step"] for row in history] == [0, 1, 2, 3]
    assert "after update 3" in (watch.stopped(stopped, history) or "")
    assert json.loads((tmp_path / "adapter_best" / watch.BEST).read_text()) == {
        "step": 2, "metric": "held_out/yellow", "value": yellow[2], "before": yellow[0],
    }  # fmt: skip
    for name, updates in (("adapter_best", 2), ("adapter", 3)):
        list(fit(override(run, {"train.updates": updates}), folder=tmp_path / name / "again"))
        kept, again = (load_file(folder / WEIGHTS) for folder in (tmp_path / name, tmp_path / name / "again"))
        assert all(torch.equal(kept[key], again[key]) for key in again)
    assert best_folder(tmp_path / "adapter") == tmp_path / "adapter_best"


def test_the_best_is_an_average_where_the_average_is_evaluated(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(changes={"optimizer.ema": 0.5, "evaluate.every": 1, "evaluate.clip": None})
    list(fit(run, folder=tmp_path / "adapter"))
    best = json.loads((tmp_path / "adapter_best" / watch.BEST).read_text())
    session = Session(override(run, {"optimizer.ema": None}))
    session.model.load(tmp_path / "adapter_best")
    assert summary(session.evaluate())["held_out/total"] == pytest.approx(best["value"], rel=1e-6)
