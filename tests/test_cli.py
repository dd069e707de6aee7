"""The command line: fast help, plain messages with exit code 2, and whole commands on a tiny model."""

import json
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from raydiff import cli
from raydiff.bench.settings import FILE
from raydiff.config import Run
from raydiff.core.policy import Calls
from tests.tiny import make_adapter, make_pipeline

Call = Callable[..., tuple[int, str, str]]
TINY = ("--steps", "2", "--guidance", "2", "--device", "cpu")


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """call("train", recipe, ...) -> (exit code, stdout, stderr) of the entry point."""
    monkeypatch.delenv("RAYDIFF_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def recipe(tiny_run: Callable[..., Run], tmp_path: Path) -> Path:
    """run.json of a tiny run that takes one update."""
    path = tmp_path / "tiny.json"
    changes = {"storage": str(tmp_path / "runs"), "train.updates": 1, "batch.size": 2, "evaluate.images": 2, "evaluate.grid": 2}
    path.write_text(tiny_run("draft_k", changes).model_dump_json())
    return path


def test_help_takes_under_a_second_and_imports_nothing_heavy() -> None:
    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-m", "raydiff.cli", "--help"], capture_output=True, text=True, check=True)
        assert all(command in done.stdout for command in ("train", "generate", "score", "evaluate", "sweep", "bench", "plan"))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # what a busy machine does not change

    assert statistics.median(seconds() for _ in range(3)) < 1
    heavy = "torch", "ray", "diffusers", "transformers", "mlflow", "pyarrow"
    code = f"import sys, raydiff.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "{tiny}.jsn"], "does not exist"),
        (["train", "{tiny}", "methd.k=2"], "unknown key 'methd'; did you mean 'method'?"),
        (["train", "{tiny}", "method.k"], "override 'method.k' is not path=value"),
        (["plan", "{tiny}", "method.k=9"], "method.k = 9 is more than sampler.steps = 4"),
        (["train", "{tiny}", "batch.size=3"], "set batch.size to 2 or 4"),
        (["train", "{tiny}", "--local", "--resume", "a"], "--resume needs checkpoints"),
        (["train", "{tiny}", "--local", "model.path=/nowhere"], "model.path = '/nowhere' is neither a folder"),
        (["train", "{tiny}", "--local", "storage=s3://bucket/x"], "--local writes to a folder of this machine"),
        (["generate"], "no prompt given"),
        (["generate", "--prompts-file", "/nowhere.txt"], "--prompts-file = '/nowhere.txt' is not a file"),
        (["generate", "a", "--seeds", "1,x"], "'x' is not a number or a rising range"),
        (["generate", "a", "--to", "{tiny}/pictures"], "cannot write to"),
        (["generate", "a", "--to", "{folder}", "--adapter", "a:half"], "weight 'half' is not a number"),
        (["generate", "a", "--to", "{folder}", "--adapter", "{folder}"], "there is no pytorch_lora_weights.safetensors"),
        (["generate", "a", "--to", "{folder}", "--model", "/nowhere"], "model.path = '/nowhere' is neither a folder"),
        (["generate", "a", "--to", "{folder}", "--steps", "0"], "steps: Input should be greater than or equal to 1 (got 0)"),
        (["generate", "a", "--to", "{folder}", "--spacing", "even"], "spacing: "),
        (["generate", "a", "--to", "{folder}", "--dtype", "int8"], "dtype: "),
        (["generate", "a", "--to", "{folder}", "--device", "cuda:99"], "--device cuda:99: "),
        pytest.param(
            ["train", "{tiny}", "--local", "pools.train.num_gpus=1"],
            "pools.train.num_gpus = 1: ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["plan", "{tiny}", "--cluster", "/nowhere.yaml"], "--cluster /nowhere.yaml: "),
        (["submit", "{tiny}", "--address", "http://127.0.0.1:9"], "give --working-dir"),
        (["generate", "a", "--to", "{folder}", "--replicas", "2"], "--replicas does nothing here: it takes --ray"),
        (["generate", "a", "--to", "{folder}.parquet", "--device", "cpu"], "--device does nothing here: it takes --num-gpus"),
        (
            ["generate", "a", "--to", "{folder}.parquet", "--replicas", "0"],
            "replicas: Input should be greater than or equal to 1",
        ),
        (["generate", "a", "--to", "{folder}.parquet", "--label", "gpu"], "--label 'gpu' is not KEY=VALUE"),
        (
            ["generate", "a", "--to", "{folder}.parquet", "--adapter", "{folder}"],
            "there is no pytorch_lora_weights.safetensors",
        ),
        (["generate", "--prompts-file", "/nowhere.txt", "--ray"], "--prompts-file = '/nowhere.txt' is not a file"),
        (["score", "x"], "either by --recipe RUN.toml or by --reward NAME=KIND"),
        (["score", "x", "--reward", "clip"], "--reward 'clip' is not NAME=KIND"),
        (["score", "x", "--reward", "a=clipp"], "kind = 'clipp' does not exist; did you mean 'clip'?"),
        (["score", "x", "--reward", "a=colour", "rewards.a.bordr=1"], "unknown key 'bordr'; did you mean 'border'?"),
        (["score", "/nowhere", "--reward", "a=colour"], "DATASET = '/nowhere': there is no Parquet file"),
    ],
)
def test_a_users_fault_is_one_plain_message(
    call: Call, recipe: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    filled = [a.format(tiny=recipe, folder=tmp_path / "out") for a in arguments]
    code, _, err = call(*filled)
    assert code == 2
    assert err.startswith("raydiff: ")
    assert message in err
    assert "Traceback" not in err


def test_debug_shows_where_it_came_from(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYDIFF_DEBUG", "1")
    with pytest.raises(ValueError, match="no prompt given"):
        cli.main(["generate"])


def test_a_message_that_is_not_ours_says_how_to_see_more(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_numbers", lambda text: int("far inside"))
    code, _, err = call("generate", "a", "--seeds", "1")
    assert code == 2
    assert "invalid literal for int()" in err  # raised by a function of this test, outside the package
    assert "RAYDIFF_DEBUG=1" in err


def test_a_programming_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_numbers", lambda text: {}["gone"])
    with pytest.raises(KeyError):
        cli.main(["generate", "a", "--seeds", "1"])


def test_ctrl_c_is_130(call: Call, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import raydiff.local

    def stopped(*_: Any, **__: Any) -> Any:
        yield {"step": 0, "held_out/total": 0.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(raydiff.local, "fit", stopped)
    assert call("train", recipe, "--local")[0] == 130


def test_two_runs_of_one_second_have_folders_of_their_own(
    call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("raydiff.local.fit", stopped)
    monkeypatch.setattr("time.strftime", lambda form, *_: "20300101-000000")
    for _ in range(2):
        assert call("train", recipe, "--local")[0] == 130
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2 and all(f.name.startswith("tiny-20300101-000000-") for f in folders)


def test_unknown_commands_and_options_are_2(call: Call) -> None:
    assert call("trian")[0] == 2
    assert call("train")[0] == 2
    assert call("generate", "a", "--nonsense")[0] == 2


def test_train_here_then_generate_with_what_it_made(call: Call, recipe: Path, tmp_path: Path) -> None:
    code, out, err = call("train", recipe, "optimizer.lr=0.5", "--local")
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("tiny-")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert f"{lines[0]['held_out/total']:.4f} -> {lines[1]['held_out/total']:.4f}" in out
    assert f"drift: 0.0000 -> {lines[1]['drift']:.4f}" in out
    assert f"best adapter: {folder / 'adapter_best'}: held_out/total = " in out
    assert (folder / "adapter_best" / "best.json").is_file()
    assert json.loads((folder / "run.json").read_text())["optimizer"]["lr"] == 0.5
    grid = Image.open(folder / "before_after.png")
    assert grid.height > 2 * 128  # a row before, a row after

    code, out, err = call(
        "generate", "a cat", "--recipe", folder / "run.json", "--adapter", f"{folder / 'adapter'}:0.5", "--to", tmp_path / "out",
        "--lora-scale", "2", "--seeds", "3,5-6", "--device", "cpu",
    )  # fmt: skip
    assert code == 0, err
    index = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [i["seed"] for i in index["images"]] == [3, 5, 6]
    assert index["adapters"][0]["weight"] == 1.0
    assert index["sampler"]["steps"] == 4
    assert "grid.png" in out


def test_generate_from_a_file_of_prompts(call: Call, tiny_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\na dog\n")
    code, _, err = call(
        "generate", "a bee", "--prompts-file", tmp_path / "prompts.txt", "--model", tiny_pipeline, "--to", tmp_path / "out",
        "--n", "2", "--seed", "9", "--spacing", "none", "--final-alpha", "none", *TINY,
    )  # fmt: skip
    assert code == 0, err
    index = json.loads((tmp_path / "out" / "images.json").read_text())
    assert [(i["prompt"], i["seed"]) for i in index["images"]] == [(p, s) for p in ("a bee", "a cat", "a dog") for s in (9, 10)]
    assert index["sampler"]["spacing"] is None
    assert sorted(p.name for p in (tmp_path / "out").glob("0*.png")) == sorted(i["file"] for i in index["images"])


def test_an_adapter_of_another_base_is_refused(call: Call, tiny_pipeline: Path, tmp_path: Path) -> None:
    wider = make_pipeline(tmp_path / "wider", width=20)
    adapter = make_adapter(tiny_pipeline, tmp_path / "adapter")
    code, _, err = call("generate", "a", "--model", wider, "--adapter", adapter, "--to", tmp_path / "out", *TINY)
    assert code == 2
    assert "is for another base model: down_blocks.1.attentions.0" in err


def test_plan_prints_and_refuses(call: Call, recipe: Path) -> None:
    code, out, err = call("plan", recipe)
    assert code == 0, err
    assert "2 prompts an update = 2 a micro-batch × 1 accumulated × 1 worker" in out
    assert "memory of a worker" in out
    code, out, _ = call("plan", recipe, "pools.train.num_cpus=5000")
    assert code == 2
    assert "set pools.train.num_cpus to" in out


def test_sweep_refuses_before_ray_is_asked(call: Call, recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(f'recipe = "{recipe}"\nsearch = "grid"\n[space]\n"method.kk" = {{choice = [1, 2]}}\n')
    code, _, said = call("sweep", file)
    assert code == 2
    assert said.startswith("raydiff: space: method.kk = 1: method: unknown key 'kk'; did you mean 'k'?\n")
    code, _, said = call("sweep", tmp_path / "nowhere.toml")
    assert (code, "nowhere.toml' does not exist" in said) == (2, True)


def test_bench_names_a_fault_of_its_settings(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("seeds = 1")
    code, _, said = call("bench", "--settings", file)
    assert (code, "settings.toml: base: Field required" in said) == (2, True)


RECIPE = str(Path(__file__).parents[1] / "jobs/recipes/emoji_draft_lv.toml")


READS_A_RECIPE = {
    "train": [],
    "plan": [],
    "submit": [],
    "evaluate": ["--adapter", "x"],
    "pairs from-rewards": [],
    "pairs to-label": [],
    "pairs encode": [],
}


def own_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that raises when it is imported."""
    (folder / "someones").mkdir()
    (folder / "someones/judge.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(folder)


@pytest.mark.parametrize(("field", "value"), [("kind", "someones.judge"), ("runtime_env", "{pip = ['x']}")])
@pytest.mark.parametrize("command", READS_A_RECIPE)
def test_a_recipe_with_code_of_its_own_is_refused(
    command: str, field: str, value: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_code(tmp_path, monkeypatch)
    given = ["rewards.mine.kind=colour", "rewards.where=pool", f"rewards.mine.{field}={value}"]
    code, _, said = call(*command.split(), RECIPE, *given, "--no-own-code", *READS_A_RECIPE[command])
    assert (code, "--no-own-code refuses it" in said) == (2, True)
    assert "someones" not in sys.modules


def test_every_other_reader_of_a_recipe_refuses_its_code_too(
    call: Call, tmp_path: Path, tiny_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run file of generate and score, a reward by option, a sweep's axis, a comparison's task, and a run's own record."""
    own_code(tmp_path, monkeypatch)
    run = json.loads(tiny_run().model_dump_json())
    good, bad = tmp_path / "good.json", tmp_path / "bad" / "run.json"
    bad.parent.mkdir()
    good.write_text(json.dumps(run))
    run["rewards"]["blue"]["kind"] = "someones.judge"
    bad.write_text(json.dumps(run))
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(
        f'''recipe = "{good}"\nsearch = "grid"\n[space]\n"rewards.blue.kind" = {{choice = ["someones.judge"]}}\n'''
    )
    settings = tmp_path / "settings.toml"
    settings.write_text(FILE.read_text().replace('kind = "colour"', 'kind = "someones.judge"'))
    for words in (
        ["generate", "a cat", "--recipe", bad, "--to", tmp_path / "x"],
        ["score", "nowhere.parquet", "--recipe", bad],
        ["score", "nowhere.parquet", "--reward", "mine=someones.judge"],
        ["score", "nowhere.parquet", "--reward", "mine=colour", "rewards.mine.runtime_env={pip=['x']}"],
        ["sweep", sweep],
        ["bench", "--settings", settings, "--to", tmp_path / "y"],
        ["log", bad.parent],
    ):
        code, _, said = call(*words, "--no-own-code")
        assert (code, "someones" in sys.modules) == (2, False), words
        assert "--no-own-code refuses it" in said, said
    code, _, said = call("generate", "a cat", "--recipe", bad, "--to", tmp_path / "x")
    assert (code, "SystemExit: imported" in said) == (2, True)  # the refusal ends with its command


def test_a_name_that_no_metric_can_have_is_refused_before_an_override_splits_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["evaluate", RECIPE, "--adapter", "x", "--reward", "a.b=clip"])
    assert "'a.b' cannot be a reward's name" in capsys.readouterr().err


def test_log_tells_what_mlflow_refuses_for_good(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    """A metric of a name that MLflow does not take, and one that it does."""
    from raydiff.distributed import checkpoint
    from raydiff.distributed.storage import Folder

    run, folder = tiny_run(changes={"storage": str(tmp_path)}), tmp_path / "tiny-1"
    checkpoint.save(
        Folder(folder), [], run=run, next_step=1, calls=Calls(), seconds=1.0,
        history=[{"step": 1.0, "seconds": 1.0, "loss": 0.5, "a/../b": 1.0}],
    )  # fmt: skip
    (folder / "run.json").write_text(run.model_dump_json())
    done = subprocess.run([sys.executable, "-m", "raydiff.cli", "log", str(folder)], capture_output=True, text=True)
    out, err = done.stdout, done.stderr
    assert done.returncode == 0, err
    first, last = out.splitlines()
    assert first.startswith("MLflow refuses 'a/../b' for good, and it is left out: ") and last.startswith("MLflow: sqlite:")
    assert "refuses" not in err  # once
