"""generate: the pictures are those of training and of diffusers, mixtures are sums of ΔW, and files say what they are of."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from raydiff import generate
from raydiff.config import Sampler
from raydiff.core.policy import Policy
from raydiff.generate import Adapter
from raydiff.models import lora
from raydiff.models.stable_diffusion import Plugin
from tests.tiny import make_adapter, make_pipeline

PROMPTS = ("a cat", "a dog")
SAMPLER = Sampler(steps=4, guidance=2.0)


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path) -> Plugin:
    return Plugin(path=str(tiny_pipeline))


@pytest.fixture(scope="module")
def adapters(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of one base: other seeds, ranks and scales."""
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(tiny_pipeline, folder / "a", seed=1),
        make_adapter(tiny_pipeline, folder / "b", seed=2, rank=3, alpha=6),
        make_adapter(tiny_pipeline, folder / "c", seed=3, rank=1, alpha=0.5),
    ]


def draw(model: Plugin, adapters: list[Adapter] | tuple[Adapter, ...] = (), sampler: Sampler = SAMPLER) -> np.ndarray:
    """(P·N,H,W,3) uint8."""
    loaded = generate.load(model, adapters)
    return np.stack([np.array(s.image) for s in generate.samples(loaded, PROMPTS, [7, 8], sampler)])


def plain(folder: Path, scheduler: dict, **options) -> tuple:
    """What a user writes by hand, without raydiff."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **scheduler)
    pipe.set_progress_bar_config(disable=True)
    return (
        pipe,
        lambda prompts, seeds: pipe(prompts, generator=[torch.Generator().manual_seed(s) for s in seeds], **options).images,
    )


@pytest.mark.parametrize(
    ("sampler", "scheduler"),
    [
        (SAMPLER, {"timestep_spacing": "trailing", "set_alpha_to_one": True}),
        (Sampler(steps=5, guidance=1.0, spacing=None, final_alpha=None), {}),
        (Sampler(steps=8, guidance=7.5, spacing="leading", final_alpha=1.0), {"set_alpha_to_one": True}),
        (Sampler(steps=20, guidance=3.0, spacing="trailing", final_alpha=None), {"timestep_spacing": "trailing"}),
    ],
)
def test_a_seed_gives_the_picture_of_a_plain_pipeline_bit_for_bit(
    tiny_pipeline: Path, model: Plugin, sampler: Sampler, scheduler: dict
) -> None:
    _, call = plain(tiny_pipeline, scheduler, num_inference_steps=sampler.steps, guidance_scale=sampler.guidance)
    loaded = generate.load(model)
    for prompt in PROMPTS:
        (drawn,) = generate.samples(loaded, [prompt], [7], sampler)
        assert (np.array(drawn.image) == np.array(call([prompt], [7])[0])).all()
    together = [np.array(s.image) for s in generate.samples(loaded, PROMPTS, [7, 8], sampler, batch=4)]
    assert (np.stack(together) == np.stack(call(["a cat"] * 2 + ["a dog"] * 2, [7, 8, 7, 8]))).all()


def test_an_adapter_gives_the_picture_of_load_lora_weights(tiny_pipeline: Path, model: Plugin, adapters: list[Path]) -> None:
    scheduler = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe, call = plain(tiny_pipeline, scheduler, num_inference_steps=4, guidance_scale=2.0)
    pipe.load_lora_weights(adapters[1])
    assert (draw(model, [Adapter(str(adapters[1]))]) == np.stack(call(["a cat"] * 2 + ["a dog"] * 2, [7, 8, 7, 8]))).all()


def test_pictures_are_those_that_training_saw(tiny_pipeline: Path, model: Plugin, adapters: list[Path]) -> None:
    trained = Plugin.model_validate({"path": str(tiny_pipeline), "lora": {"rank": 2}}).build(seed=5)
    trained.load(adapters[0])
    schedule = trained.schedule(SAMPLER.steps, SAMPLER.spacing, SAMPLER.final_alpha)
    policy = Policy(trained, trained.denoiser, schedule, score=None, guidance=SAMPLER.guidance)  # type: ignore[arg-type]
    latents, _ = policy.sample(["a cat"] * 2 + ["a dog"] * 2, [7, 8, 7, 8])
    seen = (trained.decode(latents) * 255).round().permute(0, 2, 3, 1).detach().numpy()
    assert (seen == draw(model, [Adapter(str(adapters[0]))])).all()
    assert np.abs(seen - draw(model)).max() > 10  # and the adapter is seen


def test_the_order_of_a_mixture_changes_no_bit(model: Plugin, adapters: list[Path]) -> None:
    mixture = [Adapter(str(a), w) for a, w in zip(adapters, (0.7, -0.4, 1.3), strict=True)]
    first, *others = [draw(model, [mixture[i] for i in order]) for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0))]
    assert all((first == other).all() for other in others)
    assert (first != draw(model)).any()


def test_weight_zero_is_the_base_bit_for_bit(model: Plugin, adapters: list[Path]) -> None:
    base = draw(model)
    assert (draw(model, [Adapter(str(a), 0.0) for a in adapters]) == base).all()
    assert (
        draw(model, [Adapter(str(adapters[0]), 0.0), Adapter(str(adapters[1]))]) == draw(model, [Adapter(str(adapters[1]))])
    ).all()


def test_a_mixture_is_the_weighted_sum_of_the_deltas(model: Plugin, adapters: list[Path]) -> None:
    """ΔW of each layer against alpha/rank·B·A straight from the files: linear in λ, and 1 is the trained adapter."""
    weights = (0.25, -2.0, 1.0)
    loaded = generate.load(model, [Adapter(str(a), w) for a, w in zip(adapters, weights, strict=True)])
    expected: dict[str, torch.Tensor] = {}
    for folder, weight in zip(adapters, weights, strict=True):
        tensors = load_file(folder / lora.WEIGHTS)
        with safe_open(folder / lora.WEIGHTS, "pt") as file:
            config = json.loads(file.metadata()["lora_adapter_metadata"])
        for key in [k for k in tensors if ".lora_A." in k]:
            delta = config["unet.lora_alpha"] / config["unet.r"] * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
            name = key.removeprefix("unet.").removesuffix(".lora_A.weight")
            expected[name] = expected.get(name, 0) + weight * delta
    layers = {n: m for n, m in loaded.denoiser.named_modules() if hasattr(m, "get_delta_weight")}
    assert layers.keys() == expected.keys()
    for name, layer in layers.items():
        torch.testing.assert_close(sum(layer.get_delta_weight(a) for a in layer.active_adapters), expected[name])


def test_an_exported_adapter_loads_back_exactly(tiny_pipeline: Path, adapters: list[Path], tmp_path: Path) -> None:
    build = {"path": str(tiny_pipeline), "lora": {"rank": 3, "alpha": 6.0}}
    model = Plugin.model_validate(build).build(seed=9)
    model.load(adapters[1])
    model.export(tmp_path, model.trained())
    loaded, given = (load_file(folder / lora.WEIGHTS) for folder in (tmp_path, adapters[1]))
    assert loaded.keys() == given.keys()
    assert all(torch.equal(loaded[key], given[key]) for key in given)
    with pytest.raises(ValueError, match="another rank or targets"):
        model.load(adapters[0])


def test_a_fully_trained_unet_is_drawn_alone_and_not_mixed(
    tiny_pipeline: Path, model: Plugin, adapters: list[Path], tmp_path: Path
) -> None:
    full = Plugin.model_validate({"path": str(tiny_pipeline), "train": "full"}).build()
    full.export(tmp_path, {name: p + 0.05 for name, p in full.trained().items()})
    drawn = draw(model, [Adapter(str(tmp_path))])
    assert (drawn != draw(model)).any()
    full.load(tmp_path)
    assert torch.equal(full.trained()["conv_in.bias"], generate.load(model, [Adapter(str(tmp_path))]).denoiser.conv_in.bias)
    for mixture in ([Adapter(str(tmp_path), 0.5)], [Adapter(str(tmp_path)), Adapter(str(adapters[0]))]):
        with pytest.raises(ValueError, match="alone and at weight 1"):
            draw(model, mixture)


def test_an_adapter_of_another_base_is_refused_with_the_layer(adapters: list[Path], tmp_path: Path) -> None:
    wider = Plugin(path=str(make_pipeline(tmp_path / "wider", width=20)))
    with pytest.raises(ValueError, match=r"another base model: down_blocks\.1\.attentions\.0\S* is \(40, \d+\) here"):
        generate.load(wider, [Adapter(str(adapters[0]))])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    tensors = load_file(adapters[0] / lora.WEIGHTS)
    save_file({k.replace("down_blocks.1", "down_blocks.7"): t for k, t in tensors.items()}, foreign / lora.WEIGHTS)
    with pytest.raises(ValueError, match=r"no layer 'down_blocks\.7\."):
        lora.check_fits(wider.build().denoiser, foreign)


def test_a_missing_and_a_broken_adapter_name_the_file(model: Plugin, adapters: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=lora.WEIGHTS):
        generate.check(model, [Adapter(str(tmp_path))])
    (tmp_path / lora.WEIGHTS).write_bytes((adapters[0] / lora.WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{lora.WEIGHTS} is broken"):
        generate.load(model, [Adapter(str(tmp_path))])


def test_adapter_and_weight_are_parsed(tmp_path: Path) -> None:
    assert Adapter.parse("runs/a") == Adapter("runs/a", 1.0)
    assert Adapter.parse("runs/a:-0.5") == Adapter("runs/a", -0.5)
    (tmp_path / "with:colon").mkdir()
    assert Adapter.parse(f"{tmp_path}/with:colon") == Adapter(f"{tmp_path}/with:colon", 1.0)
    assert Adapter.parse(f"{tmp_path}/with:colon:2") == Adapter(f"{tmp_path}/with:colon", 2.0)
    for text in ("runs/a:half", "runs/a:nan", "runs/a:"):
        with pytest.raises(ValueError, match="is not a number"):
            Adapter.parse(text)


def test_guidance_below_one_leans_to_the_empty_prompt(model: Plugin) -> None:
    """diffusers takes it for 1; training takes it as it is."""
    none, half, one = (draw(model, sampler=Sampler(steps=4, guidance=g)).astype(int) for g in (0.0, 0.5, 1.0))
    assert (none[:2] == none[2:]).all() and (one[:2] != one[2:]).any()  # at 0 the prompt says nothing
    assert (half != none).any() and (half != one).any()


def test_what_is_written_says_what_it_was_made_from(model: Plugin, adapters: list[Path], tmp_path: Path) -> None:
    mixture = [Adapter(str(adapters[0]), 0.5)]
    drawn = generate.samples(generate.load(model, mixture), PROMPTS, [7, 8, 9], SAMPLER)
    grid = generate.write(drawn, tmp_path, model=model, sampler=SAMPLER, adapters=mixture)
    index = json.loads((tmp_path / "images.json").read_text())
    assert [(i["prompt"], i["seed"]) for i in index["images"]] == [(p, s) for p in PROMPTS for s in (7, 8, 9)]
    assert index["adapters"] == [{"folder": str(adapters[0]), "weight": 0.5, "sha256": lora.digest(adapters[0])}]
    fifth = Image.open(tmp_path / index["images"][4]["file"])
    assert fifth.size == (16, 16)
    assert (fifth.text["prompt"], fifth.text["seed"], json.loads(fifth.text["sampler"])["steps"]) == ("a dog", "8", 4)
    assert json.loads(fifth.text["adapters"]) == index["adapters"]
    sheet = Image.open(grid)
    assert 3 * 128 < sheet.width < 4 * 128  # three seeds, each enlarged to 128 pixels
    assert 2 * 128 < sheet.height < 4 * 128  # two prompts, with room for captions
