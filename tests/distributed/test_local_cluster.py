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
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

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
        ["bash", "cluster/local.sh", *arguments, "--port", "6600"],
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
        ["ray", "job", "submit", *arguments], env=environment, capture_output=True, text=True, timeout=150, cwd="/"
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
        from raydiff.plan import cluster_nodes
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


def test_a_stopped_job_gets_ctrl_c_and_time(environment: dict[str, str], tmp_path: Path) -> None:
    """What docs/clusters.md says to submit with: `ray job stop` then is a Ctrl-C, and waits for the last checkpoint."""
    marker = tmp_path / "marker"
    script = f"""
        import pathlib, time, ray
        ray.init(logging_level="ERROR")
        marker = pathlib.Path({str(marker)!r})
        try:
            marker.write_text("running")
            time.sleep(300)
        except KeyboardInterrupt:
            time.sleep(5)
            marker.write_text("checkpoint")
    """
    graceful = '{"env_vars": {"RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "600"}}'
    command = ["--", "python", "-c", textwrap.dedent(script)]
    submit(environment, "--no-wait", "--submission-id", "graceful", "--runtime-env-json", graceful, *command)
    end = time.monotonic() + 90
    while not marker.exists() and time.monotonic() < end:
        time.sleep(0.5)
    subprocess.run(["ray", "job", "stop", "graceful"], env=environment, check=True, capture_output=True, timeout=90)
    assert marker.read_text() == "checkpoint"
