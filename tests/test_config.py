"""The run file: errors that name field, value and way out; round trips; dotted paths."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydiff.config import ConfigError, Run, dump, flat, geometry, kinds, load, override, rewards

RECIPES = sorted(Path(__file__).parents[1].glob("jobs/recipes/*.toml"))
BASE = """
[model]
kind = "stable_diffusion"
[method]
kind = "draft_k"
k = 2
[rewards.blue]
kind = "colour"
[sampler]
steps = 10
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(BASE)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_parses_and_round_trips_through_json(path: Path, tmp_path: Path) -> None:
    run = load(path)
    assert run.name == path.stem
    text = run.model_dump_json()
    assert Run.model_validate_json(text) == run
    copy = tmp_path / "run.json"
    copy.write_text(text)
    assert load(copy) == run
    assert flat(load(copy)) == flat(run)
    assert geometry(run).size == run.batch.size


def test_there_are_the_recipes_that_the_readme_names() -> None:
    assert {p.stem for p in RECIPES} >= {
        "emoji_d3po",
        "emoji_ddpo",
        "emoji_dpo",
        "emoji_dpo_ai_feedback",
        "emoji_draft",
        "emoji_draft_k",
        "emoji_draft_lv",
        "emoji_draft_lv_pools",
        "emoji_refl",
        "sd15_d3po_aesthetic",
        "sd15_dpo_full",
        "sd15_dpo_pickapic",
        "sd15_draft_k_pickscore_pools",
        "sd15_draft_lv_aesthetic",
        "sd15_draft_lv_pools",
    }


def test_overrides_take_toml_values_and_are_validated_again(recipe: Path) -> None:
    run = load(
        recipe, ["method.k=3", "model.lora.rank=4", "name=other", "rewards.blue.rgb=[0.0, 0.5, 1.0]", "optimizer.ema=0.9"]
    )
    assert (run.method.k, run.model.lora.rank, run.name, run.optimizer.ema) == (3, 4, "other", 0.9)
    assert run.rewards.named["blue"].rgb == (0.0, 0.5, 1.0)
    assert load(recipe, ["optimizer.ema=0.9", "optimizer.ema=none"]).optimizer.ema is None
    assert override(run, {"method.k": 5, "rewards.blue.weight": 2.0}).rewards.named["blue"].weight == 2.0
    assert override(run, {}) == run
    with pytest.raises(ConfigError, match="method.k = 11"):
        override(run, {"method.k": 11})


def test_another_kind_starts_from_its_own_defaults(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="method: unknown key 'k'"):
        load(recipe, ["method.kind=refl"])
    assert override(load(recipe), {"method": {"kind": "refl"}}).method.last_steps == 10


def test_flat_has_a_scalar_for_every_dotted_path(recipe: Path) -> None:
    run = load(recipe)
    values = flat(run)
    assert values["method.k"] == 2 and values["rewards.blue.region"] == "border" and values["sampler.steps"] == 10
    assert override(run, {k: v for k, v in values.items() if not isinstance(v, dict)}) == run


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"sampler.stepz": 10}, ["sampler: unknown key 'stepz'; did you mean 'steps'?"]),
        ({"samplr.steps": 10}, ["unknown key 'samplr'; did you mean 'sampler'?"]),
        ({"method.kk": 1}, ["method: unknown key 'kk'"]),
        ({"rewards.blue.regoin": "all"}, ["rewards.blue: unknown key 'regoin'; did you mean 'region'?"]),
        ({"model.lora.rnk": 1}, ["model.lora: unknown key 'rnk'; did you mean 'rank'?"]),
        ({"method.kind": "draft_kk"}, ["method: kind = 'draft_kk' does not exist; did you mean 'draft_k'?", "draft_lv"]),
        ({"rewards.blue.kind": "color"}, ["rewards.blue: kind = 'color' does not exist; did you mean 'colour'?"]),
        ({"rewards.blue.kind": "nowhere.at_all"}, ["rewards.blue: kind = 'nowhere.at_all' does not exist"]),
        ({"method.k": 0}, ["method.k: Input should be greater than or equal to 1 (got 0)"]),
        ({"method.k": 11}, ["method.k = 11 is more than sampler.steps = 10", "use draft"]),
        ({"method": {"kind": "refl", "last_steps": 11}}, ["method.last_steps = 11 exceeds sampler.steps = 10"]),
        (
            {"rewards.size.kind": "jpeg_size"},
            ["rewards.size: kind = 'jpeg_size' has no gradient", "'draft_k'", "evaluate.rewards.size"],
        ),
        ({"batch.size": 7, "batch.micro": 2}, ["batch.size = 7 is not divisible", "2 × 1 = 2", "6 or 8"]),
        ({"pools.train.replicas": 3}, ["4 × 3 = 12", "set batch.size to 12"]),
        ({"evaluate.rewards.blue.kind": "symmetry"}, ["evaluate.rewards: ['blue'] is trained on too"]),
        ({"rewards.total.kind": "symmetry"}, ["cannot be named 'total'"]),
        ({"model.train": "full", "model.dtype": "bfloat16"}, ["model.dtype = 'bfloat16'", "float32"]),
        ({"optimizer.lr": float("nan")}, ["optimizer.lr"]),
        ({"sampler.spacing": "trailling"}, ["sampler.spacing", "'leading', 'trailing' or 'linspace'", "'trailling'"]),
        ({"method.kl": -1.0}, ["method.kl = -1.0 is negative"]),
        ({"name": "../up"}, ["name"]),
    ],
)
def test_a_wrong_run_says_which_field_and_the_way_out(recipe: Path, changes: dict[str, Any], messages: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        override(load(recipe), changes)
    for message in messages:
        assert message in str(error.value)


def test_several_faults_are_told_at_once(recipe: Path) -> None:
    with pytest.raises(ConfigError) as error:
        load(recipe, ["sampler.steps=0", "optimizer.lr=-1", "train.zero_stage=4"])
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "sampler.steps", "optimizer.lr", "train.zero_stage",
    ]  # fmt: skip


def test_none_is_written_as_a_word_in_files_and_overrides(recipe: Path) -> None:
    recipe.write_text(BASE + 'final_alpha = "none"\n[prompts]\nheld_out = ["none", "a cat"]\n')
    run = load(recipe)
    assert run.sampler.final_alpha is None and run.prompts.held_out == ("none", "a cat")
    assert load(recipe, ['sampler.spacing="none"', "optimizer.ema=none"]).sampler.spacing is None


def test_missing_files_and_broken_syntax(tmp_path: Path, recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"mien.toml' does not exist; did you mean 'mine.toml'"):
        load(tmp_path / "mien.toml")
    with pytest.raises(ConfigError, match="not path=value"):
        load(recipe, ["method.k"])
    with pytest.raises(ConfigError, match="'k' is a value, not a table"):
        load(recipe, ["method.k.x=1"])
    recipe.write_text("[model")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(recipe)


def test_needed_tables_are_named(recipe: Path) -> None:
    recipe.write_text(json.dumps({"method": {}}))
    with pytest.raises(ConfigError) as error:
        load(recipe.rename(recipe.with_suffix(".json")))
    text = str(error.value)
    assert "model: Field required" in text and "rewards: Field required" in text
    assert 'method: needs kind = "...", one of d3po, ddpo, diffusion_dpo, draft, draft_k, draft_lv, refl, rwr, sft' in text


def test_kinds_are_the_modules_with_a_plugin() -> None:
    assert kinds("raydiff.models") == ("stable_diffusion",)
    assert kinds("raydiff.rewards") == ("aesthetic", "classifier", "clip", "colour", "jpeg", "jpeg_size", "symmetry")
    assert "base" not in kinds("raydiff.methods")


@pytest.mark.parametrize("field", ["model", "method", "rewards.blue"])
@pytest.mark.parametrize(
    "kind",
    ["lora", "_pretrained", "_images", "base", "", ".", "a..b", ".colour", "my package.reward", "nowhere.at_all", 3, ["clip"]],
)
def test_a_kind_that_is_none_is_refused_with_the_advice_of_its_field(recipe: Path, field: str, kind: Any) -> None:
    """Each once: "there are ...", and a module's name that fits."""
    with pytest.raises(ConfigError) as error:
        override(load(recipe), {field: {"kind": kind}})
    text = str(error.value)
    assert text.startswith(f"{field}: kind = {kind!r} does not exist")
    assert text.count("there are") == 1
    assert not re.search(r"there are[^;]*\b(_images|_pretrained|lora|base)\b", text)
    what = {"model": "model", "method": "method", "rewards.blue": "reward"}[field]
    assert text.endswith(f"my_package.my_{what}")


BROKEN = {
    "syntax": ("def f(:", "cannot be imported: SyntaxError: "),
    "package": (
        "import not_installed_at_all",
        "cannot be imported: ModuleNotFoundError: No module named 'not_installed_at_all'",
    ),
    "name": ("from math import nothing", "cannot be imported: ImportError: cannot import name 'nothing'"),
    "raises": ("raise RuntimeError('no\\nlicence')", "cannot be imported: RuntimeError: no licence; mend the module"),
    "ends": ("import sys; sys.exit(1)", "cannot be imported: SystemExit: 1"),
    "empty": ("", "has no class Plugin that is a raydiff.rewards.base.RewardConfig, so it is no reward"),
    "plain": ("class Plugin: pass", "has no class Plugin that is a raydiff.rewards.base.RewardConfig"),
    "value": ("Plugin = 3", "has no class Plugin that is a raydiff.rewards.base.RewardConfig"),
    "other": ("from raydiff.methods.draft import Plugin", "has no class Plugin that is a raydiff.rewards.base.RewardConfig"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_module_that_is_there_but_broken_says_so(recipe: Path, tmp_path: Path, monkeypatch: Any, name: str) -> None:
    source, message = BROKEN[name]
    package = tmp_path / f"own_{name}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "judge.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as error:
        override(load(recipe), {"rewards.blue": {"kind": f"own_{name}.judge"}})
    assert str(error.value).startswith(f"rewards.blue: kind = 'own_{name}.judge' {message}")
    assert "does not exist" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *((name, "cannot be a reward's name") for name in ("clip@0.5", "a/b", "a.b", "a b", "", "-a", "a=b", "a:b", "../x", "x" * 101)),
        ("a\nb", "cannot be a reward's name"),
        *((name, "a reward cannot be named") for name in ("total", "Total", "TOTAL", "best")),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_logged_or_set_is_refused(recipe: Path, name: str, message: str) -> None:
    tree = load(recipe).model_dump(mode="json")
    for path in ("rewards", "evaluate"):
        changed = json.loads(json.dumps(tree))
        (changed["rewards"] if path == "rewards" else changed["evaluate"]["rewards"])[name] = {"kind": "symmetry"}
        (recipe.parent / "run.json").write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match=re.escape(message)) as error:
            load(recipe.parent / "run.json")
        assert repr(name) in str(error.value)
        assert len(str(error.value).splitlines()) == 1
    with pytest.raises(ConfigError, match=re.escape(message)):
        rewards({name: "clip"})


@pytest.mark.parametrize("name", ["where", "Where"])
def test_a_setting_is_no_name(recipe: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="where|Where"):
        override(load(recipe), {f"rewards.{name}": {"kind": "symmetry"}})
    with pytest.raises(ConfigError, match=f"a reward cannot be named '{name}', a setting"):
        override(load(recipe), {f"evaluate.rewards.{name}": {"kind": "symmetry"}})


@pytest.mark.parametrize("name", ["loss", "kl", "grad_norm", "named", "model_dump", "clip-05", "Schärfe", "1st", "alignment"])
def test_other_names_are_taken_and_round_trip(recipe: Path, name: str) -> None:
    """What raydiff measures itself is no collision: rewards are logged below reward/ and held_out/."""
    run = override(load(recipe), {f"rewards.{name}": {"kind": "symmetry"}})
    assert run.rewards.named.keys() == {"blue", name}
    assert Run.model_validate_json(run.model_dump_json()) == run == override(run, flat(run))


@pytest.mark.parametrize(("trained", "held_out"), [("Blue", None), (None, "BLUE"), ("ﬁne", "fine")])
def test_names_that_differ_only_by_case_are_refused(recipe: Path, trained: str | None, held_out: str | None) -> None:
    changes = {f"rewards.{trained}.kind": "symmetry"} if trained else {}
    changes |= {f"evaluate.rewards.{held_out}.kind": "symmetry"} if held_out else {}
    with pytest.raises(ConfigError, match="differ only by case"):
        override(load(recipe), changes)


@pytest.mark.parametrize(
    "name", ["../../x", "..", ".", "", " ", "/tmp/x", "a/", "a//b", "a/../../b", "a\nb", "%41", "x" * 300, "a/ .. /b"]
)
def test_an_experiment_stays_in_its_folder(recipe: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="^tracking: experiment = "):
        override(load(recipe), {"tracking.experiment": name})


def test_an_experiment_may_have_a_path_where_a_server_keeps_it(recipe: Path) -> None:
    assert override(load(recipe), {"tracking": {"experiment": "/Users/me/x", "uri": "databricks"}}).tracking.served
    assert not override(load(recipe), {"tracking.experiment": "team: a/b #2"}).tracking.served


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards.blue": {"kind": "own_code.judge"}},
        {"model.kind": "own_code.model"},
        {"method.kind": "own_code.method"},
        {"evaluate.rewards.x": {"kind": "own_code.judge"}},
        {"rewards": {"where": "pool", "blue": {"kind": "colour", "runtime_env": {"pip": ["x"]}}}},
    ],
)
def test_code_of_ones_own_can_be_refused_unread(
    recipe: Path, tmp_path: Path, monkeypatch: Any, changes: dict[str, Any]
) -> None:
    package = tmp_path / "own_code"
    package.mkdir()
    for name in ("__init__", "judge", "model", "method"):
        (package / f"{name}.py").write_text("raise SystemExit('this was run')")
    monkeypatch.syspath_prepend(tmp_path)
    overrides = [f"{path}={_toml(value)}" for path, value in changes.items()]
    with pytest.raises(ConfigError, match="--no-own-code refuses it"):
        load(recipe, overrides, own_code=False)
    assert "own_code" not in sys.modules
    assert load(recipe, own_code=False) == load(recipe)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


def test_a_path_in_a_recipe_is_looked_for_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any folder; one on the command line, and one that is not beside the recipe, stays one of the current folder."""
    for name in ("cats.txt", "pigs.txt", "pairs.parquet", "head.safetensors", "mine/model/unet", "clip", "embedded", "lora"):
        (tmp_path / "jobs" / name).mkdir(parents=True)
    recipe = tmp_path / "jobs" / "mine.toml"
    recipe.write_text(
        BASE.replace('"stable_diffusion"', '"stable_diffusion"\npath = "mine/model"\nadapters = ["lora", "runs/lora"]')
        + '[rewards.look]\nkind = "aesthetic"\nhead = "head.safetensors"\nmodel = "embedded"\n'
        + '[rewards.near]\nkind = "clip"\nmodel = "clip"\nprocessor = "openai/clip"\n'
        + '[evaluate.rewards.what]\nkind = "classifier"\nmodel = "clip"\n[evaluate]\nclip = "clip"\n'
        + '[prompts]\ntrain = "cats.txt"\nheld_out = ["pigs.txt"]\n[pairs]\npath = "pairs.parquet"\n'
    )
    expected = {
        "model.path": "mine/model",
        "model.adapters": ["lora", "runs/lora"],
        "rewards.look.head": "head.safetensors",
        "rewards.look.model": "embedded",
        "rewards.near.model": "clip",
        "rewards.near.processor": "openai/clip",
        "evaluate.rewards.what.model": "clip",
        "evaluate.clip": "clip",
        "prompts.train": "cats.txt",
        "prompts.held_out": ["pigs.txt"],
        "pairs.path": "pairs.parquet",
    }
    away = {"embedded", "openai/clip", "runs/lora", "pigs.txt"}  # words, hub ids, paths from the current folder, prompts

    def seen(prefix: str) -> dict[str, Any]:
        def one(path: str) -> str:
            return path if path in away else f"{prefix}{path}"

        return {field: [*map(one, value)] if isinstance(value, list) else one(value) for field, value in expected.items()}

    (tmp_path / "elsewhere").mkdir()
    for folder, given, prefix in (
        (tmp_path / "jobs", "mine.toml", ""),
        (tmp_path, "jobs/mine.toml", "jobs/"),
        (tmp_path, str(recipe), "jobs/"),
        (tmp_path / "elsewhere", "../jobs/mine.toml", f"{tmp_path}/jobs/"),
    ):
        monkeypatch.chdir(folder)
        run = load(given)
        assert {field: flat(run)[field] for field in expected} == seen(prefix)
        assert Run.model_validate_json(run.model_dump_json()) == run  # as workers and a resumed run read it
        assert override(run, {"seed": 3}).prompts == run.prompts
        mine = load(given, ["prompts.train=pigs.txt", 'model.adapters=["lora"]', "rewards.near={kind='clip', model='clip'}"])
        assert mine.prompts.train == "pigs.txt" and mine.model.adapters == ("lora",)
        assert mine.rewards.named["near"].model == "clip" and mine.model.path == run.model.path


def test_a_field_of_your_own_finds_what_is_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "beside_reward.py").write_text(
        "from raydiff.config import InputPath\nfrom raydiff.rewards.base import RewardConfig\n\n"
        "class Plugin(RewardConfig):\n    weights: InputPath = 'embedded'\n"
    )
    (tmp_path / "w.bin").touch()
    (tmp_path / "mine.toml").write_text(BASE + '[rewards.own]\nkind = "own.beside_reward"\nweights = "w.bin"\n')
    monkeypatch.syspath_prepend(tmp_path)
    assert load(tmp_path / "mine.toml").rewards.named["own"].weights == str(tmp_path / "w.bin")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_finds_its_prompts_from_another_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydiff.data.prompts import read_both

    monkeypatch.chdir(tmp_path)
    assert all(read_both(load(path).prompts))


def test_what_is_in_neither_place_is_told_with_the_rule(recipe: Path) -> None:
    from raydiff.preflight import faults

    recipe.write_text(BASE + '[prompts]\ntrain = "nowhere.txt"\n')
    (fault,) = faults(load(recipe))
    assert "prompts.train = 'nowhere.txt' is not a file" in fault and "beside that file, then in the current folder" in fault


def test_a_table_that_is_set_is_not_changed_by_a_path_into_it(tiny_run: Callable[..., Run]) -> None:
    table = {"kind": "draft_k", "k": 2}
    assert override(tiny_run(), {"method": table, "method.k": 3}).method.k == 3  # type: ignore[attr-defined]
    assert table == {"kind": "draft_k", "k": 2}


@pytest.mark.parametrize("text", ['quotes " and \\ and \n lines', "none of it", "ümläut 猫", "[brackets] = 1"])
def test_a_dumped_run_is_the_same_run(tiny_run: Callable[..., Run], tmp_path: Path, text: str) -> None:
    changes = {"prompts.train": [text, "a cat"], "pools.train.labels": {"zone.x/y": text}, "optimizer.ema": None}
    run = tiny_run(changes=changes)
    (tmp_path / "run.toml").write_text(dump(run))
    assert load(tmp_path / "run.toml") == run
