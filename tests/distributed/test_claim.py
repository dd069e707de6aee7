"""Two calls and one new dataset: one makes it, the other is told, and nothing of the one becomes the other's."""

import contextlib
import io
import json
import multiprocessing
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from raydiff.config import ConfigError
from raydiff.data import pieces
from raydiff.data.pieces import PairsError, Part
from raydiff.distributed import batch, generate_batch, lease
from raydiff.distributed.batch import ABOUT, Output, claimed

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def about(seed: int) -> dict[str, Any]:
    return {"what": "generate", "made_from": {"seeds": [seed]}}


def claim(where: str, seed: int, at: float, told: Any) -> None:
    time.sleep(max(0.0, at - time.monotonic()))
    try:
        with claimed(Output(where), about(seed)):
            told.send(seed)
            told.recv()
    except ConfigError as error:
        told.send(str(error))


def pairs(where: str, seed: int, at: float, told: Any) -> None:
    def make(start: int, stop: int) -> list[Part]:
        time.sleep(0.5)
        return [Part(pa.table([[seed] * (stop - start)], schema=schema))]

    schema = pa.schema([("seed", pa.int64())])
    time.sleep(max(0.0, at - time.monotonic()))
    try:
        pieces.write(where, schema, {"seed": seed}, [(0, 3)], make, 0)
        told.send(seed)
    except PairsError as error:
        told.send(str(error))


def at_once(target: Any, where: Path, seeds: list[Any]) -> tuple[list[Any], list[Any]]:
    """(what each of some processes answers, their connections)."""
    at, ends = time.monotonic() + 1.5, []
    for seed in seeds:
        ours, theirs = CONTEXT.Pipe()
        CONTEXT.Process(target=target, args=(str(where), seed, at, theirs), daemon=True).start()
        ends.append(ours)
    return [end.recv() for end in ends], ends


@pytest.mark.parametrize("seeds", [[1, 2], [1, 1]], ids=["other settings", "the same"])
def test_of_two_calls_at_the_same_moment_one_makes_the_dataset(tmp_path: Path, seeds: list[int]) -> None:
    answers, ends = at_once(claim, tmp_path / "x.parquet", seeds)
    (won,) = [seed for seed in answers if seed in (1, 2)]
    (refused,) = [text for text in answers if isinstance(text, str)]
    assert "works on this folder" in refused or "made from other settings: seeds" in refused
    assert json.loads((tmp_path / "x.parquet" / ABOUT).read_text()) == about(won)
    ends[answers.index(won)].send(None)


def test_after_it_has_ended_the_same_call_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "x.parquet"))
    with claimed(output, about(1)):
        assert batch.check_own(output)
    with claimed(output, about(1)):
        pass
    with (
        pytest.raises(ConfigError, match=r"made from other settings: seeds = \[1\] there, \[2\] now"),
        claimed(output, about(2)),
    ):
        pytest.fail("two datasets in one folder")


def test_nothing_is_written_where_a_call_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "x.parquet"
    folder.mkdir()
    (folder / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match=r"holds 'mine\.txt' and no"), claimed(Output(str(folder)), about(1)):
        pytest.fail("a folder of the user's")
    assert [path.name for path in folder.rglob("*")] == ["mine.txt"]


def test_prompts_that_change_between_counting_and_copying_are_refused(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "x.parquet"))
    count, digest = generate_batch._counted(iter(["a", "b", "c"]), 2)
    assert count == 3
    with pytest.raises(ConfigError, match="--prompts-file has changed since this call began"):
        generate_batch._copy(iter(["a", "b", "d"]), output, 2, digest)
    assert output.folder.size(generate_batch.PROMPTS) is None
    generate_batch._copy(iter(["a", "b", "c"]), output, 2, digest)
    assert output.folder.size(generate_batch.PROMPTS)


def test_of_two_calls_for_pairs_with_other_settings_one_is_refused(tmp_path: Path) -> None:
    answers, _ = at_once(pairs, tmp_path / "pairs", [1, 2])
    (won,) = [seed for seed in answers if seed in (1, 2)]
    assert any(isinstance(text, str) and "made from other settings: seed" in text for text in answers), answers
    (file,) = (tmp_path / "pairs").glob("*.parquet")
    import pyarrow.parquet as pq

    assert pq.read_table(file)["seed"].to_pylist() == [won] * 3


def draw(where: str, model: str, at: float, told: Any) -> None:
    """`raydiff generate` in this process, without Ray; what it says."""
    from raydiff import cli, generate

    def slowly(*arguments: Any, **options: Any) -> Any:
        told.send("draws")
        told.recv()
        return write(*arguments, **options)

    write, generate.write = generate.write, slowly
    time.sleep(max(0.0, at - time.monotonic()))
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            cli.main(["generate", "a cat", "--to", where, "--model", model, "--steps", "2"])
    except SystemExit as error:
        told.send(said.getvalue() if error.code else "done")


def test_of_two_that_draw_into_one_new_folder_one_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    answers, ends = at_once(draw, folder, [str(tiny_pipeline)] * 2)
    won = answers.index("draws")
    assert f"{folder}: process " in answers[1 - won] and "works on this folder" in answers[1 - won]
    with pytest.raises(ConfigError, match="works on this folder"), claimed(Output(str(folder)), about(1)):
        pytest.fail("a dataset on Ray beside it")
    ends[won].send(None)
    assert ends[won].recv() == "done"
    assert sorted(path.name.partition("_")[0] for path in folder.iterdir() if path.is_file()) == [
        "0000",
        "grid.png",
        "images.json",
    ]


def test_pictures_are_not_drawn_into_a_dataset(tmp_path: Path) -> None:
    with claimed(Output(str(tmp_path)), about(1)):
        pass
    with pytest.raises(ConfigError, match="holds a dataset that was made on Ray"), lease.claimed(tmp_path):
        pytest.fail("pictures among its files")


def test_a_claim_needs_no_ray_and_no_pyarrow() -> None:
    code = "import sys, raydiff.distributed.lease; print({'ray', 'pyarrow', 'torch'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize("command", ["evaluate", "bench"])
def test_who_writes_for_minutes_claims_its_folder(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from raydiff import cli

    recipe = Path(__file__).parents[2] / "jobs/recipes/emoji_draft_lv.toml"
    arguments = {"evaluate": [str(recipe), "--adapter", "x"], "bench": ["--quick"]}[command]
    with lease.claimed(tmp_path):
        file = tmp_path / lease.DATASET / lease.FILE
        beats = json.dumps(json.loads(file.read_text()) | {"beat": 1})
        threading.Timer(0.5, lambda: file.write_text(beats)).start()
        with pytest.raises(SystemExit):
            cli.main([command, *arguments, "--to", str(tmp_path)])
    assert "works on this folder" in capsys.readouterr().err
