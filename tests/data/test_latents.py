"""The latent cache: what a record is, that it is made once and shared out, and that it is never held whole."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raydiff.config import Pairs
from raydiff.data import latents, preferences
from raydiff.data.latents import Cache, fitted, prepare
from raydiff.data.pieces import PairsError
from raydiff.models.stable_diffusion import Plugin
from tests.data import shards

Model = Any


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path) -> Model:
    return Plugin.model_validate({"path": str(tiny_pipeline), "lora": {"rank": 2}}).build()


def encode(path: Path, model: Model, **fields: Any) -> latents.Latents:
    return prepare(Pairs(path=str(path), **fields), model, 8)


def seeds(rows: int, start: int = 0) -> torch.Tensor:
    return torch.arange(2 * rows).view(rows, 2) + 1000 * start


def pixels(pair: preferences.Pair, side: int) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pair.images[side]).copy()).permute(2, 0, 1)[None] / 255


def test_reads_are_draws_from_the_posterior_by_the_rows_seed(tmp_path: Path, model: Model) -> None:
    shards.pairs(tmp_path / "p.parquet", 20)
    cached = encode(tmp_path / "p.parquet", model)
    assert len(cached) == 20
    pairs = list(preferences.read(tmp_path / "p.parquet"))
    drawn = torch.stack([cached.read([7], seeds(1, s))[0] for s in range(400)])[:, 0]  # (400,2,C,h,w)
    for side in (0, 1):
        posterior = model.pipe.vae.encode(pixels(pairs[7], side) * 2 - 1).latent_dist
        scale = model.pipe.vae.config.scaling_factor
        z = (drawn[:, side] - posterior.mean * scale) / (posterior.std * scale)
        assert abs(float(z.mean())) < 0.02 and float(z.std()) == pytest.approx(1, abs=0.02)
    again, rewards, prompts = cached.read([7, 3], seeds(2))
    assert torch.equal(again, cached.read([7, 3], seeds(2))[0])
    assert not torch.equal(again, cached.read([7, 3], seeds(2, 1))[0])
    assert torch.equal(again[1], cached.read([3], seeds(2)[1:])[0][0])  # whatever comes with it
    assert prompts == (pairs[7].prompt, pairs[3].prompt)
    assert rewards.tolist() == [[pairs[i].label, 1 - pairs[i].label] for i in (7, 3)]


def test_a_mirrored_pair_is_the_posterior_of_the_mirrored_pictures(tmp_path: Path) -> None:
    model = Shrinking()
    file = shards.pairs(tmp_path / "p.parquet", 2, size=(48, 48))
    cached = encode(file, model, flip=True)
    pair, _ = preferences.read(file)
    mirrored = []
    for s in range(40):
        drawn = cached.read([0], seeds(1, s))[0][0]
        means = [[model.posterior(x)[0][0] for x in (pixels(pair, side), pixels(pair, side).flip(-1))] for side in (0, 1)]
        far = [[float((drawn[side] - mean).square().mean().sqrt()) for mean in means[side]] for side in (0, 1)]
        assert all(min(side) == pytest.approx(0.01, rel=0.2) and max(side) > 0.02 for side in far)
        assert (far[0][0] > far[0][1]) == (far[1][0] > far[1][1])  # both sides alike
        mirrored.append(far[0][0] > far[0][1])
    assert 8 < sum(mirrored) < 32


def test_pictures_are_scaled_by_their_shorter_side_and_cut_from_the_centre() -> None:
    ramp = np.linspace(0, 255, 64)
    wide = np.stack([np.broadcast_to(ramp, (32, 64))] * 3, -1).astype(np.uint8)
    for image in (wide, wide.transpose(1, 0, 2)):
        out = fitted(Image.fromarray(image), 16, False)
        assert out.shape == (3, 16, 16)
        line = out[0, 8] if image is wide else out[0, :, 8]
        assert line[0].item() == pytest.approx(ramp[16:18].mean() / 255, abs=0.01)
        assert line[-1].item() == pytest.approx(ramp[46:48].mean() / 255, abs=0.01)
    theirs = Image.fromarray(wide).resize((32, 16), Image.Resampling.BILINEAR).crop((8, 0, 24, 16))
    ours = (fitted(Image.fromarray(wide), 16, False) * 255).permute(1, 2, 0).numpy()
    assert np.abs(ours - np.asarray(theirs, float)).max() < 1.5  # PIL rounds
    same = fitted(Image.fromarray(wide[:16, :16]), 16, False)
    assert torch.equal(same, torch.from_numpy(wide[:16, :16].copy()).permute(2, 0, 1) / 255)


def test_the_cache_is_made_once_and_anew_for_other_pairs_model_or_size(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shards.pairs(tmp_path / "p.parquet", 6)
    cached = encode(file, model)
    monkeypatch.setattr(Cache, "make", lambda *_: pytest.fail("encoded again"))
    assert encode(file, model).folder == cached.folder
    assert cached.folder.parent == tmp_path / "p.parquet.latents"
    monkeypatch.undo()
    folders = {cached.folder, encode(file, model, flip=True).folder, encode(file, model, cache=str(tmp_path / "c")).folder}
    with torch.no_grad():
        weight = model.pipe.vae.quant_conv.weight
        weight += 1
        folders.add(encode(file, model).folder)
        weight -= 1
    shards.pairs(file, 6, seed=1)
    folders.add(encode(file, model).folder)
    assert len(folders) == 5


def test_workers_share_the_pieces_and_an_interrupted_one_goes_on(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = shards.pairs(tmp_path / "p.parquet", 300)
    config = Pairs(path=str(file), cache=str(tmp_path / "one"))
    monkeypatch.setattr(latents, "_ROWS", 64)
    alone = prepare(config, model, 8)
    two = Pairs(path=str(file), cache=str(tmp_path / "two"))
    cache = Cache(two, model, 8)
    assert [piece.stop - piece.start for piece in cache.missing()] == [64] * 4 + [44]
    made: list[str] = []
    real = Cache.make

    def counted(self: Cache, piece: latents.Piece) -> Any:
        made.append(piece.name)
        return real(self, piece)

    monkeypatch.setattr(Cache, "make", counted)
    for piece in cache.missing()[:2]:
        cache.make(piece)
    # Rank 1 of two, whose other rank answers nothing: it makes each second piece of the three that are missing.
    with pytest.raises(PairsError, match=r"has no index.parquet here; give a folder on a disk that every worker sees"):
        prepare(two, model, 8, rank=1, workers=2, gather=lambda value: [value])
    assert len(made) == 3
    told: list[tuple[int, int]] = []
    whole = prepare(two, model, 8, told=lambda *n: told.append(n))
    assert len(made) == len(set(made)) == 5 and told == [(0, 2), (1, 2)]
    everyone = list(range(300))
    assert torch.equal(whole.read(everyone, seeds(300))[0], alone.read(everyone, seeds(300))[0])
    assert not list(whole.folder.glob(".*"))


def test_small_pictures_are_left_out_with_their_size_or_enlarged(tmp_path: Path, model: Model) -> None:
    small, large = (shards.picture(shards.BLUE, 0, size, "PNG") for size in ((16, 10), (30, 18)))
    file = shards.pairs(tmp_path / "p.parquet", 4, image_0=[large, small, large, large], label=[1.0, 1.0, 0.5, 0.0])
    cached = encode(file, model)
    assert len(cached) == 2  # row 1 is too small, row 2 a tie
    (listed,) = [json.loads(line) for line in (cached.folder / "bad_rows.jsonl").read_text().splitlines()]
    assert listed["row"] == 1 and "a picture of 16 × 10 pixels is smaller than the model's 16 × 16" in listed["reason"]
    assert "pairs.enlarge = true" in listed["reason"]
    assert len(encode(file, model, enlarge=True)) == 3
    with pytest.raises(
        PairsError, match=r"pairs.max_bad_rows = 0: already 1 rows cannot be used, the first: .*row 1: a picture"
    ):
        encode(file, model, max_bad_rows=0, cache=str(tmp_path / "none"))
    assert not list((tmp_path / "none").rglob("index.parquet")) and not list((tmp_path / "none").rglob("*.draft"))


def test_pairs_that_are_all_too_small_make_no_cache(tmp_path: Path, model: Model) -> None:
    file = shards.pairs(tmp_path / "p.parquet", 3, size=(8, 8))
    with pytest.raises(PairsError, match=r"no pair can be used; .*bad_rows.jsonl says why"):
        encode(file, model)


def test_a_cache_that_is_cut_short_is_told(tmp_path: Path, model: Model) -> None:
    cached = encode(shards.pairs(tmp_path / "p.parquet", 3), model)
    (data,) = cached.folder.glob("*.f32")
    data.write_bytes(data.read_bytes()[:-4])
    assert len(cached.read([0, 1], seeds(2))[0]) == 2
    with pytest.raises(PairsError, match=r"is cut short; delete its folder"):
        cached.read([2], seeds(1))


class Shrinking:
    """An encoder that only averages: latents of (4,24,24) from 48 pixels, as fast as its pictures are decoded."""

    device = torch.device("cpu")
    latent_shape = (4, 24, 24)
    picture_size = 48

    def posterior(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = torch.nn.functional.avg_pool2d(images, 2).mean(1, keepdim=True).expand(-1, 4, -1, -1)
        return mean, torch.full_like(mean, 0.01)

    def encoder_digest(self) -> str:
        return "shrinking"


def memory(folder: str, pairs: int) -> None:
    """Encode and read, in a process of its own: prints its peak of resident memory in each phase, in MiB."""

    def resident(name: str) -> float:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) / 1024

    def growth(work: Callable[[], Any]) -> tuple[Any, float]:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        return work(), resident("VmHWM") - before

    def read() -> None:
        order = torch.randperm(pairs, generator=torch.Generator().manual_seed(0)).tolist()
        for start in range(0, pairs, 8):
            cached.read(order[start : start + 8], seeds(8))

    torch.set_num_threads(1)
    model, file = Shrinking(), Path(folder) / "p.parquet"
    encode(shards.pairs(Path(folder) / "warm.parquet", 70, size=(48, 48)), model)
    cached, encoding = growth(lambda: prepare(Pairs(path=str(file)), model, 64))  # type: ignore[arg-type]
    _, reading = growth(read)
    sizes = {"file": file.stat().st_size, "latents": sum(f.stat().st_size for f in cached.folder.glob("*.f32"))}
    print(json.dumps({"pairs": len(cached), "encoding": encoding, "reading": reading, "resident": resident("VmRSS"),
                      **{name: size / 2**20 for name, size in sizes.items()}}))  # fmt: skip


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")
def test_ten_thousand_pairs_pass_through_a_process_that_holds_none(tmp_path: Path) -> None:
    """All encoded, and all read in random order: held whole, or in mapped files, either would show many times over."""
    count = 10_000
    table = pq.read_table(shards.pairs(tmp_path / "p.parquet", 50, size=(48, 48)))
    rows = pa.concat_tables([table] * (count // 50))
    pq.write_table(rows, tmp_path / "p.parquet", row_group_size=1000, compression="none", use_dictionary=False)
    code = f"from tests.data.test_latents import memory; memory({str(tmp_path)!r}, {count})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    print(found)
    assert found["pairs"] == count and found["latents"] > 350 and found["file"] > 100
    assert found["encoding"] < 80 and found["reading"] < 30
    assert found["resident"] < 2048


def test_the_cache_says_no_model_fits(tiny_run: Callable[..., Any], tmp_path: Path) -> None:
    """A pairs file is looked at before anything is loaded."""
    from raydiff.config import override
    from raydiff.preflight import faults

    run = tiny_run("sft", {"method.source": "dataset", "pairs.path": str(tmp_path / "none.parquet")})
    assert [fault for fault in faults(run) if fault.startswith("pairs.path = ") and "there is no Parquet file" in fault]
    file = shards.pairs(tmp_path / "p.parquet", 3, label=None)
    assert [fault for fault in faults(override(run, {"pairs.path": str(file)})) if "there is no column 'label'" in fault]


def by_path(folder: Path, structs: bool = False) -> Path:
    """Pairs whose pictures are files beside them."""
    folder.mkdir()
    for n in range(3):
        for side, rgb in enumerate((shards.BLUE, shards.RED)):
            (folder / f"{n}-{side}.png").write_bytes(shards.picture(rgb, n, (16, 16), "PNG"))
    names = [[f"{n}-{side}.png" for n in range(3)] for side in (0, 1)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [pa.array([{"bytes": None, "path": n} for n in some], kind) if structs else some for some in names]
    return shards.pairs(folder / "p.parquet", 3, image_0=cells[0], image_1=cells[1], label=[1.0] * 3, x=None)


@pytest.mark.parametrize("structs", [False, True], ids=["paths", "structs"])
def test_a_picture_that_is_mended_on_the_disk_is_encoded_anew(tmp_path: Path, model: Model, structs: bool) -> None:
    file = by_path(tmp_path / "data", structs)
    first = encode(file, model)
    assert encode(file, model).folder == first.folder
    (tmp_path / "data/1-0.png").write_bytes(shards.picture(shards.RED, 9, (16, 16), "PNG"))
    mended = encode(file, model)
    assert mended.folder != first.folder
    old, new = (cache.read([0, 1, 2], seeds(3))[0] for cache in (first, mended))
    assert torch.equal(old[0], new[0]) and torch.equal(old[1, 1], new[1, 1]) and not torch.equal(old[1, 0], new[1, 0])


def test_a_picture_that_comes_later_and_a_touched_one_are_seen(tmp_path: Path, model: Model) -> None:
    file = by_path(tmp_path / "data")
    kept = (tmp_path / "data/2-1.png").read_bytes()
    (tmp_path / "data/2-1.png").unlink()
    folders = [encode(file, model).folder]
    assert len(encode(file, model)) == 2
    (tmp_path / "data/2-1.png").write_bytes(kept)
    assert len(encode(file, model)) == 3
    folders.append(encode(file, model).folder)
    os.utime(tmp_path / "data/0-0.png", ns=(0, 0))  # same size, other time
    folders.append(encode(file, model).folder)
    assert len(set(folders)) == 3


def test_what_changes_while_it_is_encoded_is_told(tmp_path: Path, model: Model) -> None:
    file = by_path(tmp_path / "data")
    cache = Cache(Pairs(path=str(file)), model, 8)
    for piece in cache.missing():
        cache.make(piece)
    os.utime(tmp_path / "data/0-0.png", ns=(0, 0))
    with pytest.raises(PairsError, match=r"pairs.path = .*: files of it changed while they were encoded; start again"):
        cache.finish()
    assert not (cache.folder / "index.parquet").exists()


def test_pictures_by_path_lie_below_the_datasets_folder_unless_allowed(tmp_path: Path, model: Model) -> None:
    by_path(tmp_path / "data")
    (tmp_path / "data" / "inner").mkdir()
    for name in ("inner/p.parquet", "../p.parquet"):
        here = "../" if name.startswith("inner") else "data/"
        table = pq.read_table(tmp_path / "data" / "p.parquet").to_pydict()
        table |= {f"image_{side}": [f"{here}{n}-{side}.png" for n in range(3)] for side in (0, 1)}
        pq.write_table(pa.table(table), tmp_path / "data" / name)
    (tmp_path / "data" / "p.parquet").unlink()
    assert len(encode(tmp_path / "data", model)) == 3  # inner/p.parquet goes up, and stays in the dataset
    assert len(encode(tmp_path / "p.parquet", model)) == 3
    with pytest.raises(PairsError, match="no pair can be used"):
        encode(tmp_path / "data" / "inner", model)
    (listed, *_) = (tmp_path / "data").glob("inner.latents/*/bad_rows.jsonl")
    assert "'../0-0.png' lies outside of the dataset's folder" in json.loads(listed.read_text().splitlines()[0])["reason"]
    assert len(encode(tmp_path / "data" / "inner", model, outside=True)) == 3


def test_pictures_are_encoded_upright_and_on_white(tmp_path: Path, model: Model) -> None:
    """A turned JPEG-like file and a transparent one give the latents of what a viewer shows."""
    rng = np.random.default_rng(0)
    plain = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
    exif, veil = Image.Exif(), Image.fromarray(rng.integers(0, 2, (16, 16), np.uint8) * 255)
    exif[274] = 6
    veiled, files = plain.copy(), {}
    veiled.putalpha(veil)
    white = Image.composite(plain, Image.new("RGB", (16, 16), "white"), veil)
    turned = plain.rotate(90)
    for name, picture, options in (
        ("plain", plain, {}),
        ("turned", turned, {"exif": exif}),
        ("veiled", veiled, {}),
        ("white", white, {}),
    ):
        out = io.BytesIO()
        picture.save(out, "PNG", **options)
        files[name] = out.getvalue()
    rows = {"image_0": [files["plain"], files["turned"]], "image_1": [files["white"], files["veiled"]]}
    cached = encode(shards.pairs(tmp_path / "p.parquet", 2, label=[1.0, 1.0], **rows), model)
    latents_of = cached.read([0, 1], seeds(1).repeat(2, 1))[0]
    assert torch.equal(latents_of[0], latents_of[1])
