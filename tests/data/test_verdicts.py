"""D3PO by people's labels: what they see is what is trained on, and labels that agree with a reward train the same."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import raydiff
from raydiff.config import ConfigError, Run, override
from raydiff.data import feedback, preferences
from raydiff.data.pieces import PairsError
from raydiff.data.verdicts import Verdicts
from raydiff.models.lora import WEIGHTS
from raydiff.preflight import faults
from raydiff.session import Session
from tests.test_contents import scaled
from tests.tiny import make_adapter

Make = Callable[..., Run]


@pytest.fixture
def by_people(tiny_run: Make, tmp_path: Path) -> Run:
    """D3PO on three pictures of each of four prompts, which two optimiser steps train on."""
    changes = {"sampler.eta": 1.0, "sampler.final_alpha": None, "method.attempts": 3, "method.minibatches": 2, "train.updates": 1,
               "method.source": "labels", "pairs.path": str(tmp_path / "labelled.parquet"), "evaluate.images": 2}  # fmt: skip
    return tiny_run("d3po", changes)


def label(drawn: Path, labelled: Path, prefer: Callable[[dict[str, Any]], float | None]) -> None:
    rows = [row for file in preferences.files(drawn) for row in pq.read_table(file).to_pylist()]
    for row in rows:
        row["label"] = prefer(row)
    pq.write_table(pa.Table.from_pylist(rows, preferences.schema()), labelled)


def blue(run: Run, file: bytes) -> float:
    pixels = torch.from_numpy(np.asarray(Image.open(io.BytesIO(file))).copy()).permute(2, 0, 1)[None] / 255
    return float(run.rewards.named["blue"].build("cpu")(pixels, ["a cat"]))


def test_labels_that_agree_with_the_reward_train_the_same_adapter(by_people: Run, tmp_path: Path) -> None:
    summary = feedback.to_label(by_people, tmp_path / "drawn")
    assert (summary.pairs, summary.files) == (12, 2)
    label(tmp_path / "drawn", tmp_path / "labelled.parquet",
          lambda row: float(blue(by_people, row["image_0"]) > blue(by_people, row["image_1"])))  # fmt: skip
    assert faults(by_people) == []
    by_reward = override(by_people, {"method.source": "rewards", "pairs.path": None})
    results = []
    for run in (by_people, by_reward):
        *_, last = raydiff.fit(run, folder=tmp_path / "adapter")
        results.append(
            ({k: last[k] for k in ("loss", "margin", "pairs_used", "grad_norm")}, load_file(tmp_path / "adapter" / WEIGHTS))
        )
    (metrics, adapter), (expected, theirs) = results
    assert metrics == expected and metrics["pairs_used"] == 1 and metrics["grad_norm"] > 0
    assert all(torch.equal(adapter[name], tensor) for name, tensor in theirs.items())


def test_a_picture_is_worth_the_share_of_its_comparisons(tmp_path: Path) -> None:
    """Two annotators, who disagree on the last pair; a tie is half, and a row that nobody looked at is none."""
    rows = [("a cat", 1, 2, 1.0), ("a cat", 1, 3, 0.5), ("a cat", 2, 3, 0.0), ("a cat", 2, 3, 1.0), ("a cat", 4, 1, None)]
    names = ("prompt", "seed_0", "seed_1", "label")
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    pq.write_table(preferences.table(columns, len(rows)), tmp_path / "p.parquet")
    verdicts = Verdicts.read(tmp_path / "p.parquet")
    assert verdicts.of(["a cat"] * 3, [1, 2, 3]).tolist() == pytest.approx([3 / 4, 1 / 3, 1 / 2])
    for prompt, seed in (("a cat", 4), ("a dog", 1)):
        with pytest.raises(PairsError, match=f"no label for '{prompt}', seed {seed}: label every picture"):
            verdicts.of([prompt], [seed])


def test_labels_of_other_pictures_are_refused_before_training(by_people: Run, tmp_path: Path) -> None:
    feedback.to_label(by_people, tmp_path / "drawn")
    (problem,) = faults(override(by_people, {"pairs.path": str(tmp_path / "drawn")}))
    assert "no row of 12 has a winner (0 ties) in column 'label'" in problem
    label(tmp_path / "drawn", tmp_path / "labelled.parquet", lambda row: 1.0)
    Session(by_people).prepare()
    with pytest.raises(PairsError, match="no label for '.*', seed .*keep the run's seed, prompts, batch.size"):
        Session(override(by_people, {"seed": 1})).prepare()
    label(tmp_path / "drawn", tmp_path / "labelled.parquet", lambda row: 0.7)
    with pytest.raises(PairsError, match=r"row 0: column 'label': 0.7 is none of 1, 0.5 and 0|no row of 12 has a winner"):
        Verdicts.read(tmp_path / "labelled.parquet")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.updates": 2}, r"train.updates = 2: method.source = \"labels\" allows one"),
        ({"pairs.path": None}, 'pairs.path is not set, and method.source = "labels" reads labels from it'),
        ({"method.source": "rewards"}, "pairs.path = .* is not used"),
        ({"method.preference": "pareto"}, 'method.preference = "pareto" compares several rewards'),
    ],
)
def test_settings_that_cannot_work(by_people: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        override(by_people, changes)


def test_only_d3po_has_pictures_to_label(tiny_run: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='method.source is not "labels"'):
        feedback.to_label(tiny_run("ddpo", {"sampler.eta": 1.0, "sampler.final_alpha": None}), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_pictures_to_label_are_not_gone_on_with_from_other_files(by_people: Run, tiny_pipeline: Path, tmp_path: Path) -> None:
    """Prompts of the same file's name, and an adapter of the same folder's."""
    adapter = make_adapter(tiny_pipeline, tmp_path / "adapter")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    run = override(by_people, {"prompts.train": str(prompts), "model.adapters": [str(adapter)]})
    assert feedback.to_label(run, tmp_path / "drawn").made == 2
    for file, field in ((prompts, r"contents\.prompts\.train"), (adapter / WEIGHTS, r"contents\.model\.adapters\.0")):
        kept = file.read_bytes()
        scaled(file) if file == adapter / WEIGHTS else file.write_text("a cat\nan owl\n")
        with pytest.raises(PairsError, match=f"made from other settings: {field} = "):
            feedback.to_label(run, tmp_path / "drawn")
        file.write_bytes(kept)
    assert feedback.to_label(run, tmp_path / "drawn").made == 0
