"""`raydiff pairs`: each command on small files, and its faults as one plain message."""

from collections.abc import Callable
from pathlib import Path

import pytest

from raydiff import cli
from raydiff.config import Run
from raydiff.data import preferences
from tests.data import shards

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """call("pairs", ...) -> (exit code, stdout, stderr) of the entry point."""
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


def recipe(tiny_run: Callable[..., Run], tmp_path: Path, pairs: Path) -> Path:
    """run.json of a labelled run of one update."""
    changes = {"method.source": "dataset", "pairs.path": str(pairs), "storage": str(tmp_path / "runs"), "train.updates": 1,
               "evaluate.images": 2, "evaluate.grid": 2}  # fmt: skip
    path = tmp_path / "tiny.json"
    path.write_text(tiny_run("diffusion_dpo", changes).model_dump_json())
    return path


def test_from_a_shard_to_an_adapter(call: Call, tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    shards.pickapic(tmp_path / "s.parquet", 20, broken=[1])
    code, out, _ = call("pairs", "from-pickapic", tmp_path / "s.parquet", "--to", tmp_path / "pairs", "--ties", "keep")
    assert code == 0
    assert out == (
        f"{tmp_path}/pairs: 11 pairs in 1 files; 4 dropped: no label; 4 dropped: the same picture twice; 1 bad rows,"
        f" see {tmp_path}/pairs/_raydiff/bad_rows.jsonl\n"
    )
    run = recipe(tiny_run, tmp_path, tmp_path / "pairs")
    code, out, _ = call("pairs", "encode", run, "--device", "cpu")
    assert code == 0 and out.startswith(f"{tmp_path}/pairs.latents/") and out.endswith(": 7 pairs\n")
    code, out, err = call("train", run, "--local")
    assert code == 0, err
    assert "adapter: " in out


def published(folder: Path) -> Path:
    """Two splits in one folder, as Hugging Face lays them out."""
    folder.mkdir()
    for n, name in enumerate(("test-00000-of-00001.parquet", "train-00000-of-00001.parquet")):
        shards.pickapic(folder / name, 5 * (n + 1))
    return folder


def test_the_rows_of_each_split_are_told(call: Call, tmp_path: Path) -> None:
    data = published(tmp_path / "data")
    code, out, err = call("pairs", "from-pickapic", data, "--to", tmp_path / "pairs", "--split", "train")
    assert (code, err) == (0, "SHARDS holds test 5 rows, train 10 rows\n")
    assert out.startswith(f"{tmp_path}/pairs: 4 pairs in 1 files")


def test_ai_feedback_from_a_recipe(call: Call, tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    run = recipe(tiny_run, tmp_path, tmp_path / "pairs")
    code, out, err = call("pairs", "from-rewards", run, "--to", tmp_path / "pairs", "-n", 2, "--device", "cpu")
    assert (code, out) == (0, f"{tmp_path}/pairs: 5 pairs in 1 files\n"), err
    assert preferences.overview(tmp_path / "pairs").decided == 5
    code, out, _ = call("pairs", "from-rewards", run, "--to", tmp_path / "pairs", "-n", 2, "--device", "cpu")
    assert code == 0 and "1 of them from an earlier call" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["from-pickapic", "{here}/none.parquet"], "SHARDS = '{here}/none.parquet': there is no Parquet file"),
        (
            ["from-pickapic", "{here}/p.parquet", "--to", "{here}/new"],
            "there is no column 'jpg_0', which Pick-a-Pic's shards have",
        ),
        (
            ["from-scores", "{here}/p.parquet", "--to", "{here}/new", "--reward", "clip"],
            "(no rewards: `raydiff score` adds them)",
        ),
        (["from-scores", "{here}/p.parquet", "--to", "{here}/new"], "--reward: there is none"),
        (
            ["from-pickapic", "{here}/data", "--to", "{here}/new"],
            "SHARDS = '{here}/data' holds several splits of a dataset (test 5 rows, train 10 rows): --split NAME takes one",
        ),
        (
            ["from-pickapic", "{here}/data", "--to", "{here}/new", "--split", "dev"],
            "--split dev: SHARDS = '{here}/data' has no",
        ),
        (
            ["from-scores", "{here}/data", "--to", "{here}/new", "--reward", "clip"],
            "SCORED = '{here}/data' holds several splits",
        ),
        (["encode", "{here}/tiny.json", "pairs.path={here}/data"], "pairs.split = NAME takes one, 'all' all"),
        (["from-rewards", "{here}/tiny.json", "--to", "{here}/p.parquet"], "is a file; a dataset of pairs is a folder"),
        (["encode", "{here}/tiny.json"], "there is no column 'label'"),
        (["encode", "{here}/tiny.json", "method.kind=d3po"], "method: unknown key"),
        (["encode", "{here}/tiny.json", "pairs.path=/nowhere.parquet"], "pairs.path = '/nowhere.parquet': there is no Parquet"),
    ],
)
def test_a_users_fault_is_one_plain_message(
    call: Call, tiny_run: Callable[..., Run], tmp_path: Path, arguments: list[str], message: str
) -> None:
    shards.pairs(tmp_path / "p.parquet", 3, label=None)
    published(tmp_path / "data")
    recipe(tiny_run, tmp_path, tmp_path / "p.parquet")
    code, _, err = call("pairs", *(a.format(here=tmp_path) for a in arguments))
    assert code == 2
    said = err.removeprefix("SHARDS holds test 5 rows, train 10 rows\n").removeprefix(
        "SCORED holds test 5 rows, train 10 rows\n"
    )
    assert said.startswith("raydiff: ") and "Traceback" not in err
    assert message.format(here=tmp_path) in err
    assert not (tmp_path / "new").exists() and not (tmp_path / "p.parquet.latents").exists()
