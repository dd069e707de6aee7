"""A whole comparison on the tiny model, and that its report says what the records say."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from raydiff.bench import report, settings
from raydiff.bench.compare import compare, jobs
from raydiff.bench.measure import Job, work
from raydiff.bench.settings import Settings
from raydiff.bench.tune import affordable, tune
from raydiff.config import ConfigError, Run
from raydiff.plan.cost import count
from raydiff.watch import due

METHODS: dict[str, Any] = {
    "draft_lv": {"method": {"kind": "draft_lv"}, "updates": 6, "every": 1},
    "draft_k": {"method": {"kind": "draft_k", "k": 2}, "updates": 6, "every": 2},
}
TRIED = [{"optimizer.lr": 0.01}, {"optimizer.lr": 0.03}]


@pytest.fixture(scope="session")
def tiny_settings(tiny_run: Callable[..., Run]) -> Settings:
    base = tiny_run().model_dump(mode="json", include={"model", "prompts", "sampler", "batch"})
    held_out = {"kind": "colour", "rgb": [0.2, 0.9, 0.2]}
    return Settings.model_validate(
        {
            "base": {**base, "evaluate": {"images": 4, "grid": 0, "rewards": {"green": held_out}}},
            "tasks": {"blue": {"title": "blue", "rewards": {"blue": {"kind": "colour"}}, "thresholds": [-0.124, -0.121, 0.5]}},
            "methods": {name: {**m, "candidates": TRIED, "tuned": TRIED[1]} for name, m in METHODS.items()},
            "seeds": [0, 1],
            "reference": "draft_lv",
            "alignment": ["green"],
            "keep": {"reward": "green", "least": -1},
            "gradient_norm": {"ks": [1, 2], "steps": 4, "prompts": 3},
            "tuning": {"task": "blue", "seed": 9, "passes": 120, "evaluations": 2},
            "quick": {"share": 0.5, "seeds": 1},
        }
    )


@pytest.fixture(scope="module")
def compared(tiny_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    compare(tiny_settings, folder, processes=1, say=lambda text: None)
    return folder


def records(folder: Path, method: str) -> list[list[dict[str, Any]]]:
    """Evaluations of each seed."""
    files = [folder / "runs" / f"blue-{method}-{seed}.json" for seed in (0, 1)]
    return [json.loads(file.read_text())["evaluations"] for file in files]


def price(evaluations: list[dict[str, Any]], threshold: float, cost: str) -> float:
    """By walking over the record."""
    before = None
    for row in evaluations:
        reward = fmean(row["rewards"]["total"])
        if reward >= threshold:
            if before is None:
                return row[cost]
            share = (threshold - before[0]) / (reward - before[0])
            return before[1] + share * (row[cost] - before[1])
        before = reward, row[cost]
    return float("inf")


def test_tables_are_those_of_the_records(compared: Path, tiny_settings: Settings) -> None:
    found = json.loads((compared / "results.json").read_text())["tasks"]["blue"]
    reached = 0
    for method in METHODS:
        runs = records(compared, method)
        assert found[method]["after"]["total"] == pytest.approx(fmean(fmean(r[-1]["rewards"]["total"]) for r in runs))
        assert found[method]["after"]["green"] == pytest.approx(fmean(fmean(r[-1]["rewards"]["green"]) for r in runs))
        for entry, threshold in zip(found[method]["prices"], (-0.124, -0.121, 0.5), strict=True):
            for cost in ("images", "denoiser_forward", "denoiser_backward", "seconds"):
                expected = max(price(run, threshold, cost) for run in runs)  # the upper of two is their median
                assert entry[cost] == (pytest.approx(expected) if expected < float("inf") else None), (method, threshold, cost)
            expected = max(price(run, threshold, "reward_queries") for run in runs)
            text = report.estimate(entry["queries"])
            if expected < float("inf"):
                reached += 1
                assert entry["queries"]["value"] == pytest.approx(expected)
                assert entry["queries"]["low"] <= expected
            else:
                assert text == f"> {runs[0][-1]['reward_queries']}"
            assert f"| {text} |" in (compared / "report.md").read_text()
    assert reached > 1
    divided = found["draft_k"]["prices"][0]["ratio"]["value"]
    assert divided == pytest.approx(
        found["draft_k"]["prices"][0]["queries"]["value"] / found["draft_lv"]["prices"][0]["queries"]["value"]
    )


def test_costs_are_the_methods(compared: Path) -> None:
    last = records(compared, "draft_lv")[0][-1]
    # 6 updates of 4 pictures, n + 1 = 3 rewards each; evaluation is not a cost
    assert (last["images"], last["reward_queries"]) == (24, 72)
    assert records(compared, "draft_k")[0][-1]["reward_queries"] == 24
    seconds = [row["seconds"] for row in records(compared, "draft_lv")[0]]
    assert seconds[0] == 0
    assert seconds == sorted(seconds)


def test_every_artifact_is_there(compared: Path) -> None:
    for name in ("curves.png", "strip_blue.png"):
        assert (compared / name).read_bytes().startswith(b"\x89PNG")
    norms = json.loads((compared / "results.json").read_text())["gradient_norm"]
    assert [row["k"] for row in norms] == [1, 2]
    shares = json.loads((compared / "results.json").read_text())["renoising"]
    assert [(row["sampler"], row["steps"]) for row in shares] == [("of the comparison", 4), ("DDIM", 4)]
    assert all(0 < row["share"] <= 1 for row in shares)
    assert all(0 < row["of_mean"] <= row["mean"] <= row["largest"] for row in norms)


def test_a_rerun_gives_the_same_numbers(compared: Path, tiny_settings: Settings, tmp_path: Path) -> None:
    def numbers(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in evaluations]

    work(Job(tiny_settings.run("blue", "draft_lv", 0), tmp_path / "again.json"))
    again = json.loads((tmp_path / "again.json").read_text())["evaluations"]
    assert numbers(again) == numbers(records(compared, "draft_lv")[0])


def test_only_missing_and_changed_runs_are_made(compared: Path, tiny_settings: Settings) -> None:
    assert all(job.done() for job in jobs(tiny_settings, compared))
    changed = tiny_settings.methods["draft_k"].model_copy(update={"updates": 5})
    other = tiny_settings.model_copy(update={"methods": {**tiny_settings.methods, "draft_k": changed}})
    assert [job.run.method.kind for job in jobs(other, compared) if not job.done()] == ["draft_k", "draft_k"]


def test_tuning_gives_each_candidate_the_same_passes(tiny_settings: Settings, tmp_path: Path) -> None:
    trials = tune(tiny_settings, tmp_path, ["draft_lv"], processes=1)
    assert [t.settings for t in trials if t.chosen] == [TRIED[1]]
    assert {t.updates for t in trials} == {trials[0].updates}
    assert sorted(trials, key=lambda t: t.rank) == trials
    assert len(json.loads((tmp_path / "tuning.json").read_text())) == 2


# Denoiser calls of a picture at 10 steps and (forward, backward) passes of training on it; 8 prompts have 4 attempts each.
PASSES = {
    "draft": lambda batch: batch * (10 + 2 * 10),
    "draft_k": lambda batch: batch * (10 + 2 * 1),
    "draft_lv": lambda batch: batch * (10 + 2 + 2 * 3),  # the last step and two re-noised copies
    "diffusion_dpo": lambda batch: batch * (4 * 10 + 2 + 2 + 2 * 2),  # a pair, which the reference sees too
    "d3po": lambda batch: batch * (4 * 10 + 2 * 5 + 2 * 5 + 2 * 2 * 5),  # at half of the steps
    "ddpo": lambda batch: batch * (4 * 10 + 4 * 5 + 2 * 4 * 5),
    "rwr": lambda batch: batch * (4 * 10 + 4 + 2 * 4),
}


def test_tuning_spends_its_budget() -> None:
    """Within an update of it, for every candidate of every method; fewer only where the comparison has no more updates."""
    own = settings.load()
    budget = own.tuning
    for method, contender in own.methods.items():
        for candidate in contender.candidates:
            run = affordable(own, method, candidate)
            batch, updates = candidate["batch.size"], run.train.updates
            last = candidate.get("method.last_steps")  # ReFL stops at one of these, drawn: the mean, to a pass a picture
            each = PASSES[method](batch) if last is None else batch * (10 - (last - 1) / 2 + 2)
            slack = batch if last else 0
            assert updates * (each - slack) <= budget.passes
            assert updates == contender.updates or budget.passes < (updates + 1) * (each + slack), (method, candidate)
            evaluated = len([done for done in range(1, updates + 1) if due(run, done)])
            assert budget.evaluations <= evaluated <= 2 * budget.evaluations, (method, candidate)


@pytest.mark.parametrize("method", ["draft_lv", "refl", "diffusion_dpo", "d3po", "ddpo", "rwr"])
def test_a_trial_spends_what_was_promised(tiny_settings: Settings, tmp_path: Path, method: str) -> None:
    """Passes that were counted while the trial was trained, for a budget of three updates and a half."""
    kind = {"kind": method, **{"draft_lv": {}, "refl": {"last_steps": 3}}.get(method, {"attempts": 2})}
    contender = tiny_settings.methods["draft_lv"].model_copy(update={"method": kind, "updates": 20})
    base = {**tiny_settings.base, "sampler": {"steps": 4, "eta": 1.0, "guidance": 1.0, "final_alpha": None}}
    own = tiny_settings.model_copy(update={"methods": {method: contender}, "base": base})
    calls = count(own.run("blue", method, 9))[0]
    passes = round(3.5 * (calls.denoiser_forward + 2 * calls.denoiser_backward))
    own = own.model_copy(update={"tuning": own.tuning.model_copy(update={"passes": passes, "evaluations": 1})})
    work(Job(affordable(own, method, TRIED[0]), tmp_path / "trial.json"))
    last = json.loads((tmp_path / "trial.json").read_text())["evaluations"][-1]
    spent = last["denoiser_forward"] + 2 * last["denoiser_backward"]
    assert last["step"] == 3
    assert passes * 3 / 4 < spent <= passes


def test_a_budget_without_an_update_is_refused(tiny_settings: Settings) -> None:
    poor = tiny_settings.model_copy(update={"tuning": tiny_settings.tuning.model_copy(update={"passes": 5})})
    with pytest.raises(ConfigError, match=r"tuning\.passes = 5 buys no update of draft_lv, which takes \d+; set it to more"):
        affordable(poor, "draft_lv", TRIED[0])


def test_own_settings_are_fair() -> None:
    own = settings.load()
    assert len(own.seeds) >= 3
    assert {"draft", "draft_k", "draft_lv", "refl", "diffusion_dpo", "d3po", "ddpo", "rwr"} == own.methods.keys()
    samplers = {str(own.run(task, method, 0).sampler) for task in own.tasks for method in own.methods}
    assert len(samplers) == 1
    short = own.rehearsal()
    assert all(short.methods[m].updates <= own.methods[m].updates for m in own.methods)


def test_unfair_settings_are_refused(tiny_settings: Settings, tmp_path: Path) -> None:
    tree = tiny_settings.model_dump(mode="json")
    tree["methods"]["draft_k"]["candidates"] = TRIED[1:]
    with pytest.raises(ValueError, match=r"same number of candidates; there are \{'draft_lv': 2, 'draft_k': 1\}"):
        Settings.model_validate(tree)
    tree["methods"]["draft_k"]["candidates"] = [TRIED[0]] * 2
    with pytest.raises(ValueError, match="only what was tried can be chosen"):
        Settings.model_validate(tree)
    with pytest.raises(ConfigError, match=r"nowhere\.toml' do not exist"):
        settings.load(tmp_path / "nowhere.toml")


@pytest.mark.slow
def test_mlflow_has_the_report_once(compared: Path, tiny_settings: Settings) -> None:
    from raydiff.distributed.tracking import of_comparison

    files = report.write(tiny_settings, compared)
    first, again = of_comparison(compared, files), of_comparison(compared, files)
    assert first == again
    run = again.client().get_run(again.run_id)
    paid = json.loads((compared / "results.json").read_text())["tasks"]["blue"]["draft_lv"]["prices"][0]["queries"]["value"]
    assert run.data.metrics["blue/draft_lv/queries_to_-0.124"] == pytest.approx(paid)
    names = {item.path for item in again.client().list_artifacts(again.run_id)}
    assert names == {file.name for file in [*files, *(compared / "runs").glob("*.json")]}
