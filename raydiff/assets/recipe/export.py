"""From the work folder to the folders that ship: float16 weights, and configs that load them as float32."""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ResNetForImageClassification

from raydiff.assets.recipe.diffusion import new_scheduler
from raydiff.assets.recipe.pictures import PIXELS
from raydiff.assets.recipe.words import (
    COLOURS,
    NAMES,
    STYLE_ORDER,
    STYLES,
    held_out_pairs,
    held_out_prompts,
    styles_of,
    train_prompts,
)


def export(work: Path, target: Path) -> None:
    export_pipeline(work, target / "pipeline")
    export_model(CLIPModel.from_pretrained(work / "clip"), target / "clip")
    copy_tokenizer(work, target / "clip")
    write_preprocessor(target / "clip", "CLIPImageProcessor")
    for judge in ("classifier", "style_classifier"):
        export_model(ResNetForImageClassification.from_pretrained(work / judge), target / judge)
        write_preprocessor(target / judge, "ViTImageProcessor")
    (target / "aesthetic").mkdir(parents=True, exist_ok=True)
    head = load_file(work / "aesthetic/model.safetensors")
    save_file({key: value.half() for key, value in head.items()}, target / "aesthetic/model.safetensors")
    write_words(target)


def export_pipeline(work: Path, folder: Path) -> None:
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(work / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(work / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(work / "unet"),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.to(torch.float16).save_pretrained(folder)
    load_as_float32(folder / "text_encoder")
    copy_tokenizer(work, folder / "tokenizer")
    drop_local_paths(folder)


def export_model(model: CLIPModel | ResNetForImageClassification, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    model.half().save_pretrained(folder)
    load_as_float32(folder)


def load_as_float32(folder: Path) -> None:
    """transformers loads in the dtype that the config names; float16 is slow on a CPU and wrong for training."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part:
            part["dtype"] = "float32"
    write_json(file, config)


def copy_tokenizer(work: Path, folder: Path) -> None:
    shutil.copytree(work / "tokenizer", folder, dirs_exist_ok=True)


def drop_local_paths(folder: Path) -> None:
    """diffusers writes where a part was loaded from into its config."""
    for file in (*folder.glob("*/config.json"), folder / "model_index.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        write_json(file, config)


def write_preprocessor(folder: Path, kind: str) -> None:
    size = {"height": PIXELS, "width": PIXELS}
    preprocessor = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": {"shortest_edge": PIXELS} if kind == "CLIPImageProcessor" else size,
        "resample": 3,
        "do_center_crop": kind == "CLIPImageProcessor",
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)


def write_words(target: Path) -> None:
    """names.json and the prompts."""
    words = {
        "names": {name: styles_of(name) for name in NAMES},
        "styles": STYLES,
        "style_order": STYLE_ORDER,
        "colours": COLOURS,
        "held_out": {
            "styles": [(name, style) for name in NAMES for style in held_out_pairs(name)[0]],
            "colours": [(name, colour) for name in NAMES for colour in held_out_pairs(name)[1]],
        },
    }
    write_json(target / "names.json", words)
    (target / "prompts").mkdir(parents=True, exist_ok=True)
    for split, prompts in (("train", train_prompts()), ("held_out", held_out_prompts())):
        (target / "prompts" / f"{split}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def write_json(file: Path, value: dict) -> None:
    file.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
