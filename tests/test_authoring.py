"""The files that the documents show for a method, a reward and a model family of one's own: each is run as it stands there."""

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import raydiff
from raydiff import fingerprint, generate
from raydiff.config import ConfigError, Run, Sampler, override
from raydiff.contents import Contents, located
from raydiff.models.base import Model
from raydiff.plan.cost import count
from raydiff.plan.memory import measure
from raydiff.session import Session
from tests.test_documents import DOCUMENTS
from tests.tiny import IMAGE, make_tokenizer

FILES = {
    name: text
    for document in DOCUMENTS
    for text, name in re.findall(
        r"^```python\n(# my_package/(\w+)\.py.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL
    )
}


@pytest.fixture(scope="module", autouse=True)
def my_package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The files, on the path."""
    place = tmp_path_factory.mktemp("own")
    (place / "my_package").mkdir()
    for name, text in FILES.items():
        (place / "my_package" / f"{name}.py").write_text(text)
    sys.path.insert(0, str(place))
    yield
    sys.path.remove(str(place))
    for module in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        del sys.modules[module]


def test_each_page_has_its_file() -> None:
    assert FILES.keys() == {"darkness", "palette", "align_prop", "pixel"}


def metrics(run: Run) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in raydiff.fit(run)]


QUICK = {"evaluate.images": 2, "evaluate.grid": 0, "evaluate.clip": None, "evaluate.drift_images": 0, "sampler.guidance": 1.0}


def test_readmes_reward(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run("draft_k", {**QUICK, "rewards": {"dark": {"kind": "my_package.darkness"}}, "train.updates": 1})
    images = torch.rand(3, 3, 5, 5)
    (reward,) = run.rewards.named.values()
    torch.testing.assert_close(reward.build()(images, ["a"] * 3), -images.flatten(1).mean(1))
    before, after = metrics(run)
    assert after["grad_norm"] > 0 and before["held_out/dark"] < 0


def test_a_reward_that_reads_a_file(tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    from raydiff.pictures import save, to_pil

    pixels = torch.randint(256, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    file = save(to_pil(pixels), tmp_path / "sunset.png")
    changes = {"rewards": {"palette": {"kind": "my_package.palette", "path": str(file)}}}
    run = tiny_run("draft_k", {**QUICK, **changes, "train.updates": 1})
    (config,) = run.rewards.named.values()
    reward = config.build()
    image = pixels / 255
    twice = image.repeat_interleave(2, 1).repeat_interleave(2, 2)  # the same colours in four times the pixels
    assert reward(torch.stack([image, image]), ["a", "b"]).tolist() == [0, 0]
    assert float(reward(twice[None], ["a"])) == pytest.approx(0, abs=1e-10)
    lighter = (image + 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(lighter[None], ["a"]).sum(), lighter)
    torch.testing.assert_close(gradient, torch.full_like(image, -2 * 0.5 / image.numel()))  # of -(mean square of 0.5)
    assert metrics(run)[1]["grad_norm"] > 0

    assert located(run)["rewards.palette.path"] == file
    held = Contents.of(run)
    save(to_pil(255 - pixels), file)
    with pytest.raises(ConfigError, match=r"rewards\.palette\.path"):
        held.compare(Contents.of(run).digests)
    file.write_bytes(b"none")
    with pytest.raises(ValueError, match="path = "):
        config.preflight()


def test_a_method_draws_its_k(tiny_run: Callable[..., Run]) -> None:
    """It is DRaFT-K: at longest = 1 in each update, else in the first one at the K that was drawn."""
    same = {**QUICK, "method.kl": 0.1, "train.updates": 2}
    one, other = metrics(tiny_run("my_package.align_prop", {**same, "method.longest": 1})), metrics(tiny_run("draft_k", same))
    assert [row.pop("k") for row in one[1:]] == [1, 1]
    assert one == other

    drawn = metrics(tiny_run("my_package.align_prop", {**QUICK, "method.longest": 4, "train.updates": 6}))[1:]
    ks = [int(row.pop("k")) for row in drawn]
    assert len(set(ks)) > 1 and set(ks) <= {1, 2, 3, 4}
    other = metrics(tiny_run("draft_k", {**QUICK, "method.k": ks[0], "train.updates": 1}))
    for name in ("loss", "grad_norm", "denoiser_backward", "reward/total"):
        assert drawn[0][name] == other[1][name]
    with pytest.raises(ConfigError, match=r"method\.longest = 5 is more than sampler\.steps = 4"):
        tiny_run("my_package.align_prop", {"method.longest": 5})
    assert count(tiny_run("my_package.align_prop", {"method.longest": 4}))[0].denoiser_backward > 0


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of the family: a UNet of three channels under the tiny pipeline's text encoder."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder, tokenizer = tmp_path_factory.mktemp("pixels"), make_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=IMAGE, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
            cross_attention_dim=16, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    for name, part in {
        "unet": unet,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": DDIMScheduler(),
    }.items():
        part.save_pretrained(folder / name)
    return folder


@pytest.fixture
def pixel_run(pixels: Path, tiny_run: Callable[..., Run]) -> Callable[..., Run]:
    def make(changes: dict[str, Any] | None = None) -> Run:
        model = {"kind": "my_package.pixel", "path": str(pixels), "lora": {"rank": 2}}
        return tiny_run("draft_k", {"model": model, "train.updates": 2, **(changes or {})})

    return make


def drawn(model: Model) -> list[bytes]:
    sampler = Sampler(steps=2, guidance=2.0)
    return [s.image.tobytes() for s in generate.samples(model, ["a cat", "a dog"], [0], sampler, batch=1)]


def test_a_model_family_trains_and_its_adapter_is_loaded_again(pixel_run: Callable[..., Run], tmp_path: Path) -> None:
    run = pixel_run({"method.kl": 0.1})
    rows = list(raydiff.fit(run, folder=tmp_path / "adapter"))
    assert rows[1]["kl"] == 0 and rows[2]["kl"] > 0  # the reference is the model from before training
    assert rows[-1]["grad_norm"] > 0 and rows[-1]["drift"] > 0

    base, adapter = run.model.load(), str(tmp_path / "adapter")
    trained = run.model.load(adapters=[(adapter, 1.0)])
    assert drawn(trained) != drawn(base)
    again = run.model.build(seed=5)
    assert drawn(again) == drawn(base)  # an adapter that is new changes nothing
    again.load(adapter)
    merged = override(run, {"model.adapters": [adapter]}).model.build()
    assert drawn(again) == drawn(trained)
    for one, other in zip(drawn(merged), drawn(trained), strict=True):
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 1  # levels: the sum is rounded


def test_a_model_family_is_planned_and_told_apart(pixel_run: Callable[..., Run], pixels: Path) -> None:
    run = pixel_run()
    session = Session(run)
    plan = measure(run, pixels)
    assert plan.parameters["trained"] == sum(p.numel() for p in session.model.trained().values())
    assert plan.parameters["text_encoder"] == sum(p.numel() for p in session.model.parts()["text_encoder"].parameters())
    assert plan.memory.update > 0 and plan.latent == plan.picture == 3 * IMAGE**2

    before = fingerprint.of_model(session.model)
    session.model.trained().popitem()[1].data += 1
    assert fingerprint.of_model(session.model) == before  # trained weights do not count
    session.model.parts()["text_encoder"].get_parameter("final_layer_norm.bias").data += 1
    assert {name for name, digest in fingerprint.of_model(session.model).items() if digest != before[name]} == {"text_encoder"}

    images = torch.rand(2, 3, IMAGE, IMAGE)
    torch.testing.assert_close(session.model.decode(session.model.encode(images)), images)
    assert {f"model.path/{part}" for part in ("unet", "text_encoder", "tokenizer", "scheduler")} <= located(run).keys()


def test_a_model_family_refuses_what_it_cannot_do(pixel_run: Callable[..., Run], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'model\.train = "full"'):
        pixel_run({"model.train": "full"})
    with pytest.raises(FileNotFoundError, match="no folder 'unet'"):
        pixel_run({"model.path": str(tmp_path)}).model.preflight()
