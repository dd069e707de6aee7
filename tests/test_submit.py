"""What `raydiff submit` refuses before anything is uploaded, and what it says to the job server."""

import json
import shlex
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raydiff import submit as jobs
from raydiff.cli import main
from raydiff.config import ConfigError
from raydiff.placement import Node

pytest.importorskip("ray")
RECIPE = "jobs/recipes/emoji_draft_lv_pools.toml"


class Server:
    """A job server that only says which version of Ray it is, and refuses all else with 500."""

    def __init__(self, version: str) -> None:
        self.asked: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                self.send_response(200 if self.path == "/api/version" else 500)
                self.end_headers()
                self.wfile.write(json.dumps({"version": "4", "ray_version": version, "ray_commit": ""}).encode())

            do_POST = do_PUT = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def old() -> Iterator[Server]:
    server = Server("2.9.0")
    yield server
    server.http.shutdown()


def test_another_version_of_ray_is_refused(old: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["submit", RECIPE, "--address", old.address])
    assert exit.value.code == 2
    assert "the cluster runs Ray 2.9.0, and this is Ray " in capsys.readouterr().err
    assert all(path.endswith("/version") for path in old.asked)  # nothing was uploaded


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["submit", RECIPE, "--address", "http://127.0.0.1:9"])
    assert exit.value.code == 2
    assert "http://127.0.0.1:9" in capsys.readouterr().err


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A job server that takes everything, of a cluster with one node."""
    server = SimpleNamespace(jobs=[])

    def submit_job(**job: Any) -> str:
        server.jobs.append(job)
        return "raysubmit_1"

    server.submit_job = submit_job
    monkeypatch.setattr(jobs, "client", lambda address: server)
    monkeypatch.setattr(jobs, "nodes", lambda server: [Node(2)])
    return server


def test_what_is_submitted(cluster: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["submit", RECIPE, "storage=/shared/a b", "--resume", "one", "--no-follow"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == "raysubmit_1\n"
    (job,) = cluster.jobs
    words = shlex.split(job["entrypoint"])
    assert words == ["python", "-m", "raydiff.cli", "train", RECIPE, "storage=/shared/a b", "--resume", "one"]
    assert job["runtime_env"]["working_dir"] == "."
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "600"}


def test_without_an_upload(cluster: SimpleNamespace) -> None:
    assert jobs.submit(Path(RECIPE), working_dir=None, follow=False) == 0
    assert cluster.jobs[0]["runtime_env"].keys() == {"env_vars"}


def test_a_run_without_room_is_refused_with_the_sum(cluster: SimpleNamespace) -> None:
    wide = ["pools.generate.replicas=9"]
    with pytest.raises(ConfigError, match=r"pools.generate: 9 × .* room for \d.*\n.*--grows"):
        jobs.submit(Path(RECIPE), wide, follow=False)
    assert cluster.jobs == []
    assert jobs.submit(Path(RECIPE), wide, grows=True, follow=False) == 0


def test_a_recipe_outside_of_the_upload_is_refused(cluster: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --working-dir"):
        jobs.submit(Path(RECIPE), working_dir=tmp_path, follow=False)
    assert cluster.jobs == []


def test_a_huge_folder_is_named_with_its_largest_files(tmp_path: Path) -> None:
    for name, size in {
        "small": 10,
        "data/large": 3 << 20,
        "runs/model": 9 << 20,
        "secret/x": 9 << 20,
        "other": 1 << 20,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / ".gitignore").write_text("secret\n")
    jobs.check_size(tmp_path, 5 << 20)  # without what is left out: 4 MiB
    with pytest.raises(ConfigError, match=r"is 4\.0 MiB, and an upload may be 2\.0 MiB") as caught:
        jobs.check_size(tmp_path, 2 << 20)
    lines = str(caught.value).splitlines()
    assert [line.split()[-1] for line in lines[1:3]] == ["data/large", "other"]


@pytest.mark.parametrize(
    ("info", "code"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "STOPPED", "driver_exit_code": None}, 130),
        ({"status": "FAILED", "driver_exit_code": 2}, 2),
        ({"status": "FAILED", "driver_exit_code": None}, 1),
    ],
)
def test_exit_codes(info: dict[str, Any], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    told = SimpleNamespace(submission_id="job", message="no room in the inn", **info)
    assert jobs.outcome(told) == code  # type: ignore[arg-type]
    assert ("no room in the inn" in capsys.readouterr().err) == (code == 1)
