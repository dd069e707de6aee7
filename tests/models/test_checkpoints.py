"""Model folders of other kinds, and broken ones: read right, or refused with the file, the field or the tensor."""

import http.server
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

from raydiff.core.schedule import Schedule
from raydiff.models import formats
from raydiff.models.stable_diffusion import Plugin, load_pipeline

UNET, VAE, TEXT = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"


@pytest.fixture
def folder(tiny_pipeline: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "model"))


def rewrite(folder: Path, stem: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / f"{stem}.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def edit(folder: Path, file: str, **fields: Any) -> None:
    tree = json.loads((folder / file).read_text())
    tree |= fields
    (folder / file).write_text(json.dumps({k: v for k, v in tree.items() if v != "absent"}))


def without(word: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {k: v for k, v in tensors.items() if word not in k}


def reshaped(word: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {k: v[:-1].clone() if word in k else v for k, v in tensors.items()}


@pytest.mark.parametrize(
    ("stem", "change", "message"),
    [
        (TEXT, without("mlp"), r"text_encoder/model.safetensors .* lack encoder.layers.0.mlp.fc1.bias, .* and 1 more"),
        (TEXT, lambda t: {f"foreign.{k}": v for k, v in t.items()}, "lack embeddings.*the network has no foreign.embeddings"),
        (TEXT, lambda t: {**t, "text_projection.weight": torch.zeros(16, 16)}, "the network has no text_projection.weight"),
        (TEXT, reshaped("token_embedding"), r"token_embedding.weight is \(\d+, 16\) and should be"),
        (TEXT, lambda t: {**t, **{f"text_model.{k}": v.clone() for k, v in t.items()}}, "holds some tensors twice"),
        (UNET, without("conv_in.bias"), "unet/.* lack conv_in.bias"),
        (UNET, lambda t: {f"model.diffusion_model.{k}": v for k, v in t.items()}, "network has no model.diffusion_model"),
        (UNET, lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "is stored as I8"),
        (UNET, lambda t: {**t, "add_embedding.linear_1.weight": torch.zeros(4, 4)}, "has no add_embedding.linear_1.weight"),
        (VAE, without("post_quant_conv"), "vae/.* lack post_quant_conv.bias"),
        (VAE, reshaped("decoder.conv_out.weight"), r"decoder.conv_out.weight is \(2, 8, 3, 3\) and should be \(3, 8, 3, 3\)"),
        (VAE, lambda t: {}, "holds no tensors"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_named(folder: Path, stem: str, change: Any, message: str) -> None:
    rewrite(folder, stem, change)
    with pytest.raises(ValueError, match=f"model.path = .*{message}"):
        Plugin(path=str(folder)).preflight()


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "'StableDiffusionXLPipeline' is not supported"),
        ("model_index.json", {"_class_name": "StableDiffusionInpaintPipeline"}, "InpaintPipeline' is not supported"),
        ("model_index.json", {"_class_name": ["custom", "Mine"]}, "_class_name = .'custom', 'Mine'. is not supported"),
        ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "text_encoder_2 = 'CLIPTextModel' is no part"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "text_encoder = 'T5EncoderModel'"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "vae = 'AutoencoderTiny' is not supported"),
        ("model_index.json", {"scheduler": ["diffusers", "LCMScheduler"]}, "scheduler = 'LCMScheduler' is not supported"),
        ("unet/config.json", {"_class_name": "UNet2DModel"}, "unet/config.json: _class_name = 'UNet2DModel'"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "addition_embed_type = 'text_time' is not supported"),
        ("unet/config.json", {"class_embed_type": "projection"}, "class_embed_type = 'projection' is not supported"),
        ("unet/config.json", {"time_cond_proj_dim": 256}, "time_cond_proj_dim = 256 is not supported"),
        ("unet/config.json", {"in_channels": 9}, "in_channels = 9 .* vae's latent_channels, 4"),
        ("unet/config.json", {"out_channels": 8}, "out_channels = 8 .* vae's latent_channels, 4"),
        ("unet/config.json", {"sample_size": [8, 12]}, r"sample_size = \[8, 12\] is not supported"),
        ("unet/config.json", {"cross_attention_dim": 32}, "cross_attention_dim = 32 .* hidden_size, 16"),
        ("unet/config.json", {"quantization_config": {"bits": 4}}, "knows no quantization_config"),
        ("unet/config.json", {"attention_type": "gated"}, "attention_type = 'gated' is not supported"),
        ("vae/config.json", {"_class_name": "AsymmetricAutoencoderKL"}, "vae/config.json: _class_name = 'Asymm"),
        ("vae/config.json", {"shift_factor": 0.1}, "shift_factor = 0.1 is not supported"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "latents_mean = .* is not supported"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type = 't5' is not supported"),
        ("text_encoder/config.json", {"architectures": ["CLIPTextModelWithProjection"]}, "WithProjection'. is not supported"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 99}, "model_max_length = 99 is more than .* 16 positions"),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler"}, "EDMEulerScheduler' is not supported"),
        ("scheduler/scheduler_config.json", {"use_flow_sigmas": True}, "use_flow_sigmas = True is not supported"),
        ("scheduler/scheduler_config.json", {"thresholding": True}, "thresholding = True is not supported"),
        ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type = 'sample' is not supported"),
        ("scheduler/scheduler_config.json", {"beta_end": 12.0}, "betas must be .* between 0 and 1"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1, 0.2]}, "betas must be num_train_timesteps = 1000"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "PNDMScheduler", "rescale_betas_zero_snr": True},
            "rescale_betas_zero_snr = true has no meaning for a PNDMScheduler",
        ),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type = 'continuous' is not supported",
        ),
    ],
)  # fmt: skip
def test_models_of_another_kind_are_refused_by_name(folder: Path, file: str, fields: Any, message: str) -> None:
    edit(folder, file, **fields)
    with pytest.raises(ValueError, match=f"model.path = .*{message}"):
        Plugin(path=str(folder)).preflight()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (f"{UNET}.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (f"{TEXT}.safetensors", b"\x08\x00", "model.safetensors is broken"),
        ("unet/config.json", b"{", "config.json is broken"),
        ("vae/config.json", b"[]", "holds a list, not an object"),
    ],
)
def test_broken_files_are_named(folder: Path, file: str, content: bytes, message: str) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Plugin(path=str(folder)).preflight()


def shard(folder: Path, stem: str, *, lose: str = "") -> None:
    """Cut a part's weights into two files and an index."""
    file = folder / f"{stem}.safetensors"
    tensors = load_file(file)
    file.unlink()
    names, places = sorted(tensors), {}
    for i, keys in enumerate((names[::2], names[1::2])):
        name = f"{Path(stem).name}-0000{i + 1}-of-00002.safetensors"
        save_file({k: tensors[k] for k in keys if k != lose}, file.with_name(name), metadata={"format": "pt"})
        places |= dict.fromkeys(keys, name)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def old_vae_attention(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        tensors = {k.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): v for k, v in tensors.items()}
    return tensors


def test_formats_that_mean_the_same_give_the_same_model(folder: Path, tiny_pipeline: Path) -> None:
    """Shards, a variant, old CLIP's position_ids and prefix."""
    expected = load_pipeline(Plugin(path=str(tiny_pipeline)))
    shard(folder, UNET)
    shard(folder, TEXT)
    (folder / f"{VAE}.safetensors").rename(folder / f"{VAE}.fp16.safetensors")
    with pytest.raises(FileNotFoundError, match='set model.variant to "fp16"'):
        Plugin(path=str(folder)).preflight()
    loaded = Plugin(path=str(folder), variant="fp16").build().pipe
    for part in formats.STEMS:
        own, theirs = getattr(loaded, part).state_dict(), getattr(expected, part).state_dict()
        assert all(torch.equal(own[k.replace("to_q.", "to_q.base_layer.") if k not in own and "to_q" in k else k], v)
                   for k, v in theirs.items() if not any(t in k for t in ("to_k", "to_v", "to_out")))  # fmt: skip


def test_old_names_of_clip_and_of_attention_are_read(folder: Path) -> None:
    from diffusers import AutoencoderKL

    config = json.loads((folder / "vae/config.json").read_text()) | {"mid_block_add_attention": True}
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(config)
    vae.save_pretrained(folder / "vae")
    rewrite(folder, VAE, old_vae_attention)
    assert any("proj_attn" in k for k in load_file(folder / f"{VAE}.safetensors"))
    encoder = load_file(folder / f"{TEXT}.safetensors")
    old = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in encoder.items()}
    positions = torch.arange(16)[None]
    save_file({**old, "text_model.embeddings.position_ids": positions}, folder / f"{TEXT}.safetensors", {"format": "pt"})
    pipe = load_pipeline(Plugin(path=str(folder)))
    assert all(torch.equal(pipe.vae.state_dict()[k], v) for k, v in vae.state_dict().items())
    loaded = {k.removeprefix("text_model."): v for k, v in pipe.text_encoder.state_dict().items()}
    assert all(torch.equal(loaded[k.removeprefix("text_model.")], v) for k, v in encoder.items())


def test_shards_that_disagree_with_their_index_are_refused(folder: Path) -> None:
    shard(folder, UNET, lose="conv_in.bias")
    with pytest.raises(ValueError, match="index.json and .* do not agree on conv_in.bias"):
        Plugin(path=str(folder)).preflight()


@pytest.mark.parametrize(
    "fields",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True},
        {"_class_name": "DPMSolverMultistepScheduler"},
        {"_class_name": "UniPCMultistepScheduler", "beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_schedulers_of_the_same_process_go_on_working(folder: Path, fields: dict[str, Any]) -> None:
    edit(folder, "scheduler/scheduler_config.json", **fields)
    edit(folder, "model_index.json", scheduler=["diffusers", fields.get("_class_name", "DDIMScheduler")])
    Plugin(path=str(folder)).preflight()


def test_a_heun_scheduler_has_its_own_default_betas(folder: Path) -> None:
    from diffusers import HeunDiscreteScheduler

    (folder / "scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "HeunDiscreteScheduler"}))
    schedule = Schedule.from_config(formats.scheduler_config(folder), 5, spacing="trailing")
    theirs = HeunDiscreteScheduler().alphas_cumprod[schedule.times]
    assert torch.allclose(schedule.alpha[:-1].square(), theirs.double(), atol=1e-5)


def test_a_grid_of_the_schedulers_own_is_not_promised() -> None:
    with pytest.raises(ValueError, match="use_karras_sigmas = True; set sampler.spacing"):
        Schedule.from_config({"use_karras_sigmas": True}, 5)
    Schedule.from_config({"use_karras_sigmas": True}, 5, spacing="trailing")


def test_a_whole_unet_must_fit_its_base(tiny_pipeline: Path, tmp_path: Path) -> None:
    model = Plugin(path=str(tiny_pipeline), train="full").build()
    model.export(tmp_path, model.trained())
    formats.check_unet(tmp_path / "unet", model.denoiser)
    rewrite(tmp_path, UNET, without("conv_in.bias"))
    with pytest.raises(ValueError, match="lack conv_in.bias"):
        model.load(tmp_path)
    edit(tmp_path, "unet/config.json", flip_sin_to_cos=False)
    with pytest.raises(ValueError, match="for another base model: flip_sin_to_cos = False, here it is True"):
        model.load(tmp_path)


class Hub(http.server.BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, tuple[int, bytes]]] = {}

    def do_GET(self) -> None:
        name = "/".join(self.path.split("/")[1:3])
        if name == "some/slow":
            time.sleep(3)
        status, body = self.answers.get(name, (404, b""))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def point_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """What HF_ENDPOINT does in a new process."""
    from huggingface_hub import constants

    endpoint = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A small hub on this machine, and an empty cache."""
    from huggingface_hub import constants

    from raydiff.models import hub

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_at(monkeypatch, server.server_port)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "SECONDS", 1.0)
    yield
    server.shutdown()


def test_a_hub_id_is_answered_in_seconds(hub: None, tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    index = (tiny_pipeline / "model_index.json").read_bytes()
    Hub.answers = {
        "some/sd": (200, index),
        "some/xl": (200, index.replace(b"StableDiffusionPipeline", b"StableDiffusionXLPipeline")),
        "some/gated": (401, b""),
        "some/page": (200, b"<html>"),
        "some/busy": (503, b""),
    }
    Plugin(path="some/sd").preflight()
    start = time.perf_counter()
    for name, kind, message in (
        ("some/xl", ValueError, "'StableDiffusionXLPipeline' is not supported"),
        ("some/none", FileNotFoundError, "the hub has no 'some/none'"),
        ("some/gated", PermissionError, "HF_TOKEN"),
        ("some/page", ValueError, "no JSON object"),
        ("some/busy", ConnectionError, "answers 503"),
        ("some/slow", ConnectionError, "cannot be reached"),
    ):
        with pytest.raises(kind, match=f"model.path = '{name}': .*{message}"):
            Plugin(path=name).preflight()
    point_at(monkeypatch, 9)  # nobody listens
    with pytest.raises(ConnectionError, match="cannot be reached"):
        Plugin(path="some/sd").preflight()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        Plugin(path="some/sd").preflight()
    assert time.perf_counter() - start < 20


def test_a_snapshot_in_the_cache_is_checked_as_a_folder(hub: None, tiny_pipeline: Path, tmp_path: Path) -> None:
    repo = tmp_path / "cache" / "models--some--cached"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    snapshot = Path(shutil.copytree(tiny_pipeline, repo / "snapshots" / ("0" * 40)))
    Hub.answers = {"some/cached": (503, b"")}
    assert Plugin(path="some/cached").snapshot() == snapshot
    Plugin(path="some/cached").preflight()
    rewrite(snapshot, TEXT, without("mlp"))
    with pytest.raises(ValueError, match="lack encoder.layers.0.mlp"):
        Plugin(path="some/cached").preflight()


@pytest.mark.parametrize(("version", "size"), [("0.6.0", 8), ("0.8.1", 32), ("0.9.0", 8), (None, 8)])
def test_an_old_folder_is_what_the_pipeline_makes_of_it(
    tiny_pipeline: Path, tmp_path: Path, version: str | None, size: int
) -> None:
    """What is trained, what plan measures and what a fine-tuned unet is compared with have the plain pipeline's size and grid."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    folder = shutil.copytree(tiny_pipeline, tmp_path / "old")
    unet = json.loads((folder / "unet/config.json").read_text()) | {"sample_size": size, "_diffusers_version": version}
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text()) | {"steps_offset": 0}
    (folder / "unet/config.json").write_text(json.dumps({k: v for k, v in unet.items() if v is not None}))
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(scheduler))
    plain = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    expected = (4, plain.unet.config.sample_size, plain.unet.config.sample_size)
    assert expected[1] == (64 if version in ("0.6.0", "0.8.1") else size)
    plugin = Plugin(path=str(folder), train="full")
    plugin.preflight()
    skeleton, model = plugin.skeleton(folder), plugin.build()
    assert skeleton.latent_shape == model.latent_shape == expected
    assert skeleton.picture_size == model.picture_size == expected[1] * plain.vae_scale_factor
    steps = DDIMScheduler.from_config(plain.scheduler.config)
    steps.set_timesteps(4)
    for ours in (skeleton, model):
        assert ours.schedule(4, "leading").times.tolist() == steps.timesteps.tolist()
    formats.check_unet(folder / "unet", model.denoiser)
