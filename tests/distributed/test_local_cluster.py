"""cluster/local.sh: four nodes with labels and a token, a job on them, and nothing left afterwards."""

import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from raydiff.config import Run
from tests.distributed.conftest import wait_for
from tests.distributed.test_train import index

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
CPUS = {"train": 2, "generate": 3, "reward": 1}


def of(scratch: str) -> list[psutil.Process]:
    """The processes that belong to the cluster in this folder."""
    return [p for p in psutil.process_iter(["cmdline"]) if any(scratch in word for word in p.info["cmdline"] or [])]


@pytest.fixture(scope="module")
def environment() -> Iterator[dict[str, str]]:
    """What local.sh says to export; afterwards it has been stopped by Ctrl-C, with all that it started."""
    arguments = [word for pool, cpus in CPUS.items() for word in (f"--{pool}", str(cpus))]
    script = subprocess.Popen(
        ["env", "--default-signal=INT", "bash", "cluster/local.sh", *arguments, "--port", "6600"],
        cwd=ROOT,
        env={**os.environ, "PATH": PATH, "PYTHONPATH": str(ROOT), "RAYDIFF_TEST_URI": "http://of-the-cluster"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    said: dict[str, str] = {}
    try:
        assert script.stdout is not None
        for line in script.stdout:
            words = shlex.split(line, comments=True)
            if not words:
                break
            name, _, value = words[1].partition("=")
            said[name] = value
        yield {**os.environ, "PATH": PATH, "PYTHONPATH": str(ROOT), **said}
    finally:
        os.killpg(script.pid, signal.SIGINT)  # what a terminal's Ctrl-C does
        start = time.monotonic()
        code = script.wait(timeout=90)
    print(f"stopped after {time.monotonic() - start:.0f} s")
    assert code == 130
    scratch = str(Path(said["RAY_AUTH_TOKEN_PATH"]).parent)
    end = time.monotonic() + 20
    while (left := of(scratch)) and time.monotonic() < end:
        time.sleep(0.5)
    assert not left
    assert not Path(scratch).exists()


def submit(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        ["ray", "job", "submit", *arguments], env=environment, capture_output=True, text=True, timeout=280, cwd="/"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def answer(environment: dict[str, str], token: str | None) -> int:
    """The job server's HTTP status."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers=headers)
    try:
        return int(urllib.request.urlopen(request, timeout=30).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_with_the_token(environment: dict[str, str]) -> None:
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o777 == 0o600
    assert answer(environment, None) == 401
    assert answer(environment, "0" * 64) == 403
    assert answer(environment, token.read_text()) == 200


def test_a_job_sees_labelled_nodes(environment: dict[str, str]) -> None:
    """Also: its working directory without --working-dir, and who fills in a variable of its command."""
    script = """
        import os, sys, ray
        from raydiff.plan.clusters import cluster_nodes
        ray.init(logging_level="ERROR")
        for node in cluster_nodes():
            print("node", node.labels.get("raydiff-pool"), int(node.cpus))
        print("uri", sys.argv[1], "cwd", os.getcwd())
    """
    command = f"exec python -c {shlex.quote(textwrap.dedent(script))} tracking.uri=$RAYDIFF_TEST_URI"
    said = submit(environment, "--", "sh", "-c", command)
    nodes = {line.split()[1]: int(line.split()[2]) for line in said.splitlines() if line.startswith("node ")}
    assert nodes == {"None": 0, **CPUS}
    assert f"uri tracking.uri=http://of-the-cluster cwd {ROOT}" in said.splitlines()


@pytest.fixture
def recipe(tiny_run: Callable[..., Run], tmp_path: Path) -> Path:
    """A run of 12 slow updates on the labelled nodes, in a folder of its own."""
    run = tiny_run(
        changes={
            "storage": str(tmp_path / "storage"),
            "train.updates": 12,
            "rewards": {"blue": {"kind": "tests.distributed.steered", "pause": 1.0}},
            "generation.where": "pool",
            "rewards.where": "pool",
            **{f"pools.{pool}.labels": {"raydiff-pool": pool} for pool in CPUS},
        }
    )
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "recipe.json").write_text(run.model_dump_json())
    return folder / "recipe.json"


def raydiff(environment: dict[str, str], recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raydiff.cli", "submit", recipe.name, *arguments]
    return subprocess.run(command, env=environment, cwd=recipe.parent, capture_output=True, text=True, timeout=280)


def test_submit_follow_stop_and_resume(environment: dict[str, str], recipe: Path) -> None:
    """A job that is stopped leaves a checkpoint, and a second one goes on after it."""
    first = raydiff(environment, recipe, "--no-follow")
    assert first.returncode == 0, first.stderr
    job = first.stdout.strip()
    storage = recipe.parents[1] / "storage"
    wait_for(index(str(storage), 2), 200)
    subprocess.run(["ray", "job", "stop", job], env=environment, check=True, capture_output=True, timeout=120)
    (folder,) = (path.parent for path in storage.glob("*/run.json"))
    done = max(int(path.name.split("_")[1]) for path in folder.glob("checkpoint_*"))
    log = subprocess.run(["ray", "job", "logs", job], env=environment, capture_output=True, text=True, check=True).stdout
    assert f"stopped after update {done} of 12; go on with --resume {folder.name}" in log
    assert "\r" not in log

    second = raydiff(environment, recipe, "--resume", folder.name)
    assert second.returncode == 0, second.stdout + second.stderr
    lines = second.stdout.splitlines()
    assert any(line.startswith(f"update {done + 1}/12") for line in lines)  # it went on, and was followed
    assert any(line.startswith("finished 12 updates") for line in lines)
    assert (folder / "finished.json").exists()
    assert (folder / "adapter").is_dir()


def test_a_job_that_ray_kills_is_resumed(environment: dict[str, str], tmp_path: Path) -> None:
    """docs/clusters.md's job, made small. Without RAY_JOB_STOP_WAIT_TIME_S a stopped job has 3 seconds, and an update takes 5."""
    small = ["evaluate.images=4", "evaluate.drift_images=0", "sampler.steps=2", "batch.size=4", "batch.micro=4"]
    slow = ['rewards.border={kind = "tests.distributed.steered", pause = 5}']
    labels = [f"pools.{pool}.labels.raydiff-pool={pool}" for pool in CPUS]
    train = ["python", "jobs/train.py", "jobs/recipes/emoji_draft_lv_pools.toml", "train.updates=5", *labels]
    job = ["--working-dir", str(ROOT), "--", *train, *small, *slow, "train.checkpoint_every=1", f"storage={tmp_path}"]
    said = submit(environment, "--no-wait", *job)
    number = next(word.strip("'") for word in said.split() if word.startswith("'raysubmit_"))
    folder = wait_for(index(str(tmp_path), 1), 200).parents[1]
    subprocess.run(["ray", "job", "stop", number], env=environment, check=True, capture_output=True, timeout=120)
    assert not (folder / "finished.json").exists()
    before = {path.name for path in folder.glob("checkpoint_*")}
    said = submit(environment, *job, "--resume", folder.name)
    assert "finished 5 updates" in said
    assert (folder / "finished.json").exists() and before


def test_a_failing_job_says_why(environment: dict[str, str], recipe: Path) -> None:
    """What only shows on the cluster: exit code and message arrive."""
    failed = raydiff(environment, recipe, "storage=/proc/nowhere")
    assert failed.returncode == 2
    assert "storage = '/proc/nowhere'" in failed.stdout
    full = raydiff(environment, recipe, "pools.generate.replicas=9")
    assert full.returncode == 2
    assert "pools.generate: 9 × (1 CPUs) = 9 CPUs; the cluster has 3 CPUs left for it" in full.stderr


def test_a_wrong_token_is_refused(environment: dict[str, str], recipe: Path, tmp_path: Path) -> None:
    other = tmp_path / "token"
    other.write_text("0" * 64)
    refused = raydiff({**environment, "RAY_AUTH_TOKEN_PATH": str(other)}, recipe)
    assert refused.returncode == 2
    assert "token" in refused.stderr.lower()
    assert "Traceback" not in refused.stderr
