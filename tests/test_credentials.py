"""Planted secrets: each is refused before anything starts, by its field, and no message, file or request repeats it."""

import json
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raydiff import cli, credentials
from raydiff.config import ConfigError, Pool, Run, Tracking, flat, load, override
from raydiff.data.files import locate
from raydiff.generate import Adapter
from raydiff.search import load as load_sweep

SECRET = "pLaNtEd7"
URIS = [
    f"s3://AKEY:{SECRET}@bucket/x",
    f"S3://AKEY:ab/c+{SECRET}@bucket/x",  # AWS's secrets may hold a slash,
    f"s3://AKEY:12/{SECRET}@bucket/x",  # after what could be a port
    f"s3://{SECRET}@bucket/x",
    f"s3:/AKEY:{SECRET}@bucket/x",
    f"s3%3A%2F%2FAKEY%3A{SECRET}%40bucket",
    f"s3://bucket/x?secret_key={SECRET}",
    f"s3://bucket/x?region=eu&access_key={SECRET}",
    f"https://user:{SECRET}@host/mlflow",
    f"https://{SECRET}@host",
    f"https://host/x?token={SECRET}",
    f"https://host/x#access_token={SECRET}",
    f"https://account.blob.core.windows.net/c?sv=1&sig={SECRET}",
    f"https://bucket.s3.amazonaws.com/x?X-Amz-Signature={SECRET}",
    f"http://[::1]:5000/x?password={SECRET}",
    f"postgresql+psycopg2://user:{SECRET}@db:5432/mlflow",
    f"postgresql://db/mlflow?user=u&password={SECRET}",
    f"mysql://u:{SECRET}@[::1]:3306/x",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3D%7BX%7D%3BUID%3Du%3BPWD%3D{SECRET}",
    f"abfss://container:{SECRET}@account.dfs.core.windows.net/x",
    f"hdfs://user:{SECRET}@host:9000/x",
    f"git+https://user:{SECRET}@host/x",
    f"--index-url https://user:{SECRET}@host/simple",
    f"hf_{SECRET}{'a' * 26}",
    f"ghp_{SECRET}{'a' * 28}",
    "AKIAPLANTED7ABCDEF01",
]
HARMLESS = [
    "s3://bucket/runs", "s3://bucket/user@x/y", "s3://bucket/x?region=eu-west-1", "gs://anonymous@bucket/x",
    "hdfs://user@host:9000/x", "abfss://container@account.dfs.core.windows.net/x", "http://mlflow:5000", "http://host:5000/x@y",
    "http://[::1]:5000/a@b", "postgresql://user@db/mlflow", "sqlite:////data/a@b.db", "runs/NAME:0.8", "owner/name@revision",
    "a cat: a dog @ home", "$MLFLOW_TRACKING_URI", "/shared/a b", "C:/x@y", "databricks://profile", "how many tokens=3?",
]  # fmt: skip
FIELDS = [
    "storage", "tracking.uri", "tracking.experiment", "model.path", "model.adapters", "prompts.train", "prompts.held_out",
    "pairs.path", "pairs.cache", "evaluate.clip", "rewards.blue.kind", "method.kind", "pools.train.labels.x", "name",
    "optimizer.lr", "nothing.of_the.kind", "tracking", "train.stop_when",
]  # fmt: skip
SOME = [URIS[0], URIS[1], URIS[6], URIS[8], URIS[23]]


@pytest.fixture
def recipe(tiny_run: Callable[..., Run], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    changes = {"storage": str(tmp_path / "runs"), "train.updates": 1, "batch.size": 2, "evaluate.images": 2, "evaluate.grid": 2}
    path.write_text(tiny_run("draft_k", changes).model_dump_json())
    return path


def silent(text: str) -> None:
    for secret in (SECRET, "AKIAPLANTED7"):
        assert secret.lower() not in text.lower()


@pytest.mark.parametrize("text", URIS)
def test_a_secret_is_found_and_not_repeated(text: str) -> None:
    what = credentials.found(text)
    assert what
    silent(what)
    with pytest.raises(ValueError, match=r"^storage: holds .* environment or the role of the nodes alone") as error:
        credentials.refuse(text, "storage")
    silent("".join(traceback.format_exception(error.value)))


@pytest.mark.parametrize("text", HARMLESS)
def test_what_is_no_secret_passes(text: str) -> None:
    assert credentials.found(text) is None
    credentials.refuse_arguments([text, "--to", text, f"--to={text}", f"storage={text}"])


def test_secrets_by_the_name_of_their_field() -> None:
    environment = {"WANDB_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x", "HF_TOKEN": "${HF_TOKEN}", "PATH_TO": "/x"}
    tree = {"a": {"api_key": "x", "token": "x", "placeholder_token": "<cat>", "password": ""}, "env_vars": environment}
    found = [field for field, _ in credentials.in_tree(tree)]
    assert found == ["a.api_key", "a.token", "env_vars.WANDB_TOKEN", "env_vars.AWS_SECRET_ACCESS_KEY"]


@pytest.mark.parametrize("planted", SOME)
@pytest.mark.parametrize("field", FIELDS)
def test_a_recipe_with_a_secret_is_refused(recipe: Path, field: str, planted: str) -> None:
    """In the file, by an override, by pydantic itself and in a table of it; also where the value is wrong for another reason."""
    run = load(recipe)
    given: Any = [planted] if field in ("model.adapters", "prompts.held_out", "train.stop_when") else planted
    with pytest.raises(ConfigError) as error:
        override(run, {field: given})
    assert str(error.value).startswith(f"{field}: holds ")
    silent("".join(traceback.format_exception(error.value)))
    with pytest.raises(ConfigError) as error:
        load(recipe, [f"{field}={json.dumps(given)}"])
    assert str(error.value).startswith(f"{field}: holds ")
    silent("".join(traceback.format_exception(error.value)))
    tree = run.model_dump(mode="json")
    tree[field.partition(".")[0]] = {"x": [{"y": given}]}
    with pytest.raises(ValueError, match="holds") as direct:
        Run.model_validate(tree)
    silent("".join(traceback.format_exception(direct.value)))


@pytest.mark.parametrize("planted", SOME)
def test_a_secret_as_a_key_is_not_repeated(recipe: Path, planted: str) -> None:
    with pytest.raises(ValueError, match="holds") as error:
        Run.model_validate({**load(recipe).model_dump(mode="json"), planted: 3})
    silent("".join(traceback.format_exception(error.value)))


@pytest.mark.parametrize("planted", SOME)
def test_other_doors(tmp_path: Path, recipe: Path, planted: str) -> None:
    sweep = tmp_path / "sweep.toml"
    text = f'recipe = {json.dumps(str(recipe))}\nsearch = "grid"\n'
    sweep.write_text(text + f'[space]\n"model.path" = {{choice = ["a", {json.dumps(planted)}]}}\n')
    other = tmp_path / "other.toml"
    other.write_text(f'recipe = {json.dumps(planted)}\nsearch = "grid"\n[space]\n"batch.micro" = {{choice = [1, 2]}}\n')
    doors: list[Callable[[], object]] = [
        lambda: load(planted), lambda: load(recipe, [planted]), lambda: load_sweep(sweep), lambda: load_sweep(other),
        lambda: load_sweep(sweep, [f"storage={planted}"]), lambda: locate(planted), lambda: locate(Path(planted)),
        lambda: Adapter.parse(f"{planted}:0.5"), lambda: Tracking(uri=planted), lambda: Pool(labels={"x": planted}),
    ]  # fmt: skip
    for door in doors:
        with pytest.raises(ValueError, match="holds") as error:
            door()
        silent("".join(traceback.format_exception(error.value)))


COMMANDS = [
    "train {recipe} storage={planted}", "train {recipe} tracking.uri={planted}", "train {planted}", "train {recipe} {planted}",
    "train {recipe} --resume {planted}", "train {recipe} --resume={planted} --local", "plan {recipe} model.path={planted}",
    "plan {recipe} --address {planted}", "plan {recipe} --cluster {planted}", "generate cat --to {planted}",
    "generate --prompts-file {planted} --to x.parquet", "generate cat --adapter {planted}", "generate cat --model {planted}",
    "score {planted} --reward a=colour", "score x.parquet --to {planted} --reward a=colour", "sweep {planted}",
    "sweep jobs/sweeps/emoji_k.toml storage={planted}", "evaluate {recipe} --adapter {planted}", "log {planted}",
    "evaluate {recipe} --adapter x --prompts-file {planted}", "pairs from-pickapic {planted}", "bench --to {planted}",
    "pairs from-rewards {recipe} --to {planted}", "pairs encode {recipe} pairs.path={planted}", "no-such-command {planted}",
    "train {recipe} --no-such-option={planted}", "submit {recipe} storage={planted}", "submit {recipe} --address {planted}",
    "submit {recipe} --resume {planted}", "submit {recipe} --working-dir {planted}", "pairs from-scores {planted}",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_refuses_with_exit_code_2(
    command: str, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for planted in SOME:
        for debug in ("0", "1"):
            monkeypatch.setenv("RAYDIFF_DEBUG", debug)
            with pytest.raises((SystemExit, ValueError)) as stop:
                cli.main([word.format(recipe=recipe, planted=planted) for word in command.split()])
            assert stop.type is ValueError if debug == "1" else stop.value.code == 2  # type: ignore[union-attr]
            told = capsys.readouterr()
            silent(told.out + told.err + "".join(traceback.format_exception(stop.value)))
            assert debug == "1" or "holds " in told.err


@pytest.mark.parametrize("planted", SOME)
def test_nothing_is_sent_to_a_job_server(recipe: Path, planted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    from raydiff import submit as jobs

    asked: list[object] = []
    monkeypatch.setattr(jobs, "client", lambda address: asked.append(address))
    given: list[dict[str, Any]] = [
        {"overrides": [f"storage={planted}"]}, {"overrides": [f"tracking.uri={planted}"]}, {"resume": planted},
        {"address": planted}, {"working_dir": Path(planted)}, {"overrides": [planted]},
    ]  # fmt: skip
    for arguments in given:
        with pytest.raises(ValueError, match="holds") as error:
            jobs.submit(recipe, **arguments)
        silent("".join(traceback.format_exception(error.value)))
    assert asked == []


@pytest.mark.parametrize("words", [["storage={}"], ["--no-such-option", "{}"], ["--resume", "{}"]])
@pytest.mark.parametrize("job", ["jobs/train.py", "cluster/reserve.py"])
def test_jobs_refuse_too(
    recipe: Path, job: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for planted in SOME:
        monkeypatch.setattr(sys, "argv", [job, str(recipe), *(word.format(planted) for word in words)])
        with pytest.raises((SystemExit, ValueError)) as stop:
            runpy.run_path(job, run_name="__main__")
        told = "".join([*traceback.format_exception(stop.value), *capsys.readouterr()])
        assert "holds " in told
        silent(told)


def test_secrets_of_the_environment_stay_there(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run with all of them set, its MLflow run, and a job: no file, line or request holds one."""
    pytest.importorskip("ray")
    from raydiff import submit as jobs
    from raydiff.distributed import tracking
    from raydiff.distributed.lease import Lease
    from raydiff.distributed.storage import Folder

    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", str(recipe), "--local", "evaluate.clip=none", "evaluate.drift_images=0", "evaluate.grid=0"])
    assert ended.value.code == 0
    run = load(recipe)
    folder = Folder(tmp_path / "runs" / "leased")
    with Lease(folder) as lease:
        lease.take()
        folder.write("run.json", run.model_dump_json().encode())
        store = f"sqlite:///{tmp_path}/runs/mlflow.db"
        place = tracking.experiment(store, "x", Folder(tmp_path / "runs"))
        tracker = tracking.open_run(store, place, "leased", flat(run))
        tracker.file(folder, "run.json")
        silent(folder.read("lease.json").decode())
    sent: list[dict[str, Any]] = []

    class Server:
        def submit_job(self, **job: Any) -> str:
            sent.append(job)
            return "raysubmit_1"

    monkeypatch.setattr(jobs, "client", lambda address: Server())
    monkeypatch.setattr(jobs, "nodes", lambda server: [jobs.Node(2)])
    assert jobs.submit(recipe, working_dir=None, follow=False) == 0
    assert len(sent) == 1
    silent(repr(sent))
    told = capfd.readouterr()
    silent(told.out + told.err)
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {"run.json", "contents.json", "mlflow.db"} <= {path.name for path in files}
    for path in files:
        assert SECRET.encode() not in path.read_bytes(), path
