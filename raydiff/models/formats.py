"""Which pipeline folders are Stable Diffusion as raydiff runs it: the classes and config fields that are supported, and why a
folder is refused."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raydiff.core.schedule import Schedule, is_flow
from raydiff.models import checkpoint
from raydiff.models.checkpoint import read_json

STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
"""The parts with weights, each with its files' stem."""

SCHEDULERS = (
    "DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler", "LMSDiscreteScheduler",
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler",
    "UniPCMultistepScheduler", "SASolverScheduler", "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip
"""Those whose betas, or shift, say all of the process that the network learned; they share it, whatever their own steps."""

CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": SCHEDULERS,
}
_UNUSED = {"safety_checker", "feature_extractor", "image_encoder"}

_ONLY: dict[str, dict[str, Any]] = {  # fields that change what a part is or wants, with the only value that is supported
    "unet": {
        "addition_embed_type": None, "attention_type": "default", "class_embed_type": None, "dual_cross_attention": False,
        "encoder_hid_dim": None, "encoder_hid_dim_type": None, "num_class_embeds": None, "time_cond_proj_dim": None,
    },
    "vae": {
        "in_channels": 3, "out_channels": 3, "latents_mean": None, "latents_std": None, "shift_factor": None,
        "use_quant_conv": True, "use_post_quant_conv": True,
    },
    "text_encoder": {"model_type": "clip_text_model", "quantization_config": None},
    "scheduler": {
        "thresholding": False, "timestep_type": "discrete", "use_flow_sigmas": False, "use_dynamic_shifting": False,
        "shift_terminal": None, "stochastic_sampling": False,
    },
}  # fmt: skip


def check_index(index: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the class, unless a model_index.json is that of a StableDiffusionPipeline with known parts."""
    if (kind := index.get("_class_name")) != "StableDiffusionPipeline":
        raise ValueError(f"model_index.json: _class_name = {kind!r} is not supported; only 'StableDiffusionPipeline' is")
    for part, entry in index.items():
        if not isinstance(entry, list):
            continue
        name = entry[-1] if entry else None
        if part not in {*CLASSES, *_UNUSED} and name is not None:
            raise ValueError(f"model_index.json: {part} = {name!r} is no part of a StableDiffusionPipeline")
        if part in CLASSES and (name not in CLASSES[part] or entry[0] not in ("diffusers", "transformers")):
            name = name if name not in CLASSES[part] else f"{entry[0]}.{name}"
            raise ValueError(f"model_index.json: {part} = {name!r} is not supported; {_one_of(CLASSES[part])} is")
    if missing := [part for part in CLASSES if part not in index]:
        raise ValueError(f"model_index.json: {missing[0]} is missing")


def complete(folder: Path, variant: str | None = None) -> bool:
    """Whether a pipeline folder, a snapshot of the hub's, has every file that is loaded; broken ones count."""
    try:
        _files(folder)
        _weights(folder, variant)
    except FileNotFoundError:
        return False
    except ValueError:
        return True
    return True


def check_folder(folder: Path, variant: str | None = None) -> None:
    """Raise FileNotFoundError or ValueError, naming the file and the field or tensor, for what is missing, broken or not
    supported in a pipeline folder. Reads configs and the headers of weights."""
    if (folder / "model_index.json").is_file():  # another kind of pipeline has other files
        check_index(read_json(folder / "model_index.json"))
    _files(folder)
    weights = _weights(folder, variant)
    scheduler_config(folder)
    parts = networks(folder)
    for part in ("unet", "vae"):
        checkpoint.compare(weights[part], parts[part])
    checkpoint.compare_transformers(weights["text_encoder"], type(parts["text_encoder"]), parts["text_encoder"].config)
    _check_tokenizer(folder / "tokenizer", parts["text_encoder"].config)


def _files(folder: Path) -> None:
    """Raise FileNotFoundError for a config or a vocabulary that is missing."""
    configs = ["scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", *(f"{part}/config.json" for part in STEMS)]
    for missing in [file for file in ["model_index.json", *configs] if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{missing} is missing; it must be a diffusers pipeline folder")
    if not (folder / "tokenizer" / "tokenizer.json").is_file():
        for missing in [name for name in ("vocab.json", "merges.txt") if not (folder / "tokenizer" / name).is_file()]:
            raise FileNotFoundError(f"tokenizer/{missing} is missing")


def _weights(folder: Path, variant: str | None) -> dict[str, checkpoint.Weights]:
    found = {part: checkpoint.of_folder(folder / part, stem, variant) for part, stem in STEMS.items()}
    if variant and all(weights.variant is None for weights in found.values()):
        raise ValueError(f"variant = {variant!r}: no part has weights of that name; leave model.variant out")
    return found


def networks(folder: Path) -> dict[str, Any]:
    """unet, vae and text_encoder of a pipeline folder on the meta device: shapes without weights.

    Raises ValueError for a config that is not supported, FileNotFoundError when there is none.
    """
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    configs = {part: read_json(folder / part / "config.json") for part in STEMS}
    _check_class("vae", configs["vae"], AutoencoderKL)
    text = configs["text_encoder"]
    _check_fields("text_encoder", text)
    if (kinds := text.get("architectures")) and "CLIPTextModel" not in kinds:
        raise ValueError(f"text_encoder/config.json: architectures = {kinds!r} is not supported; 'CLIPTextModel' is")
    with torch.device("meta"):
        unet = unet_of(configs["unet"])
        vae = AutoencoderKL.from_config(configs["vae"])
        text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(text))
    for field, given, wanted, of in (
        ("in_channels", unet.config.in_channels, vae.config.latent_channels, "vae's latent_channels"),
        ("out_channels", unet.config.out_channels, vae.config.latent_channels, "vae's latent_channels"),
        ("cross_attention_dim", unet.config.cross_attention_dim, text_encoder.config.hidden_size, "text encoder's hidden_size"),
    ):
        if given != wanted:
            raise ValueError(f"unet/config.json: {field} = {given!r} is not supported: it must be the {of}, {wanted}")
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder}


def unet_of(config: Mapping[str, Any]) -> Any:
    """The UNet of a config, as a pipeline has it, on the device in whose context this is called. Raises ValueError for what is
    not supported."""
    from diffusers import UNet2DConditionModel

    _check_class("unet", config, UNet2DConditionModel)
    size = config.get("sample_size")
    if not isinstance(size, int) or size < 1:
        raise ValueError(
            f"unet/config.json: sample_size = {size!r} is not supported: it must be one number, as latents are square"
        )
    try:
        unet = UNet2DConditionModel.from_config(config)
        _correct(unet=unet)
    except (TypeError, ValueError) as error:
        raise ValueError(f"unet/config.json is no UNet2DConditionModel's: {error}") from None
    return unet


def check_unet(folder: Path, base: Any) -> None:
    """Raise ValueError or FileNotFoundError unless a folder holds the config and the weights of a UNet that can take the place
    of `base`, with or without adapters."""
    import torch

    with torch.device("meta"):
        unet = unet_of(read_json(folder / "config.json"))
    own, its = ({k: v for k, v in net.config.items() if not k.startswith("_")} for net in (base, unet))
    if differing := sorted(k for k in own.keys() | its.keys() if _plain(own.get(k)) != _plain(its.get(k))):
        field = differing[0]
        raise ValueError(
            f"{folder / 'config.json'} is for another base model: {field} = {its.get(field)!r}, here it is {own.get(field)!r}"
        )
    checkpoint.compare(checkpoint.of_folder(folder, STEMS["unet"]), unet)


def scheduler_config(folder: Path) -> dict[str, Any]:
    """The scheduler's config as a pipeline has it, defaults filled in. Raises ValueError unless its betas, or shift, say the
    process."""
    import diffusers

    file = folder / "scheduler" / "scheduler_config.json"
    config = read_json(file)
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise ValueError(f"{_short(file)}: _class_name = {kind!r} is not supported; {_one_of(SCHEDULERS)} is")
    _check_fields("scheduler", config)
    scheduler_class = getattr(diffusers, kind)
    if config.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in _parameters(scheduler_class):
        raise ValueError(f"{_short(file)}: rescale_betas_zero_snr = true has no meaning for a {kind}")
    try:
        scheduler = scheduler_class.from_config(config)
        _correct(scheduler=scheduler)
        filled = dict(scheduler.config)
        Schedule.from_config(filled, 1, spacing=None if is_flow(filled) else "leading")
    except (IndexError, TypeError, ValueError, NotImplementedError, ImportError) as error:
        raise ValueError(f"{_short(file)}: {error}") from None
    return filled


def _correct(unet: Any = None, scheduler: Any = None) -> None:
    """Change the configs of parts as diffusers' pipeline does with those of old folders when it is put together: `sample_size`
    below 64, of a UNet from before 0.9, becomes 64, and a scheduler's `steps_offset` 1."""
    from diffusers import StableDiffusionPipeline

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the pipeline that is trained warns
        StableDiffusionPipeline(
            vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def _check_class(part: str, config: Mapping[str, Any], model_class: Any) -> None:
    """Raise ValueError for another class's config, fields that are not supported, and fields that diffusers would ignore."""
    if (kind := config.get("_class_name")) not in CLASSES[part]:
        raise ValueError(f"{part}/config.json: _class_name = {kind!r} is not supported; {_one_of(CLASSES[part])} is")
    _check_fields(part, config)
    known = _parameters(model_class)
    for field, value in config.items():
        if not field.startswith("_") and field not in known and value not in (None, False):
            raise ValueError(
                f"{part}/config.json: {model_class.__name__} knows no {field}, here {value!r}:"
                " remove it if the weights do without"
            )


def _check_fields(part: str, config: Mapping[str, Any]) -> None:
    name = "scheduler/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"
    for field, only in _ONLY[part].items():
        if (value := config.get(field, only)) != only:
            raise ValueError(f"{name}: {field} = {value!r} is not supported; only {only!r} is")


def _check_tokenizer(folder: Path, text: Any) -> None:
    """Raise ValueError unless each prompt fits the text encoder."""
    from transformers import CLIPTokenizer

    try:
        with checkpoint.quiet():
            tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # of its own kinds, by what is broken
        raise ValueError(f"tokenizer cannot be read: {error}") from None
    if tokenizer.model_max_length > text.max_position_embeddings:
        raise ValueError(
            f"tokenizer/tokenizer_config.json: model_max_length = {tokenizer.model_max_length} is more than the text encoder's"
            f" {text.max_position_embeddings} positions"
        )
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, and text_encoder/config.json has vocab_size = {text.vocab_size}"
        )


def _parameters(some_class: Any) -> set[str]:
    return set(inspect.signature(some_class.__init__).parameters) - {"self"}


def _one_of(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _short(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"
