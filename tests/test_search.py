"""Sweep files: what is refused before anything starts, and what a trial is judged by."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydiff import placement, search
from raydiff.config import ConfigError, Run, dump, load, validated
from raydiff.placement import Node
from raydiff.search import Sweep

ROOT = Path(__file__).parents[1]
Make = Callable[..., Sweep]


@pytest.fixture
def make(tiny_run: Callable[..., Run], tmp_path: Path) -> Make:
    """make(space, ...) -> a sweep over a tiny recipe."""

    def sweep(space: dict[str, Any], method: str = "draft_k", **fields: Any) -> Sweep:
        recipe = tmp_path / "recipe.json"
        changes = {"sampler.eta": 1.0, "sampler.final_alpha": None} if method == "d3po" else {}
        recipe.write_text(tiny_run(method, changes).model_dump_json())
        return validated({"recipe": str(recipe), "space": space, "trials": 4, **fields}, Sweep)

    return sweep


@pytest.mark.parametrize("file", sorted((ROOT / "jobs" / "sweeps").glob("*.toml")), ids=lambda f: f.stem)
def test_every_sweep_in_the_repository_parses(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = search.load(file, ["train.updates=3"])
    assert sweep.count >= 5
    assert all(run.train.updates == 3 for run in sweep.examples())


@pytest.mark.parametrize(
    ("space", "fields", "message"),
    [
        ({"method.kk": {"choice": [1]}}, {}, r"unknown key 'kk'; did you mean 'k'\?"),
        ({"method.k": {"choice": [1, 9]}}, {}, r"space: method\.k = 9: .*more than sampler\.steps = 4"),
        ({"method.k": {"uniform": [1, 3]}}, {}, r"method\.k.*integer"),
        ({"optimizer.lr": {"loguniform": [0, 1]}}, {}, "both must be positive"),
        ({"optimizer.lr": {"uniform": [2, 1]}}, {}, "the first must be the smaller"),
        ({"optimizer.lr": {"uniform": [1, 2], "grid": [1]}}, {}, "an axis is one of"),
        ({"storage": {"choice": ["a"]}}, {}, "a sweep gives each trial its own"),
        ({"method.k": {"choice": [1]}}, {"metric": "held_out/red"}, "'held_out/red' is not measured; there are .*held_out/blue"),
        ({"method.k": {"choice": [1]}}, {"penalty": {"metric": "drft", "weight": 1}}, r"penalty\.metric = 'drft'"),
        ({"method.k": {"choice": [1]}}, {"search": "grid"}, "leave trials out"),
        ({"optimizer.lr": {"uniform": [1, 2]}}, {"search": "grid", "trials": None}, "is a range"),
        ({"method.k": {"choice": [1]}}, {"trials": None}, "trials is missing"),
        ({"method.k": {"grid": [1]}}, {"search": "optuna"}, "is a grid: use choice"),
        ({"method.k": {"choice": [1]}}, {"scheduler": {"kind": "pbt", "grace": 1}}, "population-based training hands weights"),
        ({"method.k": {"choice": [1]}}, {"set": {"train": {"updates": 2}}}, "would replace the whole"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)  # fmt: skip
def test_what_cannot_work_is_refused(make: Make, space: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(space, **fields)


def test_beta_is_judged_by_its_method(make: Make) -> None:
    with pytest.raises(
        ConfigError,
        match=r"method\.beta = 0\.1 is not usual for diffusion_dpo, where it is the factor.*set it between 1 and 100000",
    ):
        make({"method.beta": {"choice": [0.1, 2000]}}, "diffusion_dpo")
    with pytest.raises(ConfigError, match=r"method\.beta = 5000 is not usual for d3po.* 0\.001 and 100"):
        make({"method.beta": {"loguniform": [0.01, 5000]}}, "d3po")
    both = {"choice": [{"kind": "diffusion_dpo", "beta": 0.1}]}
    with pytest.raises(ConfigError, match="not usual for diffusion_dpo"):
        make({"method": both})
    assert len(make({"method.beta": {"loguniform": [0.01, 1]}}, "d3po").examples()) == 3


def test_json_round_trip_is_exact(make: Make) -> None:
    sweep = make({"method.k": {"grid": [1, 2]}, "optimizer.lr": {"uniform": [1, 2]}}, penalty={"weight": 1})
    assert Sweep.model_validate_json(sweep.model_dump_json()) == sweep


def test_a_sweep_holds_what_its_recipe_was(make: Make, tmp_path: Path) -> None:
    """Neither it nor a copy that a trial gets reads the file again."""
    sweep = make({"method.k": {"choice": [1, 2]}}, set={"train.updates": 7})
    before, recipe = sweep.base(), tmp_path / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"lr":0.01', '"lr":0.5'))
    assert load(recipe).optimizer.lr == 0.5
    for held in (sweep, Sweep.model_validate_json(sweep.model_dump_json())):
        assert held.base() == before and held.base().train.updates == 7
        assert held.run({"method.k": 2}).optimizer.lr == before.optimizer.lr == 0.01
        assert {run.optimizer.lr for run in held.examples()} == {0.01}
    recipe.unlink()
    assert Sweep.model_validate_json(sweep.model_dump_json()).run({}) == before


def test_a_sweep_file_has_no_content_of_its_own(make: Make, tmp_path: Path) -> None:
    make({"method.k": {"choice": [1]}})
    (tmp_path / "sweep.toml").write_text(
        f'recipe = "{tmp_path}/recipe.json"\ntrials = 1\n[space]\n"method.k" = {{choice = [1]}}\n[content]\nname = "x"\n'
    )
    with pytest.raises(ConfigError, match="unknown key 'content'; a sweep file names its recipe"):
        search.load(tmp_path / "sweep.toml")


def test_counts_and_examples(make: Make) -> None:
    drawn = make({"method.k": {"grid": [1, 2, 3]}, "optimizer.lr": {"loguniform": [1e-4, 1e-2]}})
    assert drawn.count == 12
    assert {(run.method.k, run.optimizer.lr) for run in drawn.examples()} == {
        (k, lr) for k in (1, 2, 3) for lr in (1e-4, 1e-3, 1e-2)
    }
    everything = make({"method.k": {"choice": [1, 2]}, "optimizer.lr": {"choice": [1, 2, 3]}}, search="grid", trials=None)
    assert everything.count == 6


def test_objective_is_the_reward_minus_drift(make: Make) -> None:
    row = {"held_out/total": 2.0, "drift": 0.5}
    space = {"method.k": {"choice": [1]}}
    assert make(space).objective(row) == 2
    assert make(space, mode="min").objective(row) == -2
    assert make(space, penalty={"weight": 3}).objective(row) == 0.5
    with pytest.raises(ConfigError, match="'drift' was not measured"):
        make(space, penalty={"weight": 3}).objective({"held_out/total": 2.0})


def test_copies_that_have_room_at_once(make: Make) -> None:
    (run,) = make({"method.k": {"choice": [1]}}, set={"pools.train.replicas": 2}).examples()
    assert placement.copies(run, [Node(2)], 9) == 1
    assert placement.copies(run, [Node(3), Node(3)], 9) == 3
    assert placement.copies(run, [Node(20)], 4) == 4
    assert placement.copies(run, [Node(1)], 4) == 0


def test_a_dumped_run_reads_back(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    changes = {
        "rewards": {"a-b": {"kind": "colour", "weight": 1e-5}, "c": {"kind": "clip"}},
        "pools.train.labels": {"raydiff-pool": "train", "disk of node": "a b"}, "sampler.final_alpha": None,
    }  # fmt: skip
    run = tiny_run("draft_k", changes)
    (tmp_path / "run.toml").write_text(dump(run))
    assert load(tmp_path / "run.toml") == run


def test_paths_of_a_sweep_file_are_looked_for_beside_it(
    tiny_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recipe, `set` and values to vary; those on the command line are relative to the current folder."""
    for name in ("recipes", "sweeps", "elsewhere"):
        (tmp_path / name).mkdir()
    for name in ("recipes/a.txt", "sweeps/a.txt", "sweeps/b.txt", "elsewhere/c.txt"):
        (tmp_path / name).write_text("a fish\n")
    recipe = tiny_run("draft_k", {"prompts.train": "a.txt", "prompts.held_out": ("a pig",)})
    (tmp_path / "recipes/mine.json").write_text(recipe.model_dump_json())
    file = tmp_path / "sweeps/mine.toml"
    text = 'recipe = "../recipes/mine.json"\nsearch = "grid"\n[space]\n"optimizer.lr" = {choice = [1e-3]}\n'
    file.write_text(text)
    monkeypatch.chdir(tmp_path / "elsewhere")

    def trained_on(sweep: Sweep) -> list[str]:
        again = Sweep.model_validate_json(sweep.model_dump_json())  # as trials read it
        assert again.examples() == sweep.examples()
        return [run.prompts.train for run in sweep.examples()]

    assert trained_on(search.load(file)) == [f"{tmp_path}/recipes/a.txt"]
    assert trained_on(search.load(file, ["prompts.train=a.txt"])) == ["a.txt"]
    assert search.load(file, ["optimizer.ema=none", "seed=4"]).base().seed == 4
    file.write_text(text + '"prompts.train" = {choice = ["a.txt", "c.txt"]}\n')
    assert trained_on(search.load(file)) == [f"{tmp_path}/sweeps/a.txt", "c.txt"]
    file.write_text(text + '[set]\n"prompts.train" = "b.txt"\n"optimizer.ema" = "none"\n')
    assert trained_on(search.load(file)) == [f"{tmp_path}/sweeps/b.txt"]


@pytest.mark.parametrize("file", sorted((ROOT / "jobs" / "sweeps").glob("*.toml")), ids=lambda f: f.stem)
def test_every_sweep_finds_its_recipe_from_another_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(search.load(file).base().prompts.train).is_file()
