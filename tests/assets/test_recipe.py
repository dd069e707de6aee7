"""The recipe's pure functions and its training loop."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor, nn

from raydiff.assets.recipe import training
from raydiff.assets.recipe.aesthetic import RANK, StyleHead, preference_pairs
from raydiff.assets.recipe.clip import contrastive_loss
from raydiff.assets.recipe.diffusion import min_snr_loss, stratified_times
from raydiff.assets.recipe.pictures import Art, colour_odds, draw, nearest_colour
from raydiff.assets.recipe.sampling import save_grid
from raydiff.assets.recipe.tokenizer import byte_pairs
from raydiff.assets.recipe.training import Schedule, train
from raydiff.assets.recipe.vae import psnr
from raydiff.assets.recipe.words import (
    COLOURS,
    NAMES,
    STYLES,
    Subject,
    caption,
    held_out_pairs,
    holds_out,
    random_caption,
    styles_of,
    train_prompts,
)


def opaque_square(count: int) -> Art:
    """Black squares that fill their frame, one picture a name."""
    pixels = torch.zeros(count, 4, 64, 64)
    pixels[:, 3] = 1
    names = torch.arange(count) % len(NAMES)
    styles = torch.arange(count) % len(STYLES)
    return Art(pixels, names, styles, torch.zeros(count, dtype=torch.bool), colour_odds(hold_out=True))


def test_captions_read_as_english() -> None:
    assert caption(Subject("ant")) == "an ant"
    assert caption(Subject("cherries", colour="orange")) == "cherries on an orange background"
    assert caption(Subject("cat", "3d", "blue", face=True)) == "a cat face in 3d style on a blue background"


def test_random_captions_drop_parts_and_add_none() -> None:
    subject, rng = Subject("cat", "flat", "red", face=True), random.Random(0)
    captions = [random_caption(subject, rng) for _ in range(1000)]
    assert len(set(captions)) == 8
    assert sum("red" in text for text in captions) == pytest.approx(600, abs=60)
    assert not any("face" in random_caption(replace(subject, face=False), rng) for _ in range(50))


def test_hold_out_takes_at_most_one_style_and_one_colour_a_name() -> None:
    pairs = [held_out_pairs(name) for name in NAMES]
    assert all(len(styles) <= 1 and len(colours) <= 1 for styles, colours in pairs)
    total = sum(len(styles_of(name)) + len(COLOURS) for name in NAMES)
    assert 0.06 < sum(len(styles) + len(colours) for styles, colours in pairs) / total < 0.09
    assert all(any(holds_out(name, attribute) for name in NAMES) for attribute in (*STYLES, *COLOURS) if attribute != "white")


def test_training_never_draws_a_held_out_colour() -> None:
    odds = colour_odds(hold_out=True)
    assert torch.allclose(odds.sum(dim=1), torch.ones(len(NAMES)))
    for i, name in enumerate(NAMES):
        assert [odds[i, j].item() == 0 for j in range(len(COLOURS))] == [holds_out(name, c) for c in COLOURS]
    art, rng = opaque_square(len(NAMES)), Generator().manual_seed(0)
    for _ in range(20):
        _, colours = draw(art, torch.arange(len(art)), rng)
        assert not any(holds_out(NAMES[name], list(COLOURS)[colour]) for name, colour in zip(art.names, colours, strict=True))


def test_drawn_pictures_keep_subject_and_background_apart() -> None:
    art, rng = opaque_square(60), Generator().manual_seed(0)
    pixels, colours = draw(art, torch.arange(60), rng)
    assert pixels.shape == (60, 3, 32, 32)
    assert pixels.abs().max() <= 1
    assert (pixels[:, :, 16, 16] == -1).all()  # the subject covers the middle
    assert (nearest_colour(pixels) == colours).all()  # and never the border


def test_same_generator_draws_the_same_pictures() -> None:
    art = opaque_square(6)
    first, again = (draw(art, torch.arange(6), Generator().manual_seed(5))[0] for _ in range(2))
    assert torch.equal(first, again)


def test_pictures_are_mirrored_only_on_request() -> None:
    art = opaque_square(200)
    art.pixels[:, 0, :, :32] = 1  # red on the left
    ways = [draw(art, torch.arange(200), Generator().manual_seed(0), flip=flip)[0][:, 0, 16, 8] > 0 for flip in (True, False)]
    assert 70 < ways[0].sum() < 130
    assert ways[1].all()


def test_vocabulary_holds_each_word_of_a_caption() -> None:
    vocabulary, merges = byte_pairs(list(train_prompts()) * 2)
    words = {word for prompt in train_prompts() for word in prompt.split()}
    assert all(f"{word}</w>" in vocabulary for word in words)
    assert max(vocabulary, key=lambda piece: vocabulary[piece]) == "<|endoftext|>"
    assert all(first + second in vocabulary for first, second in merges)


def test_min_snr_weighs_by_hand() -> None:
    noise, predicted = torch.zeros(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    alpha = torch.tensor([0.5, 10 / 11])  # snr 1 and 10: weights 1 and 5 / 10
    loss, metrics = min_snr_loss(predicted, noise, alpha)
    assert loss.item() == pytest.approx(0.75)
    assert metrics["mse"] == pytest.approx(1.0)


def test_times_are_spread_over_the_whole_schedule() -> None:
    times = stratified_times(10, 1000, Generator().manual_seed(0))
    assert (times // 100).tolist() == list(range(10))


def test_contrastive_loss_shares_a_caption() -> None:
    logits = torch.tensor([[9.0, 9.0, 0.0], [9.0, 9.0, 0.0], [0.0, 0.0, 99.0]])
    _, metrics = contrastive_loss(logits, ["a cat", "a cat", "a dog"])
    assert metrics["retrieved"] == 1.0
    loss, _ = contrastive_loss(torch.zeros(4, 4), list("abcd"))
    assert loss.item() == pytest.approx(torch.tensor(4.0).log().item())


def test_preference_pairs_join_one_name_and_follow_the_order() -> None:
    art = opaque_square(2 * len(NAMES))  # every name twice, in different styles
    pairs = preference_pairs(art)
    winners, losers = pairs.T
    assert len(pairs) == len(NAMES)
    assert (art.names[winners] == art.names[losers]).all()
    assert (RANK[art.styles[winners]] < RANK[art.styles[losers]]).all()


def test_head_has_the_weights_of_laions_predictor() -> None:
    assert {key.rsplit(".", 1)[0] for key in StyleHead(96).state_dict()} == {f"layers.{i}" for i in (0, 2, 4, 6, 7)}


def test_psnr_of_a_known_error() -> None:
    assert psnr(4 * 0.001) == pytest.approx(30.0)


def test_grid_lays_pictures_row_by_row(tmp_path: Path) -> None:
    from PIL import Image

    pixels = torch.linspace(-1, 1, 3)[:, None, None, None].expand(3, 3, 32, 32)
    save_grid(pixels, columns=2, file=tmp_path / "grid.png")
    image = Image.open(tmp_path / "grid.png")
    assert image.size == (196, 196)
    assert [image.getpixel(at) for at in ((9, 9), (107, 9), (9, 107), (107, 107))] == [
        (level,) * 3 for level in (0, 128, 255, 64)
    ]


def line(steps: int, work: Path, stop_at: int = -1) -> Tensor:
    """Fits a line with noisy data; stops with an error at a step, as a kill would."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1)

    def loss(rng: Generator, step: int) -> tuple[Tensor, dict[str, float]]:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(8, 1, generator=rng)
        return (model(x) - 3 * x - 1).square().mean(), {}

    train({"model": model}, loss, Schedule(steps=steps, learning_rate=0.1, warmup=1), work / "line.pt")
    return torch.cat([model.weight.detach().flatten(), model.bias.detach()])


def test_killed_training_goes_on_as_if_nothing_had_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SAVE_EVERY_S", 0.0)
    whole = line(60, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        line(60, tmp_path / "halves", stop_at=25)
    resumed = line(60, tmp_path / "halves")
    assert torch.equal(whole, resumed)


def test_schedule_warms_up_and_cools_down() -> None:
    schedule = Schedule(steps=1000, learning_rate=1.0, warmup=100)
    assert schedule.rate(0) == pytest.approx(0.01)
    assert schedule.rate(500) == 1.0
    assert schedule.rate(850) == pytest.approx(0.5)
    assert schedule.rate(999) == pytest.approx(0.02)


def average_of_ranks(work: Path) -> None:
    torch.manual_seed(training.rank())
    module = nn.Linear(2, 1)
    before = module.weight.detach().clone()
    training.average(module)
    torch.save((before, module.weight.detach()), work / f"{training.rank()}.pt")


def test_processes_average_their_weights(tmp_path: Path) -> None:
    training.spawn(average_of_ranks, tmp_path, count=2)
    (first, averaged), (second, same) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(averaged, same)
    assert torch.allclose(averaged, (first + second) / 2)
