"""Files that are replaced while a run on Ray is under way: it is refused by name, and not taken for a lost worker."""

import asyncio
import io
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raydiff import contents
from raydiff.config import ConfigError, Pool, Run, Sampler, rewards
from raydiff.contents import Contents
from raydiff.distributed import batch, checkpoint, score
from raydiff.distributed.batch import ABOUT, BatchError
from raydiff.distributed.generate_batch import generate
from raydiff.distributed.launch import train
from raydiff.distributed.score_batch import score as rate
from raydiff.distributed.storage import Folder
from raydiff.generate import Adapter
from raydiff.models.stable_diffusion import Plugin
from raydiff.placement import Node
from tests.distributed.conftest import wait_for
from tests.test_contents import scaled
from tests.tiny import make_adapter

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
MakeRun = Callable[..., Run]
HERE = Pool(num_gpus=0)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nan ant\na bee\n")
    return tmp_path / "prompts.txt"


@pytest.fixture
def one_worker(ray_run: MakeRun, prompts: Path, tmp_path: Path) -> MakeRun:
    def make(changes: dict[str, Any] | None = None) -> Run:
        small = {"pools.train.replicas": 1, "storage": str(tmp_path / "runs"), "prompts.train": str(prompts)}
        return ray_run(small | (changes or {}))

    return make


def test_a_run_goes_on_with_its_own_files_alone(cluster: str, one_worker: MakeRun, prompts: Path) -> None:
    first = train(one_worker({"train.updates": 1}))
    record = Contents.load((Path(first.folder) / contents.FILE).read_text())
    assert record == Contents.of(one_worker())
    kept = prompts.read_text()
    prompts.write_text("an owl\n")
    with pytest.raises(ConfigError, match=r"prompts\.train: \w{12} then, \w{12} now"):
        train(one_worker({"train.updates": 2}), resume=first.name)
    prompts.write_text(kept)
    again = train(one_worker({"train.updates": 2}), resume=first.name)
    last = checkpoint.latest(Folder(again.folder))
    assert last is not None and last.next_step == 2


def test_workers_that_start_again_refuse_what_was_replaced(
    cluster: str, one_worker: MakeRun, prompts: Path, tmp_path: Path
) -> None:
    """The worker dies in its third update; the prompts that its successor reads are others."""
    run = one_worker({"rewards.blue.die_once": str(tmp_path / "died"), "rewards.blue.pause": 0.3})

    def edit() -> None:
        wait_for(lambda: next(iter(Path(run.storage).glob("*/checkpoint_000001/checkpoint.json")), None))
        prompts.write_text("an owl\na hen\n")

    thread = threading.Thread(target=edit, daemon=True)
    thread.start()
    with pytest.raises(ConfigError, match=r"put them back, or start afresh:\n  prompts\.train: "):
        train(run)
    thread.join()
    assert (tmp_path / "died").exists()


def test_a_generator_that_has_loaded_something_else_ends_the_run(cluster: str, one_worker: MakeRun, tmp_path: Path) -> None:
    (tmp_path / "extra").write_text("as it was")
    model = {"model.kind": "tests.distributed.shifting", "model.extra": str(tmp_path / "extra")}
    with pytest.raises(ConfigError, match=r"start afresh:\n  model\.extra: "):
        train(one_worker({**model, "generation.where": "pool"}))
    assert (tmp_path / "extra").read_text() == "replaced"


def test_reward_replicas_refuse_what_they_were_not_asked_for(cluster: str, one_worker: MakeRun) -> None:
    run = one_worker({"rewards.where": "pool"})
    (group, *_) = score.start(run, [Node(4)], Contents.of(run))
    assert group.loaded["rewards.blue.kind"] == Contents.of(run).digests["rewards.blue.kind"]
    with pytest.raises(ConfigError, match=r"start afresh:\n  rewards\.blue\.kind: 000000000000 then") as error:
        score.start(run, [Node(4)], Contents({"rewards.blue.kind": "0" * 64}))
    assert type(error.value) is ConfigError  # and no trace of Ray's in its text
    replica = score.RewardReplica.__new__(score.RewardReplica)
    replica.fault = ConfigError("it is another one")  # as a replica that was started again has it
    with pytest.raises(ConfigError, match="it is another one"):
        asyncio.run(replica.score(None, [], False, False))  # type: ignore[arg-type]


def test_scores_of_two_reward_weights_are_not_mixed(cluster: str, tmp_path: Path) -> None:
    from raydiff import assets

    shutil.copy(assets.path("aesthetic") / "model.safetensors", tmp_path / "head.safetensors")
    style = rewards({"style": "aesthetic"}, [f"rewards.style.head={tmp_path}/head.safetensors"])
    write_pictures(tmp_path / "pictures.parquet", 4)
    call: dict[str, Any] = {"pool": HERE, "rows_per_file": 2}
    rate(str(tmp_path / "pictures.parquet"), str(tmp_path / "scored.parquet"), style, **call)
    about = json.loads((tmp_path / "scored.parquet" / ABOUT).read_text())["made_from"]
    assert about[batch.CONTENTS]["rewards.style.head"] == contents.of_path(tmp_path / "head.safetensors")
    next(iter(sorted((tmp_path / "scored.parquet").glob("rows-*")))).unlink()
    assert rate(str(tmp_path / "pictures.parquet"), str(tmp_path / "scored.parquet"), style, **call).made == 1
    scaled(tmp_path / "head.safetensors", 4)
    with pytest.raises(ConfigError, match=r"contents\.rewards\.style\.head = '\w{64}' there, '\w{64}' now"):
        rate(str(tmp_path / "pictures.parquet"), str(tmp_path / "scored.parquet"), style, **call)


def write_pictures(path: Path, rows: int) -> None:
    import numpy as np
    from PIL import Image

    from raydiff.data import images

    def png(value: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.full((16, 16, 3), value, np.uint8)).save(file, "PNG")
        return file.getvalue()

    import pyarrow as pa

    table = pa.table({images.IMAGE: [png(20 * i) for i in range(rows)], images.PROMPT: ["a cat"] * rows})
    pq.write_table(table, path, row_group_size=1)


def test_pictures_say_what_drew_them(
    cluster: str, tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that a training replaces, when its digest is written down and before an actor has loaded it."""
    from raydiff.distributed import generate_batch

    adapter = make_adapter(tiny_pipeline, tmp_path / "adapter", seed=1)
    options: dict[str, Any] = {"sampler": Sampler(steps=1, guidance=1.0), "prompts": ["a cat"], "pool": HERE}
    copy = generate_batch._copy

    def late(*args: Any) -> Any:
        scaled(adapter / "pytorch_lora_weights.safetensors", 3)
        return copy(*args)

    monkeypatch.setattr(generate_batch, "_copy", late)
    with pytest.raises(BatchError, match=r"generate: ConfigError: .*\n  adapters\.0: \w{12} then, \w{12} now"):
        generate(
            str(tmp_path / "x.parquet"), model=Plugin(path=str(tiny_pipeline)), adapters=[Adapter(str(adapter))], **options
        )
    assert not list((tmp_path / "x.parquet").glob("rows-*"))
    monkeypatch.undo()
    base = shutil.copytree(tiny_pipeline, tmp_path / "base")
    generate(str(tmp_path / "y.parquet"), model=Plugin(path=str(base)), **options)
    scaled(base / "vae/diffusion_pytorch_model.safetensors", 0.9)
    with pytest.raises(ConfigError, match=r"contents\.model\.path/vae = '\w{64}' there"):
        generate(str(tmp_path / "y.parquet"), model=Plugin(path=str(base)), **options)


def test_a_dataset_that_is_replaced_meanwhile_is_not_scored(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydiff.distributed import score_batch

    write_pictures(tmp_path / "pictures.parquet", 2)
    run = batch.run

    def late(job: Any) -> Any:
        write_pictures(tmp_path / "pictures.parquet", 3)
        return run(job)

    monkeypatch.setattr(score_batch.batch, "run", late)
    with pytest.raises(BatchError, match="has changed since the call began"):
        rate(str(tmp_path / "pictures.parquet"), str(tmp_path / "scored.parquet"), rewards({"blue": "colour"}), pool=HERE)
