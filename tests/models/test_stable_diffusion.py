"""The SD model family on a tiny random pipeline: against plain diffusers, and adapter on, off and exported."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from raydiff import generate as drawing
from raydiff.core.denoise import denoise, seeded_noise
from raydiff.models.stable_diffusion import Plugin, StableDiffusion, _UnitClamp
from tests.tiny import make_adapter, make_pipeline

PROMPTS, SEEDS = ["a cat", "a dog"], [3, 4]


def build(folder: Path, **changes: object) -> StableDiffusion:
    options = {"reference": changes.pop("reference", False)}
    return Plugin.model_validate({"path": str(folder), **changes}).build(seed=1, **options)  # type: ignore[arg-type]


@torch.no_grad()
def pictures(model: StableDiffusion, guidance: float = 3.0, eta: float = 0.0) -> torch.Tensor:
    schedule = model.schedule(5, "trailing", 1.0)
    noise = seeded_noise(SEEDS, model.latent_shape)
    predict = model.predict(model.denoiser, PROMPTS, guidance)
    return model.decode(denoise(predict, schedule, noise(-1), eta=eta, noise=noise)[0])


def perturb(model: StableDiffusion, scale: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.trained().values():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_equals_a_plain_diffusers_pipeline(tiny_pipeline: Path, guidance: float) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    theirs = pipe(PROMPTS, num_inference_steps=5, guidance_scale=guidance, generator=generators, output_type="pt").images
    assert torch.allclose(pictures(build(tiny_pipeline), guidance), theirs, atol=2e-5)


def test_a_fresh_adapter_changes_nothing_and_gets_gradient_in_b_only(tiny_pipeline: Path) -> None:
    model = build(tiny_pipeline)
    with model.reference():
        base = pictures(model)
    assert torch.equal(pictures(model), base)
    x = torch.randn(2, *model.latent_shape)
    model.predict(model.denoiser, PROMPTS, 3.0)(x, torch.tensor([500.0, 500.0])).square().sum().backward()
    norms = {name: float(p.grad.norm()) for name, p in model.trained().items() if p.grad is not None}
    assert len(norms) == len(model.trained())
    assert all((norm > 0) == ("lora_B" in name) for name, norm in norms.items())


def test_adapter_off_equals_base_exactly_and_training_goes_on_after(tiny_pipeline: Path) -> None:
    model, plain = build(tiny_pipeline), build(tiny_pipeline)
    base = pictures(plain)
    perturb(model)
    tuned = pictures(model)
    assert not torch.allclose(tuned, base, atol=1e-3)
    flags = {name: p.requires_grad for name, p in model.denoiser.named_parameters()}
    with model.reference():
        assert torch.equal(pictures(model), base)
    assert torch.equal(pictures(model), tuned)
    assert {name: p.requires_grad for name, p in model.denoiser.named_parameters()} == flags
    assert {name for name, flag in flags.items() if flag} == set(model.trained())


def test_reference_inside_a_loss_leaves_the_gradient_alone(tiny_pipeline: Path) -> None:
    model = build(tiny_pipeline)
    perturb(model)
    x, time = torch.randn(2, *model.latent_shape), torch.tensor([500.0, 500.0])

    def gradient(reference: bool) -> torch.Tensor:
        out = model.predict(model.denoiser, PROMPTS, 3.0)(x, time)
        if reference:
            with torch.no_grad(), model.reference():
                model.predict(model.denoiser, PROMPTS, 3.0)(x, time)
        return torch.cat([g.flatten() for g in torch.autograd.grad(out.square().sum(), list(model.trained().values()))])

    assert torch.equal(gradient(True), gradient(False))


def test_full_fine_tuning_trains_every_weight_and_keeps_a_frozen_copy(tiny_pipeline: Path) -> None:
    model = build(tiny_pipeline, train="full", reference=True)
    assert set(model.trained()) == {name for name, _ in model.denoiser.named_parameters()}
    base = pictures(model)
    with torch.no_grad():
        next(iter(model.trained().values())).add_(0.1)
    assert not torch.allclose(pictures(model), base, atol=1e-4)
    with model.reference():
        assert torch.equal(pictures(model), base)
    with pytest.raises(RuntimeError, match="reference=True"), build(tiny_pipeline, train="full").reference():
        pass


@pytest.mark.parametrize("alpha", [None, 7.0])
def test_exported_adapter_gives_equal_images_in_plain_diffusers(
    tiny_pipeline: Path, tmp_path: Path, alpha: float | None
) -> None:
    model = build(tiny_pipeline, lora={"rank": 3, "alpha": alpha})
    perturb(model)
    model.export(tmp_path / "adapter", model.trained())
    script = f"""
import sys, torch
from diffusers import StableDiffusionPipeline, DDIMScheduler
pipe = StableDiffusionPipeline.from_pretrained({str(tiny_pipeline)!r}, safety_checker=None)
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
pipe.load_lora_weights({str(tmp_path / "adapter")!r})
generators = [torch.Generator().manual_seed(s) for s in {SEEDS}]
images = pipe({PROMPTS}, num_inference_steps=5, guidance_scale=3.0, generator=generators, output_type="pt").images
assert not any(m.startswith("raydiff") for m in sys.modules)
torch.save(images, {str(tmp_path / "images.pt")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path, capture_output=True)
    theirs = torch.load(tmp_path / "images.pt", weights_only=True)
    pipe = model.pipe
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True)
    generators = [torch.Generator().manual_seed(s) for s in SEEDS]
    ours = pipe(PROMPTS, num_inference_steps=5, guidance_scale=3.0, generator=generators, output_type="pt").images
    assert torch.equal(ours, theirs)  # bit for bit: the same weights and the same alpha arrived
    assert torch.allclose(pictures(model), theirs, atol=2e-5)


def test_a_round_starts_from_the_merged_adapters_of_earlier_ones(tiny_pipeline: Path, tmp_path: Path) -> None:
    first, second = (str(make_adapter(tiny_pipeline, tmp_path / str(i), seed=i, rank=2 + i)) for i in range(2))
    make_adapter(tiny_pipeline, tmp_path / "own", rank=8)
    merged = build(tiny_pipeline, adapters=[first, second])
    summed = drawing.load(Plugin(path=str(tiny_pipeline)), [drawing.Adapter(first), drawing.Adapter(second)])
    x, time = torch.randn(2, *merged.latent_shape), torch.tensor([500.0, 100.0])
    states = merged.embed(PROMPTS, 1.0)
    expected = summed.denoiser(x, time, encoder_hidden_states=states).sample.detach()
    base = build(tiny_pipeline).denoiser(x, time, encoder_hidden_states=states).sample.detach()
    assert (expected - base).abs().max() > 0.1
    assert torch.allclose(merged.predict(merged.denoiser, PROMPTS, 1.0)(x, time), expected, atol=1e-5)
    merged.load(tmp_path / "own")
    with merged.reference():
        assert torch.allclose(merged.predict(merged.denoiser, PROMPTS, 1.0)(x, time), expected, atol=1e-5)
    all_three = [drawing.Adapter(str(folder)) for folder in (first, second, tmp_path / "own")]
    summed = drawing.load(Plugin(path=str(tiny_pipeline)), all_three)
    expected = summed.denoiser(x, time, encoder_hidden_states=states).sample.detach()
    assert torch.allclose(merged.predict(merged.denoiser, PROMPTS, 1.0)(x, time), expected, atol=1e-5)


def test_a_previous_round_of_another_base_is_refused_by_its_field(tiny_pipeline: Path, tmp_path: Path) -> None:
    other = make_adapter(make_pipeline(tmp_path / "wide", width=24), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"model\.adapters: adapter .* is for another base model: .* is \(.*\) here"):
        Plugin(path=str(tiny_pipeline), adapters=(str(other),)).preflight()
    with pytest.raises(FileNotFoundError, match=r"model\.adapters: adapter 'nowhere': there is no .*safetensors"):
        Plugin(path=str(tiny_pipeline), adapters=("nowhere",)).preflight()


def test_half_precision_base_with_fp32_adapter_stays_close(tiny_pipeline: Path) -> None:
    single, half = build(tiny_pipeline), build(tiny_pipeline, dtype="bfloat16")
    assert half.pipe.unet.conv_in.weight.dtype == torch.bfloat16
    assert {p.dtype for p in half.trained().values()} == {torch.float32}
    assert (pictures(single) - pictures(half)).abs().mean() < 0.02


def test_decode_inverts_the_scaling_and_stays_in_the_unit_interval(tiny_pipeline: Path) -> None:
    model = build(tiny_pipeline)
    images = model.decode(torch.randn(2, *model.latent_shape) * 3)
    assert images.shape == (2, 3, 16, 16) and images.min() >= 0 and images.max() <= 1
    latents = model.encode(images)
    assert latents.shape == (2, *model.latent_shape)
    mode = model.pipe.vae.encode(images * 2 - 1).latent_dist.mode() * model.pipe.vae.config.scaling_factor
    assert torch.equal(latents, mode)


def test_saturated_pixels_can_come_back_but_not_go_further() -> None:
    x = torch.tensor([-0.5, 0.5, 1.5, -0.5, 1.5], requires_grad=True)
    push = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])  # d loss / d pixel: descent moves against it
    y = _UnitClamp.apply(x)
    (y * push).sum().backward()
    assert y.tolist() == [0.0, 0.5, 1.0, 0.0, 1.0]
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    "missing", ["unet/config.json", "vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"]
)
def test_a_broken_model_folder_names_the_file(tiny_pipeline: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_pipeline, folder)
    (folder / missing).unlink()
    part, name = missing.split("/")
    with pytest.raises(FileNotFoundError, match=f"{part}.*{name.split('.')[0]}"):
        Plugin(path=str(folder)).preflight()


def test_a_missing_model_and_pickled_weights_are_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a hub id"):
        Plugin(path=str(tmp_path / "nowhere")).preflight()
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_pipeline, folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").rename(folder / "unet/diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="only safetensors are loaded"):
        Plugin(path=str(folder)).build()


def test_exports_of_equal_weights_are_equal_files(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Adapters are told by their files' digests."""
    model = build(tiny_pipeline, lora={"rank": 2})
    for n in range(8):
        model.export(tmp_path / str(n), model.trained())
    assert len({file.read_bytes() for file in tmp_path.rglob("*.safetensors")}) == 1


def test_a_wrong_lora_target_is_named(tiny_pipeline: Path) -> None:
    with pytest.raises(ValueError, match="no module named 'to_qq'"):
        build(tiny_pipeline, lora={"targets": ["to_qq"]})
