"""Symmetry and colour, by hand."""

from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from raydiff.rewards.colour import region
from tests.rewards.conftest import plugin_of

Picture = Callable[..., Tensor]


def test_mirror_is_zero_for_a_symmetric_picture_only(picture: Picture) -> None:
    images = picture(2, 24, 20)
    for axis, side in (("left_right", 3), ("top_bottom", 2)):
        reward = plugin_of(kind="symmetry", axis=axis).build()
        assert torch.equal(reward(images + images.flip(side), ["", ""]), torch.zeros(2, dtype=torch.float64))
        assert (reward(images, ["", ""]) < 0).all()


def test_mirror_of_a_half_black_picture_is_minus_one() -> None:
    images = torch.zeros(1, 3, 4, 4)
    images[..., :2] = 1
    assert plugin_of(kind="symmetry").build()(images, [""]).item() == -1
    assert plugin_of(kind="symmetry", axis="top_bottom").build()(images, [""]).item() == 0


def test_anti_rotation_is_the_mean_over_three_quarter_turns() -> None:
    images = torch.zeros(1, 3, 2, 2)
    images[..., 0, :] = 1  # the upper half: a quarter turn differs in half of the pixels, a half turn in all
    reward = plugin_of(kind="symmetry", pattern="anti_rotation").build()
    torch.testing.assert_close(reward(images, [""]), torch.tensor([(0.5 + 1 + 0.5) / 3]))
    assert reward(torch.full((1, 3, 5, 5), 0.7), [""]).item() == 0


def test_anti_rotation_needs_a_square() -> None:
    with pytest.raises(ValueError, match="4 x 6"):
        plugin_of(kind="symmetry", pattern="anti_rotation").build()(torch.zeros(1, 3, 4, 6), [""])


def test_regions_are_a_frame_and_what_it_encloses() -> None:
    images = torch.zeros(1, 3, 32, 32)
    border, centre = region(images, "border", 0.125), region(images, "centre", 0.125)
    assert centre[4:28, 4:28].all()
    assert centre.sum() == 24 * 24
    assert torch.equal(border, ~centre)
    assert region(images, "all", 0.125).all()


@pytest.mark.parametrize("border", [0.001, 0.499])
@pytest.mark.parametrize("size", [(3, 3), (8, 8), (9, 5)])
def test_no_region_is_empty(border: float, size: tuple[int, int]) -> None:
    for name in ("border", "centre", "all"):
        assert region(torch.zeros(1, 3, *size), name, border).any()


@pytest.mark.parametrize("where", ["border", "centre", "all"])
def test_colour_is_a_mean_squared_distance_inside_the_region(where: str, picture: Picture) -> None:
    rgb = (0.2, 0.4, 0.8)
    reward = plugin_of(kind="colour", rgb=rgb, region=where, border=0.25).build()
    inside = region(torch.zeros(1, 3, 16, 16), where, 0.25)
    images = picture(2, 16).requires_grad_(True)
    score = reward(images, ["", ""])
    (grad,) = torch.autograd.grad(score.sum(), images)
    assert torch.equal(grad[0, 0] != 0, inside)
    assert torch.equal(grad[0, 0] == 0, ~inside)
    filled = torch.where(inside, torch.tensor(rgb, dtype=torch.float64)[:, None, None], images.detach())
    torch.testing.assert_close(reward(filled, ["", ""]), torch.zeros(2, dtype=torch.float64))
    shifted = filled + 0.1
    torch.testing.assert_close(reward(shifted, ["", ""]), torch.full((2,), -0.01, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "colour", "region": "middle"}, "'border', 'centre' or 'all'"),
        ({"kind": "colour", "border": 0.5}, "border"),
        ({"kind": "colour", "rgb": (0, 0, 255)}, "less than or equal to 1"),
        ({"kind": "symmetry", "pattern": "rotate"}, "'mirror' or 'anti_rotation'"),
        ({"kind": "symmetry", "axes": "x"}, "did you mean 'axis'"),
    ],
)
def test_impossible_settings_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        plugin_of(**fields)
