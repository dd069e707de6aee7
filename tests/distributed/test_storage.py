"""Runs' folders in a bucket of a server that speaks S3, and what happens while it is away."""

import errno
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raydiff.config import ConfigError, Run
from raydiff.core.policy import Calls
from raydiff.distributed import checkpoint, launch
from raydiff.distributed.lease import Lease
from raydiff.distributed.storage import Folder, StorageError, away

boto3 = pytest.importorskip("boto3")
server = pytest.importorskip("moto.server")


class Bucket:
    """A server on 127.0.0.1 with the bucket `runs`, whose content outlives a stop."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self.start()

    def start(self) -> None:
        self.server = server.ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]

    def stop(self) -> None:
        self.server.stop()


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        found = Bucket()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{found.port}",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }.items():
            patch.setenv(name, value)
        boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="runs")
        yield found
        found.stop()


def test_a_folder_in_a_bucket(bucket: Bucket) -> None:
    folder = Folder("s3://runs/all") / "one"
    assert not folder.exists()
    folder.write("a/b.bin", b"123")
    folder.write("c", b"4")
    folder.write_json("d.json", {"e": 5})
    assert (folder.read("a/b.bin"), folder.size("a/b.bin"), folder.size("b")) == (b"123", 3, None)
    assert folder.read_json("d.json") == {"e": 5}
    assert (folder.folders(), folder.files(), folder.files("a")) == (["a"], ["c", "d.json"], ["b.bin"])
    assert Folder("s3://runs/all").folders() == ["one"]
    folder.delete("a")
    assert folder.folders() == []
    with pytest.raises(FileNotFoundError):
        folder.read("a/b.bin")


def test_a_folder_is_uploaded_to_a_bucket_with_what_vouches_for_it_last(bucket: Bucket, tmp_path: Path) -> None:
    folder = Folder("s3://runs/upload")
    folder.remove("nothing")
    for n in (1, 2):
        for name in ("best.json", "unet/a", "unet/b"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(str(n))
        folder.upload(tmp_path, "adapter", "best.json")
        assert (folder.files("adapter"), folder.files("adapter/unet")) == (["best.json"], ["a", "b"])
        assert {folder.read(f"adapter/{name}") for name in ("best.json", "unet/a", "unet/b")} == {str(n).encode()}
    written = {
        name: folder.fs.get_file_info(f"runs/upload/adapter/{name}").mtime_ns for name in ("best.json", "unet/a", "unet/b")
    }
    assert max(written.values()) == written["best.json"]
    folder.remove("adapter/best.json")
    assert folder.files("adapter") == []


def test_a_lease_in_a_bucket(bucket: Bucket) -> None:
    folder = Folder("s3://runs/leased")
    with Lease(folder, beat=0.2, expiry=2) as mine:
        mine.take()
        with Lease(folder, beat=0.2, expiry=2) as other, pytest.raises(ConfigError, match="works on this folder"):
            other.take()
    assert folder.files() == []


def test_checkpoints_in_a_bucket(bucket: Bucket, tiny_run: object) -> None:
    run: Run = tiny_run(changes={"train.keep_checkpoints": 2})  # type: ignore[operator]
    folder = Folder("s3://runs/checkpoints")
    for step in (1, 2, 3):
        tensors = {"parameters": {"w": torch.full((3,), float(step))}}
        checkpoint.save(folder, tensors.items(), run=run, next_step=step, calls=Calls(), seconds=1.0, history=[{"step": step}])
    assert folder.folders() == ["checkpoint_000002", "checkpoint_000003"]
    (folder / "checkpoint_000003").write("parameters.safetensors", b"cut off")
    found = checkpoint.latest(folder)
    assert found is not None
    assert found.next_step == 2
    assert found.tensors("parameters")["w"].tolist() == [2, 2, 2]


def test_a_server_that_is_away_is_waited_for(bucket: Bucket) -> None:
    folder = Folder("s3://runs/away", patience=60)
    folder.write("before", b"1")
    bucket.stop()
    threading.Timer(3, bucket.start).start()
    start = time.monotonic()
    folder.write("while", b"2")
    assert time.monotonic() - start > 2
    assert folder.files() == ["before", "while"]


def test_patience_ends(bucket: Bucket) -> None:
    folder = Folder("s3://runs/away", patience=0)
    bucket.stop()
    try:
        with pytest.raises(StorageError, match=r"cannot write late \(0.0 MiB\) in s3://runs/away: .*connect") as caught:
            folder.write("late", b"3")
        assert away(caught.value)
    finally:
        bucket.start()


def test_what_does_not_pass_is_not_waited_for(bucket: Bucket, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(StorageError, match="nowhere"):
        Folder("s3://nowhere/runs", patience=600).check_writable()
    with pytest.raises(FileNotFoundError):
        Folder("s3://runs/all", patience=600).read("nothing")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError):
        Folder(tmp_path / "file", patience=600).write("below", b"")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.EACCES, "Permission denied"), False),
        (FileNotFoundError("s3://x"), False),
        (OSError("AWS Error SLOW_DOWN during PutObject operation: Please reduce your request rate."), True),
        (OSError("AWS Error ACCESS_DENIED during HeadBucket operation: No response body."), False),
        (OSError("google::cloud::Status(UNAVAILABLE: connection reset)"), True),
        (ValueError("UNAVAILABLE"), False),
    ],
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    assert away(error) == passes


def test_a_run_without_credentials_is_refused_in_a_sentence(
    bucket: Bucket, tiny_run: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"storage = 's3://runs/x': .*DENIED.*credentials come from the environment"):
        launch.preflight(tiny_run(changes={"storage": "s3://runs/x", "tracking.uri": "http://127.0.0.1:9"}))  # type: ignore[operator]
