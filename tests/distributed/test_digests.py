"""A checkpoint whose bytes have changed since they were written is named and not used."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raydiff.config import ConfigError, Run
from raydiff.core.policy import Calls
from raydiff.distributed import checkpoint
from raydiff.distributed.storage import Folder

MakeRun = Callable[..., Run]
KINDS = ("parameters", "exp_avg", "exp_avg_sq", "best")


def save(folder: Path, run: Run, step: int, **other: torch.Tensor) -> None:
    tensors = {"a.weight": torch.full((5, 3), step / 7), "b.weight": torch.arange(4.0)}
    checkpoint.save(
        Folder(folder),
        ((kind, tensors | ({"b.weight": other[kind]} if kind in other else {})) for kind in KINDS),
        run=run,
        next_step=step,
        calls=Calls(images=step),
        seconds=1.5,
        history=[{"step": float(i), "loss": 0.1 * i} for i in range(step + 1)],
    )


def test_every_flipped_byte_is_noticed_and_the_checkpoint_before_is_used(tiny_run: MakeRun, tmp_path: Path) -> None:
    """A byte at 40 random places of each file, and at each end."""
    run = tiny_run(changes={"train.keep_checkpoints": 2})
    save(tmp_path, run, 1)
    save(tmp_path, run, 2)
    draw = random.Random(0)
    for file in sorted((tmp_path / "checkpoint_000002").iterdir()):
        whole = file.read_bytes()
        space = file.suffix == ".json"  # white space between values says nothing
        for place in [0, len(whole) - 1, *draw.sample(range(len(whole)), 40)]:
            if space and whole[place : place + 1].isspace():
                continue
            flipped = bytearray(whole)
            flipped[place] ^= 1 << draw.randrange(8)
            file.write_bytes(flipped)
            told: list[str] = []
            found = checkpoint.latest(Folder(tmp_path), told.append)
            assert found is not None and found.next_step == 1, (file.name, place)
            assert len(told) == 1 and f"checkpoint_000002 is passed over: {file.name}" in told[0]
        file.write_bytes(whole)
    found = checkpoint.latest(Folder(tmp_path), pytest.fail)
    assert found is not None and found.next_step == 2


def test_files_of_another_checkpoint_are_noticed(tiny_run: MakeRun, tmp_path: Path) -> None:
    """Of the same size: only their content tells."""
    run = tiny_run(changes={"train.keep_checkpoints": 3})
    for step in (1, 2, 3):
        save(tmp_path, run, step)
    older, newer = (tmp_path / f"checkpoint_00000{step}" / "exp_avg.safetensors" for step in (1, 3))
    newer.write_bytes(older.read_bytes())
    with pytest.warns(UserWarning, match=r"checkpoint_000003 is passed over: exp_avg\.safetensors holds something else"):
        found = checkpoint.latest(Folder(tmp_path))
    assert found is not None and found.next_step == 2


@pytest.mark.parametrize("text", ["{}", "[]", "null", "", "\x00\xff", '{"format": 4}', '{"files": {}}', '"sha256"'])
def test_an_index_of_something_else_is_passed_over(tiny_run: MakeRun, tmp_path: Path, text: str) -> None:
    run = tiny_run(changes={"train.keep_checkpoints": 2})
    save(tmp_path, run, 1)
    save(tmp_path, run, 2)
    (tmp_path / "checkpoint_000002" / "checkpoint.json").write_bytes(text.encode("latin1"))
    told: list[str] = []
    found = checkpoint.latest(Folder(tmp_path), told.append)
    assert found is not None and found.next_step == 1
    assert len(told) == 1 and "checkpoint_000002 is passed over: checkpoint.json" in told[0]


def test_what_was_passed_over_does_not_crowd_out_what_is_good(tiny_run: MakeRun, tmp_path: Path) -> None:
    """With one checkpoint kept, and others at other steps than before."""
    run = tiny_run(changes={"train.keep_checkpoints": 1})
    save(tmp_path, run, 8)
    (tmp_path / "checkpoint_000008").rename(tmp_path / "kept")
    save(tmp_path, run, 4)
    file = tmp_path / "kept" / "parameters.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    (tmp_path / "kept").rename(tmp_path / "checkpoint_000008")
    found = checkpoint.latest(Folder(tmp_path), lambda _: None)
    assert found is not None and found.next_step == 4
    save(tmp_path, run, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_000006"]


def test_the_newest_of_a_million_updates_is_the_one_of_the_highest_step(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(changes={"train.keep_checkpoints": 2})
    folder = Folder(tmp_path)
    for step in (999_998, 999_999, 1_000_000):
        checkpoint.save(folder, [("best", {})], run=run, next_step=step, calls=Calls(), seconds=1.0, history=[])
    found = checkpoint.latest(folder, pytest.fail)
    assert found is not None and found.next_step == 1_000_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_1000000", "checkpoint_999999"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_never_written(tiny_run: MakeRun, tmp_path: Path, kind: str, value: float) -> None:
    run = tiny_run()
    save(tmp_path, run, 1)
    with pytest.raises(FloatingPointError, match=rf"no checkpoint is written: {kind} of b\.weight is not finite"):
        save(tmp_path, run, 2, **{kind: torch.tensor([0.0, value])})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_000001"]


def test_a_checkpoint_of_an_older_format_is_refused(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run()
    save(tmp_path, run, 1)
    file = tmp_path / "checkpoint_000001" / "checkpoint.json"
    tree = json.loads(file.read_text())
    sizes = {name: about["size"] for name, about in tree["files"].items()}
    del tree["sha256"]
    file.write_text(json.dumps({**tree, "format": 2, "files": sizes}))
    with pytest.raises(ConfigError, match=r"checkpoint_000001: this checkpoint has format 2, and this raydiff reads 4"):
        checkpoint.latest(Folder(tmp_path))
