"""A picture of (weights, prompt, seed, sampler) is one picture: whoever draws it, byte for byte."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from raydiff import generate, local, sampling
from raydiff.config import Run, Sampler
from raydiff.contents import Contents
from raydiff.core.denoise import mix
from raydiff.distributed import generate_batch
from raydiff.distributed.batch import Output
from raydiff.distributed.storage import Folder
from raydiff.evaluate import Judge
from raydiff.generate import Adapter
from raydiff.session import Session

Make = Callable[..., Run]
STEPS = [1, 4, 7, 10, 15]  # of which diffusers' DDIM walks 1, 4 and 10 as it should
SPACINGS = ["leading", "trailing", "linspace"]
HELD_OUT = ["a pig", "a cow"]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def trained(
    request: pytest.FixtureRequest, tiny_run: Make, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Run, Session, Path]:
    """A run whose adapter has moved far from nothing, and what it exported."""
    evaluate = {"images": 2, "batch": 2, "drift_images": 0, "clip": None}
    run = tiny_run(changes={"model.dtype": request.param, "prompts.held_out": HELD_OUT, "evaluate": evaluate})
    session, folder = Session(run), tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in session.model.trained().values():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    local.export(session, folder)
    return run, session, folder


def grids(spacing: str) -> Iterator[Sampler]:
    for steps in STEPS:
        for eta in (0.0, 1.0):
            yield Sampler.model_validate({"steps": steps, "spacing": spacing, "eta": eta, "guidance": 2.0, "final_alpha": None})


def of_the_trainer(session: Session, sampler: Sampler) -> np.ndarray:
    """An evaluation during training, (P,H,W,3) uint8."""
    session.judge = sampling.policy(session.model, sampler, session.judge.score)
    return np.stack([p.image.permute(1, 2, 0).numpy() for p in session.evaluate()])


def of_generate(run: Run, sampler: Sampler, adapter: Adapter, pairs: list[tuple[str, int]]) -> np.ndarray:
    drawn = generate.of_pairs(generate.load(run.model, [adapter]), pairs, sampler, batch=2)
    return np.stack([np.array(sample.image) for sample in drawn])


def of_evaluate(run: Run, sampler: Sampler, adapter: Adapter, pairs: list[tuple[str, int]]) -> np.ndarray:
    judge = Judge(run.model_copy(update={"sampler": sampler}), "cpu")
    drawn = judge.draw([adapter], pairs, lambda items, *_: items, "adapter")
    return np.stack([p.image.permute(1, 2, 0).numpy() for p in drawn])


def of_the_batch_tool(run: Run, sampler: Sampler, adapter: Adapter, pairs: list[tuple[str, int]], folder: Path) -> np.ndarray:
    """What a pool's actor writes: each prompt with each seed, of which those that are asked for are taken."""
    prompts, seeds = zip(*pairs, strict=True)
    output = Output(Folder(str(folder)).uri, "", ".parquet")
    _, digest = generate_batch._counted(iter(prompts), len(pairs))
    generate_batch._copy(iter(prompts), output, len(pairs), digest)
    made_of = generate.origin(run.model, sampler, [adapter])
    recipe = generate_batch.Recipe(run.model, sampler, (adapter,), seeds, 2, made_of, None)
    data, bad = generate_batch.Generator(output, recipe, len(pairs), Contents({}).dump(), "cpu").make(0, list(prompts), {})
    assert not bad
    rows = pq.read_table(io.BytesIO(data)).to_pylist()
    files = {(row["prompt"], row["seed"]): row["image"] for row in rows}
    return np.stack([np.array(Image.open(io.BytesIO(files[pair]))) for pair in pairs])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_all_commands_draw_the_trainers_picture(
    trained: tuple[Run, Session, Path], spacing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, session, folder = trained
    adapter = Adapter(str(folder))
    loaded = generate.load(run.model, [adapter])
    monkeypatch.setattr(generate, "load", lambda *_: loaded)  # once, as it takes longer than to draw with it
    pairs = [(prompt, mix(run.evaluate.seed, i)) for i, prompt in enumerate(HELD_OUT)]
    for sampler in grids(spacing):
        seen = of_the_trainer(session, sampler)
        assert seen.std() > 1
        assert (of_generate(run, sampler, adapter, pairs) == seen).all(), sampler
        assert (of_evaluate(run, sampler, adapter, pairs) == seen).all(), sampler
        where = tmp_path / f"{sampler.steps}-{sampler.eta}.parquet"
        assert (of_the_batch_tool(run, sampler, adapter, pairs, where) == seen).all(), sampler
