"""What the files behind a run hold: whatever is replaced is named when the run is gone on with, and by who has loaded it."""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from raydiff import assets, contents, generate
from raydiff.config import ConfigError, Run, Sampler, override
from raydiff.contents import Contents
from raydiff.distributed import launch, run_folder
from raydiff.distributed.storage import Folder
from raydiff.distributed.sweep import _Reporting, check_loaded
from raydiff.local import fit
from raydiff.models.stable_diffusion import Plugin
from raydiff.session import Session
from tests.data import shards
from tests.distributed import faulty
from tests.tiny import make_adapter

MakeRun = Callable[..., Run]
DARK = (
    "from mine_helper import sign\n"
    + """
from typing import Literal
from raydiff.rewards.base import RewardConfig


class Plugin(RewardConfig):
    kind: Literal["mine.dark"] = "mine.dark"

    def build(self, device="cpu"):
        from mine.scale import SCALE

        return lambda images, prompts: sign * SCALE * images.mean((1, 2, 3))
"""
)


@pytest.fixture
def files(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with everything that a run can name: base, adapter, prompts, reward weights, modules and pairs of one's own."""
    shutil.copytree(tiny_pipeline, tmp_path / "base")
    make_adapter(tiny_pipeline, tmp_path / "adapter", seed=1)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nan ant\na bee\n")
    (tmp_path / "held_out.txt").write_text("a pig\na cow\n")
    shutil.copytree(assets.path("clip"), tmp_path / "clip")
    shutil.copytree(assets.path("classifier"), tmp_path / "classifier")
    shutil.copy(assets.path("aesthetic") / "model.safetensors", tmp_path / "head.safetensors")
    (tmp_path / "code" / "mine").mkdir(parents=True)
    (tmp_path / "code" / "mine_helper.py").write_text("sign = -1\n")
    (tmp_path / "code" / "mine" / "__init__.py").write_text("")
    (tmp_path / "code" / "mine" / "scale.py").write_text("SCALE = 1\n")
    (tmp_path / "code" / "mine" / "dark.py").write_text(DARK)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("mine", "mine_helper")]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


@pytest.fixture
def whole(tiny_run: MakeRun, files: Path) -> MakeRun:
    """whole({...}): a run that names all of `files` but the pairs."""

    def make(changes: dict[str, Any] | None = None, method: str = "draft_k") -> Run:
        rewards = {
            "dark": {"kind": "mine.dark"}, "clip": {"kind": "clip", "model": str(files / "clip")},
            "style": {"kind": "aesthetic", "model": str(files / "clip"), "head": str(files / "head.safetensors")},
        }  # fmt: skip
        named = {
            "storage": str(files / "runs"), "model.path": str(files / "base"), "model.adapters": [str(files / "adapter")],
            "rewards": rewards, "prompts": {"train": str(files / "prompts.txt"), "held_out": str(files / "held_out.txt")},
            "evaluate.rewards": {"what": {"kind": "classifier", "model": str(files / "classifier"), "label": "cat"}},
            "evaluate.clip": str(files / "clip"),
        }  # fmt: skip
        return tiny_run(method, {**named, **(changes or {})})

    return make


def started(run: Run) -> Folder:
    """The folder of a run that was started, as far as the driver gets before Ray."""
    folder = run_folder.fresh(run)
    run_folder.begin(run, folder, run_folder.held(run, folder))
    return folder


def scaled(file: Path, factor: float = 0.5) -> None:
    """Other weights in place of those of a safetensors file: the same names, shapes and size."""
    tensors = {name: tensor * factor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def swap_words(file: Path) -> None:
    """Two words of a tokenizer change their numbers; the file's size stays."""
    text = file.read_text()
    vocabulary = json.loads(text)["model"]["vocab"] if file.name == "tokenizer.json" else json.loads(text)
    first, second = (f'"{word}":' for word in list(vocabulary)[:2])
    assert first in text and second in text
    file.write_text(text.replace(first, "@").replace(second, first).replace("@", second))


def vocabulary(folder: Path) -> Path:
    return next(f for f in (folder / "tokenizer.json", folder / "vocab.json") if f.is_file())


CHANGES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "prompts edited": ("prompts.train", lambda d: (d / "prompts.txt").write_text("a cat\na dog\nan owl\na bee\n")),
    "held-out prompts": ("prompts.held_out", lambda d: (d / "held_out.txt").write_text("a pig\na hen\n")),
    "unet halved": ("model.path/unet", lambda d: scaled(d / "base/unet/diffusion_pytorch_model.safetensors")),
    "vae": ("model.path/vae", lambda d: scaled(d / "base/vae/diffusion_pytorch_model.safetensors")),
    "text encoder": ("model.path/text_encoder", lambda d: scaled(d / "base/text_encoder/model.safetensors")),
    "vocabulary": ("model.path/tokenizer", lambda d: swap_words(vocabulary(d / "base/tokenizer"))),
    "scheduler": ("model.path/scheduler", lambda d: edit_json(d / "base/scheduler/scheduler_config.json", beta_end=0.02)),
    "adapter": ("model.adapters.0", lambda d: scaled(d / "adapter/pytorch_lora_weights.safetensors")),
    "own reward": ("rewards.dark.kind", lambda d: (d / "code/mine/dark.py").write_text(DARK + "# edited\n")),
    "what it imports": ("rewards.dark.kind/mine.scale", lambda d: (d / "code/mine/scale.py").write_text("SCALE = 2\n")),
    "beside it": ("rewards.dark.kind/mine_helper", lambda d: (d / "code/mine_helper.py").write_text("sign = +1\n")),
    "reward weights": ("rewards.clip.model", lambda d: scaled(d / "clip/model.safetensors")),
    "reward's words": ("rewards.clip.model", lambda d: swap_words(vocabulary(d / "clip"))),
    "reward's head": ("rewards.style.head", lambda d: scaled(d / "head.safetensors")),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_replaced_is_named_at_resume(whole: MakeRun, files: Path, change: str) -> None:
    run = whole()
    folder = started(run)
    field, replace = CHANGES[change]
    before = run_folder.recorded(folder)
    assert before is not None and run_folder.held(run, folder) == before  # an untouched run
    replace(files)
    now = Contents.of(run).digests[field]
    with pytest.raises(ConfigError, match="put them back, or start afresh") as error:
        launch.train(run, resume=folder.name)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert f"{field}: {before.digests[field][:12]} then, {now[:12]} now" in lines
    shared = {"rewards.clip.model", "rewards.style.model"}  # one folder
    assert {line.partition(":")[0] for line in lines} == (shared if field in shared else {field})


@pytest.mark.parametrize("change", ["unet halved", "own reward"])
def test_times_that_are_set_back_hide_nothing(whole: MakeRun, files: Path, change: str) -> None:
    """In place, of the same size, with the old time of modification: what a copy that keeps times leaves."""
    run = whole()
    field, replace = CHANGES[change]
    target = files / ("code/mine/dark.py" if change == "own reward" else "base/unet/diffusion_pytorch_model.safetensors")
    time.sleep(contents._SETTLED + 0.1)  # so that its digest is remembered
    before, state, data = Contents.of(run), target.stat(), target.read_bytes()
    assert str(target) in before.seen
    new = data[:-1] + bytes([data[-1] ^ 1])
    with target.open("r+b") as file:
        file.write(new)
    os.utime(target, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (target.stat().st_size, target.stat().st_mtime_ns) == (state.st_size, state.st_mtime_ns)
    with pytest.raises(ConfigError, match=field):
        before.compare(Contents.of(run).digests)
    assert replace is not None


def test_evaluation_may_change(whole: MakeRun, files: Path) -> None:
    """As its fields may: checkpoint.MAY_CHANGE."""
    run = whole({"rewards": {"dark": {"kind": "mine.dark"}}})
    folder = started(run)
    scaled(files / "clip" / "model.safetensors")
    scaled(files / "classifier" / "model.safetensors")
    now = run_folder.held(run, folder)
    assert now == Contents.of(run)
    assert {"evaluate.clip", "evaluate.rewards.what.model"} <= now.digests.keys()


@pytest.mark.parametrize("change", ["file", "picture", "labels"])
def test_pairs_are_named_at_resume(tiny_run: MakeRun, tmp_path: Path, change: str) -> None:
    path = shards.pairs(tmp_path / "pairs.parquet", 6)
    table = pq.read_table(path)
    pictures = [Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)) for i in range(6)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"{i}.png")
    paths = pa.array([f"{i}.png" for i in range(6)])
    for column in ("image_0", "image_1") if change == "picture" else ():
        table = table.set_column(table.schema.get_field_index(column), column, paths)
    pq.write_table(table, path)
    labels = {"method.source": "labels", "train.updates": 1, "sampler.eta": 1.0, "sampler.final_alpha": None}
    dataset = {"method.source": "dataset"}
    named = {"pairs.path": str(path), "storage": str(tmp_path / "runs")}
    run = tiny_run("d3po", labels | named) if change == "labels" else tiny_run("diffusion_dpo", dataset | named)
    folder = started(run)
    assert run_folder.held(run, folder) == run_folder.recorded(folder)
    if change == "picture":
        pictures[5].save(tmp_path / "2.png")
    else:
        turned = pa.array([1 - label for label in table["label"].to_pylist()])
        pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", turned), path)
    with pytest.raises(ConfigError, match=r"pairs\.path: \w{12} then, \w{12} now"):
        run_folder.held(run, folder)


def test_another_version_is_told_and_not_refused(whole: MakeRun) -> None:
    run = whole()
    folder = started(run)
    kept = folder.read_json(contents.FILE)
    folder.write_json(contents.FILE, {**kept, "raydiff": "0.0.1"})
    with pytest.warns(UserWarning, match=r"was started by raydiff 0\.0\.1, and this is"):
        assert run_folder.held(run, folder) == Contents.of(run)
    (Path(folder.uri) / contents.FILE).unlink()
    with pytest.warns(UserWarning, match=r"has no contents\.json: what its files held .* is unknown"):
        assert run_folder.held(run, folder) == Contents.of(run)


def test_a_session_is_compared_by_what_it_has_read(whole: MakeRun, files: Path) -> None:
    """Prompts that were read before the file was edited are the right ones; weights are judged by their files."""
    run = whole()
    held, session = Contents.of(run), Session(run)
    checked = held.check_session(session, "evaluate.clip", "pairs")
    assert checked == held.digests
    (files / "prompts.txt").write_text("an owl\n")
    assert held.check_session(session)["prompts.train"] == held.digests["prompts.train"]
    with pytest.raises(ConfigError, match=r"prompts\.train: "):
        held.check_session(Session(run))
    scaled(files / "base/unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match="model.path/unet: "):
        held.check_session(session)


def test_fit_refuses_what_is_replaced_while_it_loads(whole: MakeRun, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = whole({"train.updates": 1, "evaluate.images": 2})
    build = type(run.model).build

    def late(self: Any, *args: Any, **kwargs: Any) -> Any:
        (files / "code/mine/dark.py").write_text(DARK + "# edited\n")
        return build(self, *args, **kwargs)

    monkeypatch.setattr(type(run.model), "build", late)
    with pytest.raises(ConfigError, match=r"rewards\.dark\.kind: "):
        next(fit(run))


def test_pictures_say_what_was_loaded(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that replaces its adapter while pictures are drawn."""
    weights = files / "adapter/pytorch_lora_weights.safetensors"
    side = [generate.Adapter(str(files / "adapter"))]
    model, sampler = Plugin(path=str(files / "base")), Sampler(steps=1, guidance=1.0)
    pipe, made_from = generate.loaded(model, sampler, side)
    assert made_from == generate.origin(model, sampler, side)
    scaled(weights)
    generate.write(
        generate.samples(pipe, ["a cat"], [1], sampler), tmp_path / "to", model=model, sampler=sampler, made_from=made_from
    )
    assert json.loads((tmp_path / "to" / "images.json").read_text())["adapters"] == made_from["adapters"]
    load = generate.load

    def late(*args: Any) -> Any:
        scaled(weights)
        return load(*args)

    monkeypatch.setattr(generate, "load", late)
    with pytest.raises(ConfigError, match=r"adapters\.0: "):
        generate.loaded(model, sampler, side)


def test_a_folder_counts_what_is_read_from_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"old")
    alone = contents.of_path(folder)
    (folder / "weights.bin").write_bytes(b"new")
    assert contents.of_path(folder) != alone  # where there are no others, they are what is read
    (folder / "model.safetensors").write_bytes(b"1")
    safe = contents.of_path(folder)
    (folder / "weights.bin").write_bytes(b"newer")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "lock").write_text("x")
    assert contents.of_path(folder) == safe
    (folder / "config.json").write_text("{}")
    assert contents.of_path(folder) != safe
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert contents.of_path(tmp_path / "elsewhere") == contents.of_path(folder)


def test_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    os.utime(file, (1, 1))
    read: list[Any] = []
    sha = contents._sha
    monkeypatch.setattr(contents, "_sha", lambda f: read.append(f) or sha(f))
    assert contents.of_path(file) == contents.of_path(file)
    assert len(read) == 2  # just made: the next change might fall into the same tick
    time.sleep(contents._SETTLED + 0.1)
    digest = contents.of_path(file)
    assert contents.of_path(file) == digest and len(read) == 3
    told = Contents.with_seen({}).dump()
    contents._seen.clear()
    Contents.load(told)  # as a worker gets it
    assert contents.of_path(file) == digest and len(read) == 3


def test_a_hub_id_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--owner--name"
    assert contents.commit("owner/name") is None
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("abc")
    (model / "snapshots" / "def").mkdir(parents=True)
    assert [contents.commit(i) for i in ("owner/name", "owner/name@def", "owner/name@v1")] == ["abc", "def", None]
    assert contents.of_locations({"model.path": "owner/name"}) == {"model.path": "abc"}


def test_modules_of_ones_own() -> None:
    """Those of the same root that a module imports, and the packages above; raydiff's own are its version's business."""
    own = contents.modules(faulty.Plugin)
    assert {"kind", "kind/tests", "kind/tests.distributed.steered"} <= own.keys()
    assert own["kind"] == Path(faulty.__file__)
    assert not any("raydiff" in name or "torch" in name for name in own)
    assert contents.modules(Plugin) == {}


def test_a_file_that_is_gone_is_named(whole: MakeRun, files: Path) -> None:
    before = Contents.of(whole())
    (files / "adapter/pytorch_lora_weights.safetensors").unlink()
    (files / "adapter").rmdir()
    assert "model.adapters.0" not in Contents.of(whole()).digests  # it may be on the nodes that load it
    with pytest.raises(ConfigError, match=r"model\.adapters\.0: \w{12} then, missing now"):
        before.check(whole(), ["model"])
    with pytest.raises(FileNotFoundError, match=r"model\.adapters: adapter .*there is no"):
        next(fit(whole()))


def test_runs_share_what_lies_in_one_place(whole: MakeRun, files: Path) -> None:
    """A sweep over base models: each trial is compared with what its own held."""
    shutil.copytree(files / "base", files / "other")
    scaled(files / "other/unet/diffusion_pytorch_model.safetensors")
    runs = [whole(), whole({"model.path": str(files / "other")})]
    shared = {key: d for run in runs for key, d in Contents.of(run).by_place(run).items()}
    for run in runs:
        assert Contents(shared).at_place(run).digests == Contents.of(run).digests
    assert Contents.of(runs[0]).digests["model.path/unet"] != Contents.of(runs[1]).digests["model.path/unet"]


def test_what_a_driver_cannot_tell_is_left_to_who_loads(whole: MakeRun, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub id, and a reward with packages of its own: what loads them says it, and later ones are compared with that."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(files / "hub"))
    refs = files / "hub" / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    own = {"rewards.dark.runtime_env": {"pip": ["x"]}, "rewards.where": "pool", "model.path": "owner/name"}
    run = whole(own)
    driver = Contents.of(run)
    assert not {"rewards.dark.kind", "model.path"} & driver.digests.keys()
    loaded = contents.digests(run, ["model", "rewards.dark"])
    assert loaded["model.path"] == "a" * 40 and "rewards.dark.kind" in loaded
    held = driver.joined(loaded)
    assert held.check(run, ["model", "rewards.dark"]) == loaded
    (refs / "main").write_text("b" * 40)
    with pytest.raises(ConfigError, match=r"model\.path: aaaaaaaaaaaa then, bbbbbbbbbbbb now"):
        held.check(run, ["model", "rewards.dark"])


def test_a_trial_that_loads_another_commit_is_ended(tiny_run: MakeRun, tmp_path: Path) -> None:
    """Of a hub id that the driver has not cached. Another rank of the same model is compared, another model is not."""
    base = tiny_run(changes={"model.path": "someone/model", "storage": str(tmp_path)})
    other = override(base, {"model.path": "someone/else"})
    began = Contents({name: d for name, d in Contents.of(tiny_run()).digests.items() if name.startswith("prompts")})
    storage = Folder(tmp_path)
    (tmp_path / "tune").mkdir()
    for name, run, commit in (
        ("a", base, "1" * 40), ("b", override(base, {"model.lora.rank": 3}), "1" * 40), ("c", other, "2" * 40), ("d", base, "2" * 40),
    ):  # fmt: skip
        run_folder.begin(run, storage / name, began.joined({"model.path": commit}))
        (tmp_path / name / "checkpoint_000001").mkdir()
        check = partial(check_loaded, storage, name, run, began)
        reporting = _Reporting(None, 1, check)  # type: ignore[arg-type]  # no evaluation is reported here
        if name == "d":
            with pytest.raises(
                ConfigError, match=r"trial d has loaded something else than trial a: .*\n  model\.path = someone/model"
            ):
                reporting.row({"step": 0})
        else:
            reporting.row({"step": 0})
            reporting.row({"step": 1})
    held = run_folder.recorded(storage / "d")
    assert held is not None and held.digests == {**began.digests, "model.path": "1" * 40}  # what it must load when resumed
    assert (tmp_path / "a/checkpoint_000001").exists() and not (tmp_path / "d/checkpoint_000001").exists()
