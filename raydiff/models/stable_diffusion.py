"""Stable Diffusion 1.x and 2.x, and every model in their format: hub id, local folder or the embedded one.

Legend: B images, C h w latent, H W pixels.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from raydiff import assets, contents
from raydiff.config import InputPath
from raydiff.core.denoise import Predict, guided
from raydiff.core.schedule import Schedule
from raydiff.models import checkpoint, formats, hub, lora
from raydiff.models.base import ModelConfig


class Plugin(ModelConfig):
    kind: Literal["stable_diffusion"] = "stable_diffusion"
    path: InputPath = "embedded"
    """Hub id, local folder in diffusers' StableDiffusionPipeline format, or "embedded": the model in the package."""
    revision: str | None = None
    """Of a hub id."""
    variant: str | None = None
    """Weights' variant, e.g. "fp16"."""

    def check(self, run: Any) -> None:
        if self.train == "full" and self.dtype != "float32":
            raise ValueError(
                f"model.dtype = {self.dtype!r} with model.train = 'full': train every weight in float32, or a LoRA"
            )

    @property
    def name(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return " + ".join([f"{self.path}{revision}", *(f"{a} ({lora.digest(a)[:12]})" for a in self.adapters)])

    def folder(self) -> str:
        return str(assets.path("pipeline")) if self.path == "embedded" else self.path

    def check_exported(self, adapters: Sequence[tuple[str, float]]) -> None:
        whole = [folder for folder, _ in adapters if is_whole(folder)]
        super().check_exported([(folder, weight) for folder, weight in adapters if folder not in whole])
        if whole and (len(adapters) > 1 or adapters[0][1] != 1):
            raise ValueError(f"{whole[0]!r} holds a whole fine-tuned unet: give it alone and at weight 1; only LoRAs mix")

    def exported_digest(self, folder: str | Path) -> str:
        return contents.of_path(Path(folder) / "unet") if is_whole(folder) else super().exported_digest(folder)

    def config_folder(self) -> Path | None:
        folder = Path(self.folder())
        if folder.is_dir():
            return folder
        from huggingface_hub import try_to_load_from_cache

        names = [f"{part}/config.json" for part in formats.STEMS] + ["scheduler/scheduler_config.json"]
        try:
            found = [try_to_load_from_cache(self.path, name, revision=self.revision) for name in names]
        except ValueError:  # not the form of a hub id: preflight has said so
            return None
        return Path(str(found[0])).parents[1] if all(isinstance(f, str) for f in found) else None

    def grid(self, steps: int, spacing: Any = None, final_alpha: float | None = None) -> Schedule | None:
        if (folder := self.config_folder()) is None:
            return None
        return Schedule.from_config(formats.scheduler_config(folder), steps, spacing=spacing, final_alpha=final_alpha)

    def tokenizers(self) -> list[Any]:
        from transformers import AutoTokenizer

        options = {"subfolder": "tokenizer", "revision": self.revision, "local_files_only": True}
        try:
            return [AutoTokenizer.from_pretrained(self.folder(), **options)]
        except (OSError, ValueError):  # a hub id that is not in the cache
            return []

    def files(self) -> dict[str, Path | str]:
        folder = Path(self.folder())
        parts: dict[str, Path | str] = {"path": f"{self.path}@{self.revision}" if self.revision else self.path}
        if not _is_hub_id(self.path):
            parts = {"path": folder}
        if folder.is_dir():
            parts = {f"path/{part}": folder / part for part in (*formats.STEMS, "tokenizer", "scheduler", "model_index.json")}
        return super().files() | parts | {f"adapters.{i}": Path(adapter) for i, adapter in enumerate(self.adapters)}

    def preflight(self) -> None:
        """Raise, naming the file, the field or the tensor, unless what is there can be read: configs and the weights' headers.

        Of a hub id, its snapshot in the cache if it is whole; else the hub is asked what kind of model it is, which raises
        ConnectionError within seconds when it does not answer.
        """
        local = self.path == "embedded" or Path(self.path).exists()
        if not local and not _is_hub_id(self.path):
            raise FileNotFoundError(f"model.path = {self.path!r} is neither a folder here nor a hub id like 'owner/name'")
        try:
            folder = Path(self.folder()) if local else self._cached()
            if folder is None:
                formats.check_index(hub.model_index(self.path, self.revision))
            else:
                formats.check_folder(folder, self.variant)
        except (ValueError, OSError) as error:
            raise self._named(error) from None
        self._check_adapters(folder)

    def _named(self, error: ValueError | OSError) -> Exception:
        """The same error with the field and its value in front."""
        kind = ValueError if isinstance(error, ValueError) else type(error)
        return kind(f"model.path = {self.path!r}: {error}")

    def _cached(self) -> Path | None:
        """A hub id's snapshot in the cache, if every file that is loaded is there."""
        folder = hub.cached(self.path, self.revision)
        return folder if folder is not None and formats.complete(folder, self.variant) else None

    def snapshot(self) -> Path:
        """The folder to load from; of a hub id, the newest snapshot if the hub answers, else the one in the cache.

        What was downloaded is checked as `preflight` does.
        """
        folder = Path(self.folder())
        if folder.is_dir():
            return folder
        if (cached := self._cached()) is not None and not hub.reachable(self.path, self.revision):
            return cached
        from diffusers import StableDiffusionPipeline

        folder = StableDiffusionPipeline.download(
            self.path, revision=self.revision, variant=self.variant, use_safetensors=True, safety_checker=None,
            feature_extractor=None,
        )  # fmt: skip
        try:
            formats.check_folder(Path(folder), self.variant)
        except (ValueError, OSError) as error:
            raise self._named(error) from None
        return Path(folder)

    def _check_adapters(self, folder: Path | None) -> None:
        """Raise FileNotFoundError for one that is missing, ValueError where the base in `folder` shows that it does not fit."""
        unet = self.skeleton(folder).denoiser if self.adapters and folder else None
        for adapter in self.adapters:
            try:
                lora.weights_file(adapter) if unet is None else lora.check_fits(unet, adapter)
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(f"model.adapters: {error}") from None

    def build(
        self, device: torch.device | str = "cpu", *, seed: int = 0, reference: bool = False, checkpointing: bool = True
    ) -> StableDiffusion:
        self.preflight()
        pipe = load_pipeline(self, device)
        if checkpointing:  # at 512 pixels the decoder's activations outweigh the denoiser's
            pipe.vae.enable_gradient_checkpointing()
        if self.train == "lora":
            trained = lora.add(pipe.unet, self.lora, seed)
        else:
            trained = dict(pipe.unet.requires_grad_(True).named_parameters())
        frozen = copy.deepcopy(pipe.unet).requires_grad_(False) if reference and self.train == "full" else None
        return StableDiffusion(pipe, trained, frozen)

    def load(self, device: torch.device | str = "cpu", adapters: Sequence[tuple[str, float]] = ()) -> StableDiffusion:
        self.preflight()
        model = StableDiffusion(load_pipeline(self, device), {})
        if any(is_whole(folder) for folder, _ in adapters):
            ((folder, _),) = adapters
            model.load(folder)
        else:
            lora.attach(model.denoiser, adapters)
        return model

    def skeleton(self, folder: Path, *, reference: bool = False, checkpointing: bool = True) -> Skeleton:
        """The model on the meta device, from the config files of a pipeline folder: shapes without weights."""
        dtype = getattr(torch, self.dtype)
        parts = formats.networks(folder)
        unet, vae, text_encoder = parts["unet"], parts["vae"], parts["text_encoder"]
        config = formats.scheduler_config(folder)
        pipe = SimpleNamespace(**parts, scheduler=SimpleNamespace(config=config))
        for part in (unet, vae, text_encoder):
            nn.Module.to(part, dtype)  # diffusers' own `to` warns of parts that it keeps in fp32, even where there are none
            part.requires_grad_(False).eval()
        if checkpointing:
            vae.enable_gradient_checkpointing()
        if self.train == "lora":
            return Skeleton(pipe, lora.add(unet, self.lora, 0))
        frozen = copy.deepcopy(unet) if reference else None
        return Skeleton(pipe, dict(unet.requires_grad_(True).named_parameters()), frozen)


def is_whole(folder: str | Path) -> bool:
    """Whether an exported folder holds a whole fine-tuned denoiser, and no adapter."""
    return not (Path(folder) / lora.WEIGHTS).exists() and (Path(folder) / "unet" / "config.json").exists()


def load_pipeline(config: Plugin, device: torch.device | str = "cpu") -> Any:
    """The diffusers StableDiffusionPipeline, everything frozen and in eval mode; safetensors only."""
    import transformers

    transformers.logging.set_verbosity_error()  # or each process tells that it found no torchvision
    transformers.logging.disable_progress_bar()
    import diffusers
    from diffusers import StableDiffusionPipeline

    diffusers.logging.disable_progress_bar()
    folder = config.snapshot()
    parts = {part: _load_part(config, folder, part) for part in formats.STEMS}
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    lora.merge(pipe.unet, config.adapters)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return pipe.to(device)


def _load_part(config: Plugin, folder: Path, part: str) -> Any:
    """A part with its weights. Raises ValueError when its loader says that it did not load each tensor."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}[part]
    weights = checkpoint.of_folder(folder / part, formats.STEMS[part], config.variant)
    network, info = kind.from_pretrained(
        folder / part,
        dtype=getattr(torch, config.dtype),
        use_safetensors=True,
        output_loading_info=True,
        variant=weights.variant,
    )
    checkpoint.check_loading(f"model.path = {config.path!r}: {weights.name}", info)
    return network


class StableDiffusion:
    """The LatentModel around a StableDiffusionPipeline. Latents outside are fp32 and scaled to unit variance."""

    def __init__(self, pipe: Any, trained: Mapping[str, nn.Parameter], frozen: nn.Module | None = None) -> None:
        self.pipe, self._trained, self._frozen = pipe, dict(trained), frozen
        self.denoiser: Any = pipe.unet
        self.device: torch.device = pipe.unet.device
        self.dtype: torch.dtype = pipe.vae.dtype
        config = pipe.unet.config
        self.latent_shape: tuple[int, int, int] = (config.in_channels, config.sample_size, config.sample_size)
        self.picture_size: int = config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        self._in_reference = False

    def schedule(self, steps: int, spacing: Any = None, final_alpha: float | None = None) -> Schedule:
        return Schedule.from_config(self.pipe.scheduler.config, steps, spacing=spacing, final_alpha=final_alpha)

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self._trained)

    def parts(self) -> dict[str, nn.Module]:
        """Every network that lies in memory, by name, adapter and frozen copy included."""
        frozen = {} if self._frozen is None else {"reference unet": self._frozen}
        return {"unet": self.pipe.unet, "vae": self.pipe.vae, "text_encoder": self.pipe.text_encoder, **frozen}

    def settings(self) -> dict[str, Any]:
        """Of the tokenizer, the scheduler and the networks."""
        networks = {"unet": self.pipe.unet, "vae": self.pipe.vae, "text_encoder": self.pipe.text_encoder}
        configs = {name: _plain(network.config) for name, network in networks.items()}
        return configs | {"scheduler": _plain(self.pipe.scheduler.config), "tokenizer": _words(self.pipe.tokenizer)}

    def passes(self, guidance: float) -> int:
        """Guidance asks for the empty prompt too."""
        return 1 if guidance == 1 else 2

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], guidance: float) -> Tensor:
        """Text states, (B,L,D), or (2B,L,D) with the empty prompt's first when guidance is not 1."""
        positive, negative = self.pipe.encode_prompt(list(prompts), self.device, 1, guidance != 1)
        return positive if guidance == 1 else torch.cat([negative, positive])

    def predict(self, denoiser: nn.Module, prompts: Sequence[str], guidance: float, detach_negative: bool = False) -> Predict:
        states = self.embed(prompts, guidance)

        def run(x: Tensor, time: Tensor) -> Tensor:
            network = self._frozen if self._in_reference and self._frozen is not None else denoiser
            return network(x.to(self.dtype), time, encoder_hidden_states=states, return_dict=False)[0].float()

        return run if self.passes(guidance) == 1 else guided(run, guidance, detach_negative=detach_negative)

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.pipe.vae
        pixels = vae.decode(latents.to(self.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return _UnitClamp.apply(pixels.float() / 2 + 0.5)

    def encode(self, images: Tensor) -> Tensor:
        return self.posterior(images)[0]

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        gaussian = self.pipe.vae.encode((images * 2 - 1).to(self.dtype)).latent_dist
        scale = self.pipe.vae.config.scaling_factor
        return gaussian.mean.float() * scale, gaussian.std.float() * scale

    def encoder_digest(self) -> str:
        vae = self.pipe.vae
        total = hashlib.sha256(f"{vae.config.scaling_factor} {self.dtype}".encode())
        for name, tensor in [*vae.encoder.state_dict().items(), *vae.quant_conv.state_dict().items()]:
            total.update(name.encode())
            total.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        return total.hexdigest()

    @property
    def has_reference(self) -> bool:
        return self._frozen is not None or hasattr(self.denoiser, "peft_config")

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Adapter off; in full fine-tuning, the frozen copy. Raises RuntimeError when no copy was asked for."""
        if not self.has_reference:
            raise RuntimeError("full fine-tuning without a frozen copy: build the model with reference=True")
        self._in_reference = True
        try:
            if self._frozen is not None:
                yield
            else:
                with lora.disabled(self.denoiser):
                    yield
        finally:
            self._in_reference = False

    def export(self, folder: str | Path, state: Mapping[str, Tensor]) -> None:
        """Write the trained weights `state` as diffusers reads them: an adapter, or a `unet` folder after full fine-tuning."""
        if hasattr(self.denoiser, "peft_config"):
            lora.save(self.denoiser, Path(folder), state, type(self.pipe))
        else:
            from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
            from safetensors.torch import save_file

            # `save_pretrained` would write the module's own weights, which are not `state` under ZeRO-3 or a moving average.
            self.denoiser.save_config(Path(folder) / "unet")
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
            save_file(plain, Path(folder) / "unet" / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})

    def load(self, folder: str | Path) -> None:
        """Take up the trained weights that `export` wrote to a folder."""
        if hasattr(self.denoiser, "peft_config"):
            lora.load(self.denoiser, folder)
        else:
            formats.check_unet(Path(folder) / "unet", self.denoiser)
            tuned = type(self.pipe.unet).from_pretrained(folder, subfolder="unet", use_safetensors=True)
            self.denoiser.load_state_dict(tuned.state_dict())


class Skeleton(StableDiffusion):
    """The same model without weights or tokenizer: everything has a shape, and nothing a value."""

    def embed(self, prompts: Sequence[str], guidance: float) -> Tensor:
        length = self.pipe.text_encoder.config.max_position_embeddings
        rows = len(prompts) if guidance == 1 else 2 * len(prompts)
        return torch.empty(rows, length, self.pipe.unet.config.cross_attention_dim, device="meta", dtype=self.dtype)


def _words(tokenizer: Any) -> dict[str, Any]:
    """What decides a tokenizer's tokens: not how the last call padded and cut, which it remembers."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    return {**rules, "padding": None, "truncation": None, "longest": tokenizer.model_max_length}


def _plain(config: Any) -> dict[str, Any]:
    """A config's values, without where it was read and by which version."""
    values = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return {name: value for name, value in values.items() if not name.startswith("_") and name != "transformers_version"}


class _UnitClamp(torch.autograd.Function):
    """clamp to [0,1] whose gradient survives in a saturated pixel when following it downhill leads back inside.

    A plain clamp freezes saturated pixels for good, and early training saturates many.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        stuck = ((x > 1) & (gradient < 0)) | ((x < 0) & (gradient > 0))
        return gradient.masked_fill(stuck, 0.0)


def _is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~"))
