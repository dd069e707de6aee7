"""A reward's weights that are not those of its network are refused before a run starts, and when it is built."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.rewards.conftest import plugin_of

Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("clip", lambda t: {f"foreign.{k}": v for k, v in t.items()}, "lack logit_scale.*the network has no foreign."),
        ("clip", lambda t: {k: v for k, v in t.items() if "layers.1.mlp" not in k}, "lack text_model.encoder.layers.1.mlp"),
        ("clip", lambda t: {**t, "vision_model.extra.weight": torch.zeros(3)}, "the network has no vision_model.extra.weight"),
        ("clip", lambda t: {k: v[:-1].clone() if k == "visual_projection.weight" else v for k, v in t.items()}, "should be"),
        ("classifier", lambda t: {k: v for k, v in t.items() if "classifier" not in k}, "lack classifier"),
        ("classifier", lambda t: {**t, "head.weight": torch.zeros(2)}, "the network has no head.weight"),
        ("classifier", lambda t: {k: v[:-1].clone() if k.endswith("1.weight") and "classifier" in k else v
                                  for k, v in t.items()}, "classifier.1.weight is"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(
    kind: str, change: Callable[[Tensors], Tensors], message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(f"{kind}_folder"), tmp_path / "copy"))
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    for use in ("preflight", "build"):
        with pytest.raises(ValueError, match=message):
            getattr(plugin_of(kind=kind, model=str(folder)), use)()


def test_a_config_of_fewer_layers_is_no_way_to_drop_some(clip_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(clip_folder, tmp_path / "copy"))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the network has no vision_model.encoder.layers.1"):
        plugin_of(kind="clip", model=str(folder)).preflight()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if ".2." not in k}, "layers.0.weight is .* and layers.4 takes"),
        (lambda t: {k: v for k, v in t.items() if ".7." not in k}, "the end takes 1 numbers"),
        (lambda t: {k: v[:-1] if k == "layers.4.bias" else v for k, v in t.items()}, "layers.4.weight is"),
        (lambda t: [*t.values()], "it holds a list"),
    ],
)
def test_a_head_with_a_layer_out_of_place_is_refused(clip_folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    sizes = {0: (12, 16), 2: (8, 12), 4: (6, 8), 6: (4, 6), 7: (1, 4)}
    head = {f"layers.{n}.weight": torch.ones(shape) for n, shape in sizes.items()}
    head |= {f"layers.{n}.bias": torch.ones(shape[0]) for n, shape in sizes.items()}
    torch.save(change(head), tmp_path / "head.pth")
    with pytest.raises(ValueError, match=message):
        plugin_of(kind="aesthetic", model=str(clip_folder), head=str(tmp_path / "head.pth")).preflight()
