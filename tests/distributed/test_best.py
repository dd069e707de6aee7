"""On Ray: the best weights outlive a kill, a condition ends the run as finished, and both are told."""

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch

from raydiff import watch
from raydiff.config import ConfigError, Run, override
from raydiff.distributed import checkpoint, tracking
from raydiff.distributed.launch import train
from raydiff.distributed.storage import Folder
from raydiff.local import fit
from raydiff.models.lora import WEIGHTS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def test_killed_run_keeps_its_best_and_is_stopped(cluster: str, ray_run: Callable[..., Run], tmp_path: Path) -> None:
    """Green falls from the first update on, whose weights are then the best. A worker is killed in the third update, after which
    the condition holds; there would be four. `fit`, undisturbed, says how it must come out."""
    changes = {"evaluate.every": 1, "evaluate.clip": None, "optimizer.lr": 0.05, "storage": str(tmp_path / "runs")}
    green = {"green": {"kind": "colour", "rgb": [0.0, 1.0, 0.0], "region": "all"}}
    run = ray_run({**changes, "evaluate.rewards": green})
    rows = list(fit(run, folder=tmp_path / "whole"))
    values = [row["held_out/green"] for row in rows]
    assert values == sorted(values, reverse=True)
    run = override(run, {"train.stop_when": [f"held_out/green < {(values[2] + values[3]) / 2}"]})
    alone = list(fit(run, folder=tmp_path / "adapter"))
    assert len(alone) == 4

    result = train(override(run, {"rewards.blue.die_once": str(tmp_path / "died")}))
    assert (tmp_path / "died").exists()
    assert result.stopped_by is not None
    assert result.stopped_by.endswith("after update 3")
    assert result.best is not None
    assert (result.best.step, result.best.metric) == (1, "held_out/green")
    assert result.best.value == pytest.approx(values[1], rel=1e-5)
    assert result.best.before == pytest.approx(values[0], rel=1e-5)
    folder = Folder(result.folder)
    assert watch.Best(**folder.read_json("adapter_best/best.json")) == result.best
    last = checkpoint.latest(folder)
    assert last is not None
    assert last.next_step == 3
    for ours, theirs in zip(last.history, alone, strict=True):
        for name in ("held_out/green", "drift", "latent_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-9), (theirs["step"], name)
    for name in ("adapter", "adapter_best"):
        ours, theirs = (safetensors.torch.load_file(Path(place) / name / WEIGHTS) for place in (result.folder, tmp_path))
        error = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
        print(f"{name}: {error:.1e} from fit's")
        assert error < 1e-5

    client = tracking.Tracker(result.mlflow_uri, result.mlflow_run_id).client()
    logged = client.get_run(result.mlflow_run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.tags[tracking.BEST_TAG] == str(result.best)
    assert logged.data.tags[tracking.STOPPED_TAG] == result.stopped_by
    artifacts = {f.path for f in client.list_artifacts(result.mlflow_run_id, "adapter_best")}
    assert artifacts == {f"adapter_best/{WEIGHTS}", "adapter_best/best.json"}

    died = {"rewards.blue.die_once": str(tmp_path / "died")}
    with pytest.raises(
        ConfigError, match=r"is finished, 3 of 4 updates.* stopped by held_out/green < .*; another train.stop_when"
    ):
        train(override(run, died), resume=result.name)
    with pytest.raises(ConfigError, match=r"evaluate.best: 'held_out/green' then, 'held_out/total' now"):
        train(override(run, {**died, "evaluate.rewards": {}, "train.stop_when": []}), resume=result.name)
