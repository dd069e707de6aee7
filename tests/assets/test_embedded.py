"""The embedded model as it ships: complete, offline, within its size, and as good as its card says."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer

from raydiff import assets
from raydiff.assets.recipe.evaluate import Models, load_models, measure_generated, random_subjects
from raydiff.assets.recipe.words import COLOURS, NAMES, STYLES, held_out_prompts, train_prompts


@pytest.fixture(scope="module")
def models() -> Iterator[Models]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield load_models(assets.EMOJI)
    torch.set_num_threads(threads)


def test_naming_an_asset_imports_neither_torch_nor_diffusers() -> None:
    check = "import sys, raydiff.assets as a; a.prompts('train'); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_unknown_names_are_refused_with_what_there_is() -> None:
    with pytest.raises(ValueError, match="no embedded component 'clap'; there are pipeline, clip"):
        assets.path("clap")
    with pytest.raises(ValueError, match="'train' and 'held_out'"):
        assets.prompts("test")  # type: ignore[arg-type]


@pytest.mark.parametrize("component", assets.COMPONENTS)
def test_components_are_in_place(component: str) -> None:
    assert assets.path(component).exists()


def test_weights_are_float16_safetensors_under_20_megabytes() -> None:
    files = [file for file in assets.EMOJI.rglob("*") if file.is_file()]
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 7  # unet, vae, text encoder, clip, head, two judges
    assert all(value.dtype != torch.float32 for file in weights for value in load_file(file).values())
    assert sum(file.stat().st_size for file in files) < 20e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]


def test_licences_are_named() -> None:
    notice = (assets.EMOJI.parent / "NOTICE").read_text()
    for work in ("Microsoft", "Google", "Mozilla", "Miles Johnson", "Permission is hereby granted", "Apache License"):
        assert work in notice
    assert "MIT" in (assets.EMOJI / "MODEL_CARD.md").read_text()


def test_models_load_in_float32_and_fit_together(models: Models) -> None:
    pipeline = models.pipeline
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, models.clip)} == {torch.float32}
    assert pipeline.tokenizer.model_max_length == 24 == pipeline.text_encoder.config.max_position_embeddings
    assert pipeline.unet.config.in_channels == pipeline.vae.config.latent_channels
    assert pipeline.scheduler.config.clip_sample is False
    assert tuple(models.classifier.config.id2label.values()) == NAMES
    assert tuple(models.style_classifier.config.id2label.values()) == STYLES


@pytest.mark.parametrize("component", ["clip", "classifier", "style_classifier"])
def test_processors_load(component: str) -> None:
    processor = AutoImageProcessor.from_pretrained(assets.path(component))
    pixels = processor(torch.zeros(3, 64, 64, dtype=torch.uint8).numpy(), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.unique().tolist() == [-1.0]


def test_clip_and_pipeline_share_their_tokenizer() -> None:
    text = "a hedgehog in 3d style on an orange background"
    ids = [AutoTokenizer.from_pretrained(assets.path("clip"))(text).input_ids]
    ids.append(AutoTokenizer.from_pretrained(assets.path("pipeline") / "tokenizer")(text).input_ids)
    assert ids[0] == ids[1]
    assert len(ids[0]) == 12  # one token a word, two for "3d", between start and end


def test_prompts_and_names_are_those_of_the_recipe_and_disjoint() -> None:
    train, held_out = assets.prompts("train"), assets.prompts("held_out")
    assert train == list(train_prompts())
    assert held_out == list(held_out_prompts())
    assert not set(train) & set(held_out)
    names = json.loads(assets.path("names.json").read_text())
    assert tuple(names["names"]) == NAMES
    assert {colour: tuple(rgb) for colour, rgb in names["colours"].items()} == COLOURS
    assert len(names["held_out"]["styles"]) + len(names["held_out"]["colours"]) == len(held_out)


def test_measured_figures_meet_their_targets() -> None:
    metrics = json.loads((assets.EMOJI / "metrics.json").read_text())
    assert metrics["vae"]["psnr"] >= 27
    assert metrics["generated"]["samples"] >= 512
    assert metrics["generated"]["top1"] >= 0.9
    assert metrics["generated"]["background"] >= 0.8


def test_fresh_samples_show_what_their_prompts_say(models: Models) -> None:
    with torch.no_grad():
        measured = measure_generated(models, random_subjects(len(NAMES), seed=7))
    assert measured["top1"] >= 0.8
    assert measured["clip_top1"] >= 0.7
    assert measured["background"] >= 0.7
