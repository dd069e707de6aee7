"""Checkpoint files: what counts as complete, what is kept, and which runs may continue."""

import errno
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from raydiff.config import ConfigError, Run
from raydiff.core.policy import Calls
from raydiff.distributed import checkpoint
from raydiff.distributed.storage import Folder, StorageError

MakeRun = Callable[..., Run]
KINDS = ("parameters", "exp_avg", "exp_avg_sq")


def save(folder: Path, run: Run, step: int, size: int = 3) -> None:
    tensors = {"b.weight": torch.full((size, 2), float(step)), "a.weight": torch.arange(4.0).view(2, 2).T}
    checkpoint.save(
        Folder(folder),
        [(kind, tensors) for kind in KINDS],
        run=run,
        next_step=step,
        calls=Calls(images=step, denoiser_forward=5),
        seconds=1.5,
        history=[{"step": float(i), "loss": 0.1 * i} for i in range(step + 1)],
    )


def test_round_trip_and_what_is_kept(tiny_run: MakeRun, tmp_path: Path) -> None:
    run = tiny_run(changes={"train.keep_checkpoints": 2})
    assert checkpoint.latest(Folder(tmp_path)) is None
    for step in (9, 10, 11):
        save(tmp_path, run, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_000010", "checkpoint_000011"]
    found = checkpoint.latest(Folder(tmp_path))
    assert found is not None
    assert (found.next_step, found.seconds, found.calls) == (11, 1.5, Calls(images=11, denoiser_forward=5))
    assert found.history[-1] == {"step": 11.0, "loss": 0.1 * 11}
    assert Run.model_validate(found.run) == run
    assert torch.equal(found.tensors("exp_avg")["b.weight"], torch.full((3, 2), 11.0))
    assert torch.equal(found.tensors("parameters")["a.weight"], torch.arange(4.0).view(2, 2).T)


@pytest.mark.parametrize("fault", ["no index", "half an index", "half a tensor file", "no tensor file"])
def test_incomplete_checkpoint_is_passed_over_and_rewritten(tiny_run: MakeRun, tmp_path: Path, fault: str) -> None:
    run = tiny_run(changes={"train.keep_checkpoints": 2})
    save(tmp_path, run, 1)
    save(tmp_path, run, 2)
    place = tmp_path / "checkpoint_000002"
    file = place / ("checkpoint.json" if "index" in fault else "exp_avg.safetensors")
    if fault.startswith("half"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    else:
        file.unlink()
    found = checkpoint.latest(Folder(tmp_path))
    assert found is not None
    assert found.next_step == 1
    save(tmp_path, run, 2)
    again = checkpoint.latest(Folder(tmp_path))
    assert again is not None
    assert again.next_step == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_000001", "checkpoint_000002"]


def test_full_disk_leaves_the_one_before_and_its_room(tiny_run: MakeRun, tmp_path: Path) -> None:
    """A limit on the size of a file answers as a full disk does, by another number."""
    run = tiny_run()
    save(tmp_path, run, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def tensors():
        yield "parameters", {"a": torch.zeros(10)}
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        yield "exp_avg", {"a": torch.zeros(1000)}

    try:
        with pytest.raises(StorageError, match=rf"cannot write exp_avg\.safetensors .*{tmp_path}.*MiB are free") as error:
            checkpoint.save(Folder(tmp_path), tensors(), run=run, next_step=2, calls=Calls(), seconds=0, history=[])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.EFBIG
    found = checkpoint.latest(Folder(tmp_path))
    assert found is not None
    assert found.next_step == 1
    assert not (tmp_path / "checkpoint_000002").exists()


def test_which_fields_may_change(tiny_run: MakeRun) -> None:
    run = tiny_run()
    saved = run.model_dump(mode="json")
    same = {
        "pools.train.replicas": 2, "train.zero_stage": 3, "train.updates": 9, "batch.micro": 1, "storage": "elsewhere",
        "tracking.uri": "http://server", "pairs.cache": "elsewhere", "evaluate.every": 1, "evaluate.rewards": {"red": {"kind": "colour"}},
        "evaluate.best": "held_out/total",  # by what the kept weights were chosen
    }  # fmt: skip
    checkpoint.check_same_run(saved, tiny_run(changes=same))
    with pytest.raises(ConfigError) as error:
        checkpoint.check_same_run(saved, tiny_run("draft", {"seed": 1, "rewards.blue.weight": 2.0, "pools.train.replicas": 2}))
    lines = str(error.value).splitlines()[1:]
    assert [line.strip().partition(":")[0] for line in lines] == ["method.k", "method.kind", "rewards.blue.weight", "seed"]
    assert lines[-1].strip() == "seed: 0 then, 1 now"


def test_updates_are_fixed_by_a_falling_learning_rate(tiny_run: MakeRun) -> None:
    saved = tiny_run(changes={"optimizer.schedule": "cosine"}).model_dump(mode="json")
    with pytest.raises(ConfigError, match=r"train\.updates: 3 then, 9 now"):
        checkpoint.check_same_run(saved, tiny_run(changes={"optimizer.schedule": "cosine", "train.updates": 9}))


def test_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"in {tmp_path}/file/runs"):
        Folder(tmp_path / "file" / "runs").check_writable()


def test_folder_of_a_uri(tmp_path: Path) -> None:
    """The same files by path and by URI."""
    folder = Folder(f"file://{tmp_path}/runs") / "one"
    folder.write_json("a/b.json", {"x": 1})
    assert Folder(tmp_path / "runs/one").read_json("a/b.json") == {"x": 1}
    assert (folder.name, (Folder(tmp_path) / "runs").folders(), folder.local) == ("one", ["one"], tmp_path / "runs/one")
