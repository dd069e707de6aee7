"""Whole runs on Ray: what they leave, and that kills, stops and full disks change nothing in it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from raydiff.config import ConfigError, Run, flat, override
from raydiff.core.policy import NonFiniteReward, RewardFailed
from raydiff.distributed import checkpoint, missed, tracking
from raydiff.distributed.launch import Result, train
from raydiff.distributed.storage import Folder, StorageError
from raydiff.local import fit
from raydiff.models.lora import WEIGHTS
from raydiff.session import Session
from tests.distributed.conftest import UPDATES, fill, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
MakeRun = Callable[..., Run]
ROOT = Path(__file__).parents[2]


def adapter(result: Result) -> dict[str, Tensor]:
    return safetensors.torch.load_file(Path(result.adapter) / WEIGHTS)


def assert_same_adapter(a: Result, b: Result) -> None:
    first, second = adapter(a), adapter(b)
    assert first.keys() == second.keys()
    differ = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differ, f"{differ[0]}: max difference {(first[differ[0]] - second[differ[0]]).abs().max():.1e}"


def distance(a: Result, b: Result) -> float:
    first, second = adapter(a), adapter(b)
    return float(
        sum((first[n] - second[n]).square().sum() for n in first) ** 0.5 / sum(t.square().sum() for t in second.values()) ** 0.5
    )


def steps(result: Result, metric: str = "loss") -> list[int]:
    client = tracking.Tracker(result.mlflow_uri, result.mlflow_run_id).client()
    return [m.step for m in client.get_metric_history(result.mlflow_run_id, metric)]


def driver(run: Run, address: str, path: Path, *more: str) -> subprocess.Popen[bytes]:
    """jobs/train.py in a process and a process group of its own."""
    path.write_text(run.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "jobs/train.py", str(path), *more],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def index(storage: str, step: int) -> Callable[[], Path | None]:
    """Finds the index of a run's checkpoint, which is written last."""
    return lambda: next(iter(Path(storage).glob(f"*/checkpoint_{step:06d}/checkpoint.json")), None)


def test_what_a_run_leaves(uninterrupted: Result, ray_run: MakeRun) -> None:
    folder = Path(uninterrupted.folder)
    assert sorted(p.name for p in folder.glob("checkpoint_*")) == [f"checkpoint_{n:06d}" for n in (2, 3, 4)]
    assert uninterrupted.before.keys() == uninterrupted.after.keys() == {"held_out/total", "held_out/blue", "held_out/green"}
    assert uninterrupted.after["held_out/total"] > uninterrupted.before["held_out/total"]
    assert uninterrupted.grid is not None
    assert Path(uninterrupted.grid).read_bytes().startswith(b"\x89PNG")

    client = tracking.Tracker(uninterrupted.mlflow_uri, uninterrupted.mlflow_run_id).client()
    logged = client.get_run(uninterrupted.mlflow_run_id)
    assert logged.info.status == "FINISHED"
    assert logged.data.params == {path: tracking.parameter(value) for path, value in flat(ray_run()).items()}
    assert logged.data.tags["raydiff.name"] == uninterrupted.name
    updates = list(range(1, UPDATES + 1))
    for metric in ("loss", "reward/total", "reward/blue", "grad_norm", "lr"):
        assert steps(uninterrupted, metric) == updates, metric
    for metric in ("seconds", "images", "reward_queries", "denoiser_forward", "denoiser_backward"):
        assert steps(uninterrupted, metric) == [0, *updates], metric
    assert steps(uninterrupted, "held_out/green") == [0, 2, 4]
    # 4 prompts an update over both workers: 4 sampled, and 1 + n = 3 rewards each
    assert logged.data.metrics["images"] == 4 * UPDATES
    assert logged.data.metrics["reward_queries"] == 12 * UPDATES

    def files(path: str | None = None) -> Iterator[str]:
        for item in client.list_artifacts(uninterrupted.mlflow_run_id, path):
            yield from files(item.path) if item.is_dir else (item.path,)

    grids = {f"pictures/step_{n:06d}.png" for n in (0, 2, 4)} | {"pictures/before_after.png"}
    best = {f"adapter_best/{WEIGHTS}", "adapter_best/best.json"}
    assert set(files()) == {"run.json", f"adapter/{WEIGHTS}", *best, *grids}
    for metric in ("drift", "latent_norm", "diversity"):
        assert steps(uninterrupted, metric) == [0, 2, 4], metric


def test_adapter_is_the_average_and_loads_without_raydiff(uninterrupted: Result, ray_run: MakeRun, tmp_path: Path) -> None:
    run = ray_run()
    last = checkpoint.latest(Folder(uninterrupted.folder))
    assert last is not None
    model = Session(run).model
    for name, value in last.tensors("ema").items():
        model.trained()[name].data.copy_(value)
    assert any(not torch.equal(last.tensors("ema")[n], p) for n, p in last.tensors("parameters").items())
    expected = model.pipe("a pig", num_inference_steps=3, generator=torch.Generator().manual_seed(3), output_type="pt").images
    code = f"""
import sys, torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained({run.model.path!r}, safety_checker=None)
pipe.load_lora_weights({uninterrupted.adapter!r})
images = pipe("a pig", num_inference_steps=3, generator=torch.Generator().manual_seed(3), output_type="pt").images
assert not any(name.startswith("raydiff") for name in sys.modules)
torch.save(images, {str(tmp_path / "images.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "images.pt"), torch.as_tensor(expected))


def test_resume_is_refused_when_finished_or_other(uninterrupted: Result, ray_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="is finished, 4 of 4 updates"):
        train(ray_run(), resume=uninterrupted.name)
    with pytest.raises(ConfigError, match=r"optimizer\.lr: 0\.01 then, 0\.5 now") as error:
        train(ray_run({"optimizer.lr": 0.5, "train.zero_stage": 1, "batch.size": 8}), resume=uninterrupted.folder)
    assert "batch.size" in str(error.value)
    assert "zero_stage" not in str(error.value)
    with pytest.raises(ConfigError, match=f"no run was started in .*there are .*{uninterrupted.name}"):
        train(ray_run(), resume="tiny-of-yesterday")


def test_one_worker_is_fit(cluster: str, ray_run: MakeRun, tmp_path: Path) -> None:
    run = ray_run({"pools.train.replicas": 1, "train.zero_stage": 1})
    alone = list(fit(run, folder=tmp_path))
    result = train(run)
    last = checkpoint.latest(Folder(result.folder))
    assert last is not None
    assert len(last.history) == len(alone)
    worst = 0.0
    for ours, theirs in zip(last.history, alone, strict=True):
        for name in theirs.keys() - {"seconds"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (theirs["step"], name)
            worst = max(worst, abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-12))
    expected = safetensors.torch.load_file(tmp_path / WEIGHTS)
    error = max(float((value - expected[name]).abs().max()) for name, value in adapter(result).items())
    print(f"one worker and fit: metrics {worst:.1e} relative, adapter {error:.1e} absolute")
    assert error < 1e-5


def test_killed_worker_changes_nothing(uninterrupted: Result, ray_run: MakeRun, tmp_path: Path) -> None:
    start = time.monotonic()
    result = train(ray_run({"rewards.blue.die_once": str(tmp_path / "died")}))
    print(f"run with a killed worker: {time.monotonic() - start:.0f} s")
    assert (tmp_path / "died").exists()
    assert_same_adapter(result, uninterrupted)
    assert steps(result) == [1, 2, 3, 4]
    assert steps(result, "seconds") == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_hung_worker_changes_nothing(uninterrupted: Result, ray_run: MakeRun, tmp_path: Path) -> None:
    """All workers are started again when one has not answered for train.timeout seconds."""
    result = train(ray_run({"rewards.blue.hang_once": str(tmp_path / "hung"), "train.timeout": 15}))
    assert (tmp_path / "hung").exists()
    assert_same_adapter(result, uninterrupted)
    assert steps(result) == [1, 2, 3, 4]


def test_what_mlflow_missed_is_sent_later(uninterrupted: Result, tmp_path: Path) -> None:
    """The run's folder beside an MLflow that knows nothing of it: afterwards it has every number and file of the first one."""
    folder = Path(shutil.copytree(uninterrupted.folder, tmp_path / Path(uninterrupted.folder).name))
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**run, "storage": str(tmp_path)}))
    late = missed.send(str(folder))
    assert missed.send(str(folder)) == late
    first = tracking.Tracker(uninterrupted.mlflow_uri, uninterrupted.mlflow_run_id)
    there, here = (tracker.client().get_run(tracker.run_id) for tracker in (first, late))
    assert here.info.status == there.info.status == "FINISHED"
    assert here.data.metrics.keys() == there.data.metrics.keys()
    for name in there.data.metrics:
        expected, found = ([(m.step, m.value) for m in t.client().get_metric_history(t.run_id, name)] for t in (first, late))
        assert found == expected, name
    names = [{i.path for i in t.client().list_artifacts(t.run_id, "pictures")} for t in (first, late)]
    assert names[0] == names[1]
    with pytest.raises(ConfigError, match=r"FOLDER = '.*': holds no run\.json"):
        missed.send(str(tmp_path))


def test_killed_driver_resumes(uninterrupted: Result, cluster: str, ray_run: MakeRun, tmp_path: Path) -> None:
    run = ray_run({"storage": str(tmp_path / "runs"), "rewards.blue.pause": 0.3})
    process = driver(run, cluster, tmp_path / "run.json")
    folder = wait_for(index(run.storage, 2)).parents[1]
    process.kill()
    process.wait()
    assert not (folder / "finished.json").exists()
    time.sleep(2)  # Ray ends the job's workers
    result = train(run, resume=folder.name)
    assert (result.name, result.folder) == (folder.name, str(folder))
    assert_same_adapter(result, uninterrupted)
    assert steps(result) == [1, 2, 3, 4]


def test_ctrl_c_makes_a_checkpoint_for_any_workers(
    uninterrupted: Result, cluster: str, ray_run: MakeRun, tmp_path: Path
) -> None:
    run = ray_run({"storage": str(tmp_path), "rewards.blue.pause": 1.0, "train.checkpoint_every": 100})
    process = driver(run, cluster, tmp_path / "run.json")
    wait_for(lambda: next(iter(tmp_path.glob("*/pictures/step_000000.png")), None))
    start = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=120)[0].decode()
    print(f"Ctrl-C: ended after {time.monotonic() - start:.1f} s")
    assert process.returncode == 130, said
    assert "Traceback" not in said
    found = next(iter(tmp_path.glob("*/checkpoint_*/checkpoint.json")))
    folder = found.parents[1]
    last = checkpoint.latest(Folder(folder))
    assert last is not None
    assert 0 < last.next_step < UPDATES
    assert f"stopped after update {last.next_step} of {UPDATES}; go on with --resume {folder.name}" in said
    result = train(override(run, {"pools.train.replicas": 1, "train.zero_stage": 1}), resume=folder)
    print(f"2 workers at ZeRO-2, resumed by 1 at ZeRO-1: adapter {distance(result, uninterrupted):.1e} relative")
    assert distance(result, uninterrupted) < 1e-5
    assert steps(result) == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_stopped_run_is_exported_as_it_is(uninterrupted: Result, cluster: str, ray_run: MakeRun, tmp_path: Path) -> None:
    """Resumed with no update left, it is evaluated once more; with more of them, it goes on."""
    run = ray_run({"storage": str(tmp_path), "rewards.blue.pause": 1.0, "evaluate.every": 100})
    process = driver(run, cluster, tmp_path / "run.json")
    folder = wait_for(index(run.storage, 1)).parents[1]
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=120)
    last = checkpoint.latest(Folder(folder))
    assert last is not None and last.next_step < UPDATES
    result = train(override(run, {"train.updates": last.next_step}), resume=folder)
    assert result.after["held_out/total"] > result.before["held_out/total"]
    assert_same_adapter(train(run, resume=folder), uninterrupted)


def test_nan_reward_ends_the_run(cluster: str, ray_run: MakeRun, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(NonFiniteReward, match=r"reward 'blue' is nan for prompt 'a fox', seed \d+"):
        train(ray_run({"storage": str(tmp_path), "rewards.blue.nan_for": "a fox"}))
    print(f"NaN: refused after {time.monotonic() - start:.0f} s")
    (run_json,) = tmp_path.glob("tiny-*/run.json")
    folder = Folder(run_json.parent)
    assert all(checkpoint.read(folder / name) for name in folder.folders() if name.startswith("checkpoint_"))
    client = tracking.Tracker(f"sqlite:///{tmp_path}/mlflow.db", "").client()
    (logged,) = client.search_runs([e.experiment_id for e in client.search_experiments()], "tags.`raydiff.name` LIKE 'tiny-%'")
    assert logged.info.status == "FAILED"


@pytest.mark.parametrize("method", [pytest.param("draft_lv", marks=pytest.mark.slow), "sft"])
def test_reward_that_raises_in_the_learner_ends_the_run(cluster: str, ray_run: MakeRun, tmp_path: Path, method: str) -> None:
    """As the run's own fault, on both workers, whether the reward is asked in the loss or before it: no worker is lost."""
    changes = {"storage": str(tmp_path), "method": {"kind": method}, "rewards.blue.raise_for": "a fox"}
    with pytest.raises(
        RewardFailed, match=r"reward 'blue' failed for prompt 'a fox', seed \d+: RuntimeError: the judge is asleep"
    ):
        train(ray_run({**changes, "train.max_failures": 0}))


def test_full_disk_keeps_the_last_checkpoint(cluster: str, ray_run: MakeRun, tmp_path: Path, small_disk: Path) -> None:
    changes = {"storage": str(small_disk), "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db", "evaluate.every": 4}
    run = ray_run({**changes, "pools.train.replicas": 1, "rewards.blue.pause": 0.3})

    def fill_it() -> None:
        wait_for(index(str(small_disk), 1))
        fill(small_disk)

    thread = threading.Thread(target=fill_it, daemon=True)
    thread.start()
    with pytest.raises(StorageError, match=r"cannot write .*/checkpoint_00000\d: .*No space left.*free there") as error:
        train(run)
    print(error.value)
    thread.join()
    (run_json,) = small_disk.glob("tiny-*/run.json")
    last = checkpoint.latest(Folder(run_json.parent))
    assert last is not None
    assert 1 <= last.next_step < UPDATES
    for kind in ("parameters", "exp_avg", "exp_avg_sq", "ema"):
        assert last.tensors(kind).keys() == last.tensors("parameters").keys()
