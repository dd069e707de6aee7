"""Adapters of other tools: read as they were meant, every tensor and alpha, or refused with the first that is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raydiff.models import adapters, lora
from raydiff.models.stable_diffusion import Plugin
from tests.tiny import make_adapter

Tensors = dict[str, torch.Tensor]
PROMPTS, SEEDS = ["a cat", "a dog"], [3, 4]


@pytest.fixture(scope="module")
def exported(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_pipeline, tmp_path_factory.mktemp("adapter"), rank=2, seed=5) / lora.WEIGHTS


@pytest.fixture(scope="module")
def unet(tiny_pipeline: Path) -> Any:
    return formats_unet(tiny_pipeline)


def formats_unet(folder: Path) -> Any:
    """The network on the meta device, as preflight has it."""
    from raydiff.models import formats

    return formats.networks(folder)["unet"]


def fresh(folder: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()


@torch.no_grad()
def answer(unet: Any) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    states = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(1))
    return unet(x, torch.tensor([500.0, 100.0]), encoder_hidden_states=states).sample


def attached(folder: Path, file: Path) -> Any:
    unet = fresh(folder)
    lora.attach(unet, [(file, 1.0)])
    return unet


def kohya(tensors: Tensors) -> Tensors:
    def name(key: str) -> str:
        module, part = key.removeprefix("unet.").split(".lora_")
        return f"lora_unet_{module.replace('.', '_')}.lora_{'down' if part[0] == 'A' else 'up'}.weight"

    return {name(key): tensor for key, tensor in tensors.items()}


def processors(tensors: Tensors) -> Tensors:
    """diffusers before PEFT."""
    for new, old in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out.0", "to_out")):
        for letter, half in (("A", "down"), ("B", "up")):
            tensors = {k.replace(f".{new}.lora_{letter}.", f".processor.{old}_lora.{half}."): t for k, t in tensors.items()}
    return tensors


def unprefixed(tensors: Tensors) -> Tensors:
    return {k.removeprefix("unet."): t for k, t in tensors.items()}


def lora_down_up(tensors: Tensors) -> Tensors:
    return {k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): t for k, t in tensors.items()}


@pytest.mark.parametrize(
    "rewrite",
    [kohya, processors, unprefixed, lora_down_up, lambda t: unprefixed(processors(t)), lambda t: dict(reversed(t.items()))],
)
def test_other_formats_give_the_same_network(
    tiny_pipeline: Path, exported: Path, tmp_path: Path, rewrite: Callable[[Tensors], Tensors]
) -> None:
    file = tmp_path / "other.safetensors"
    save_file(rewrite(load_file(exported)), file)
    assert not torch.equal(answer(fresh(tiny_pipeline)), expected := answer(attached(tiny_pipeline, exported)))
    assert torch.equal(answer(attached(tiny_pipeline, file)), expected)


def test_kohyas_alphas_are_each_layers_own(tiny_pipeline: Path, exported: Path, tmp_path: Path) -> None:
    """Some layers at another alpha, and one without: against the same deltas with alpha multiplied in by hand."""
    tensors = load_file(exported)
    named, stems = kohya(tensors), sorted(k.removesuffix(".lora_A.weight") for k in tensors if "lora_A" in k)
    expected = dict(tensors)
    for i, stem in enumerate(stems[1:]):
        alpha = (0.5, 1.0, 4.0)[i % 3]
        key = f"lora_unet_{stem.removeprefix('unet.').replace('.', '_')}.alpha"
        named[key] = torch.tensor(alpha)
        expected[f"{stem}.lora_B.weight"] = tensors[f"{stem}.lora_B.weight"] * (alpha / 2)
    save_file(named, tmp_path / "kohya.safetensors")
    save_file(expected, tmp_path / "folded.safetensors")
    one, other = (answer(attached(tiny_pipeline, tmp_path / f"{name}.safetensors")) for name in ("kohya", "folded"))
    assert torch.allclose(one, other, atol=1e-5)
    base = fresh(tiny_pipeline)
    lora.merge(base, [tmp_path / "kohya.safetensors"])
    assert torch.allclose(answer(base), other, atol=1e-4)


def test_alpha_in_metadata_counts_in_each_way_of_writing(
    tiny_pipeline: Path, exported: Path, tmp_path: Path, unet: Any
) -> None:
    tensors = load_file(exported)
    for name, prefix, given in (("prefixed", "unet.", tensors), ("bare", "", unprefixed(tensors))):
        modules = sorted({key.partition(".lora_")[0].removeprefix("unet.") for key in tensors})
        config = {
            f"{prefix}target_modules": modules,
            f"{prefix}r": 2,
            f"{prefix}lora_alpha": 6,
            f"{prefix}alpha_pattern": {"attn2.to_q": 1},
        }
        save_file(given, tmp_path / f"{name}.safetensors", {"lora_adapter_metadata": json.dumps(config), "format": "pt"})
        layers = adapters.read(unet, tmp_path / f"{name}.safetensors")
        assert {layer.scale for m, layer in layers.items() if m.endswith("attn2.to_q")} == {0.5}
        assert {layer.scale for m, layer in layers.items() if not m.endswith("attn2.to_q")} == {3.0}
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipe.load_lora_weights(tmp_path, weight_name="prefixed.safetensors")
    assert torch.equal(answer(pipe.unet), answer(attached(tiny_pipeline, tmp_path / "prefixed.safetensors")))


def first(tensors: Tensors, word: str = "") -> str:
    return next(k for k in sorted(tensors) if word in k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k if i % 2 else k.removeprefix("unet."): v for i, (k, v) in enumerate(t.items())}, "does not begin with 'unet.'"),
        (lambda t: {**t, "text_encoder.x.lora_A.weight": torch.zeros(2, 16)}, "adapts a text encoder"),
        (lambda t: {**kohya(t), "lora_te_text_model_x.lora_down.weight": torch.zeros(2, 16)}, "adapts a text encoder"),
        (lambda t: {**kohya(t), "lora_te1_text_model_x.alpha": torch.tensor(1.0)}, "belongs to no layer"),
        (lambda t: {f"base_model.model.{k}": v for k, v in unprefixed(t).items()}, "PEFT's own format"),
        (lambda t: {f"transformer.{k}": v for k, v in unprefixed(t).items()}, "is for a transformer"),
        (lambda t: {k: v for k, v in t.items() if k != first(t, "lora_B")}, "has no other half"),
        (lambda t: {k: v for k, v in kohya(t).items() if k != first(kohya(t), "lora_up")}, "has no lora_up.weight beside it"),
        (lambda t: {**kohya(t), "lora_unet_a.dora_scale": torch.zeros(4)}, "is DoRA"),
        (lambda t: {**t, first(t).replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(4)}, "is DoRA"),
        (lambda t: {"lora_unet_a.hada_w1_a": torch.zeros(4)}, "is LoHa"),
        (lambda t: {"lora_unet_a.lokr_w1": torch.zeros(4)}, "is LoKr"),
        (lambda t: {**kohya(t), "lora_unet_a.lora_mid.weight": torch.zeros(4)}, "Tucker"),
        (lambda t: {**t, first(t).replace("lora_A.weight", "lora_B.bias"): torch.zeros(4)}, "is a bias"),
        (lambda t: {**t, "unet.conv_in.diff": torch.zeros(4)}, "'unet.conv_in.diff' is no LoRA tensor"),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "is stored as I8"),
        (lambda t: {k: v.repeat(1, 2) if "lora_A" in k else v for k, v in t.items()}, "is for another base model"),
        (lambda t: {**kohya(t), "lora_unet_mid_block_x_to_q.lora_down.weight": torch.zeros(2, 16),
                    "lora_unet_mid_block_x_to_q.lora_up.weight": torch.zeros(16, 2)}, "for another base model: .* no layer"),
        (lambda t: {**kohya(t), "lora_unet_nowhere.alpha": torch.tensor(1.0)}, "lora_unet_nowhere.alpha' belongs to no layer"),
        (lambda t: {}, "holds no tensors"),
    ],
)  # fmt: skip
def test_what_would_not_land_is_refused_before_and_when_loading(
    tmp_path: Path, exported: Path, unet: Any, change: Callable[[Tensors], Tensors], message: str
) -> None:
    file = tmp_path / "other.safetensors"
    save_file(change(load_file(exported)), file)
    for read in (lora.check_fits, lora.load, lambda unet, file: lora.attach(unet, [(file, 1.0)])):
        with pytest.raises(ValueError, match=f"adapter .*{message}"):
            read(unet, file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"lora_adapter_metadata": '{"unet.use_dora": true}'}, "use_dora = True"),
        ({"lora_adapter_metadata": '{"unet.init_lora_weights": "pissa"}'}, "init_lora_weights = 'pissa'"),
        ({"lora_adapter_metadata": '{"unet.lora_bias": true}'}, "lora_bias = True"),
        ({"lora_adapter_metadata": "{"}, "lora_adapter_metadata are broken"),
        ({"ss_network_alpha": "1", "ss_network_dim": "2"}, "network_alpha = 1 of 2, and the alpha tensors are missing"),
    ],
)
def test_metadata_that_say_more_than_is_run_are_refused(
    tmp_path: Path, exported: Path, unet: Any, metadata: dict[str, str], message: str
) -> None:
    file = tmp_path / "other.safetensors"
    save_file(load_file(exported), file, metadata)
    with pytest.raises(ValueError, match=message):
        lora.check_fits(unet, file)


@pytest.mark.parametrize("alpha", [7.0, 0.5, None])
def test_an_exported_alpha_needs_no_metadata(tiny_pipeline: Path, tmp_path: Path, alpha: float | None) -> None:
    """Bit-equal pictures in plain diffusers with and without metadata, and from the model that was trained."""
    model = Plugin.model_validate({"path": str(tiny_pipeline), "lora": {"rank": 3, "alpha": alpha}}).build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.trained().values():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    model.export(tmp_path, model.trained())
    save_file(load_file(tmp_path / lora.WEIGHTS), tmp_path / "stripped.safetensors")
    with safe_open(tmp_path / lora.WEIGHTS, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert config["unet.lora_alpha"] == config["unet.r"] == 3

    def pictures(pipe: Any) -> torch.Tensor:
        pipe.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(s) for s in SEEDS]
        return pipe(PROMPTS, num_inference_steps=3, guidance_scale=3.0, generator=generators, output_type="pt").images

    drawn = []
    for name in (lora.WEIGHTS, "stripped.safetensors"):
        pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
        pipe.load_lora_weights(tmp_path, weight_name=name)
        drawn.append(pictures(pipe))
    assert torch.equal(*drawn)
    assert torch.equal(pictures(model.pipe), drawn[0])
    trained = {name: p.detach().clone() for name, p in model.trained().items()}
    model.load(tmp_path)
    for name, p in model.trained().items():
        assert torch.allclose(p, trained[name], rtol=1e-6)


def test_alpha_scales_the_adapter_and_its_gradient(tiny_pipeline: Path) -> None:
    """The folded form is W + alpha/rank·B·A: by hand, with the gradient of B."""
    model = Plugin.model_validate({"path": str(tiny_pipeline), "lora": {"rank": 3, "alpha": 7.0}}).build()
    layer = next(iter(lora._layers(model.denoiser).values()))
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        up.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, down.shape[1])
    layer(x).sum().backward()
    assert torch.allclose(layer(x), layer.base_layer(x) + 7 / 3 * x @ down.T @ up.T, atol=1e-5)
    assert up.grad is not None
    assert torch.allclose(up.grad, 7 / 3 * (x @ down.T).sum(0).expand_as(up), atol=1e-4)
