"""Every recipe's losses at fixed seeds are those that were recorded."""

import json

import pytest

from tests import recorded


def test_each_recipe_is_recorded() -> None:
    assert sorted(json.loads(recorded.FILE.read_text())) == recorded.recipes()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", recorded.recipes())
def test_losses_are_as_recorded(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recorded.ROOT)
    before = json.loads(recorded.FILE.read_text())[recipe]
    assert list(recorded.differences(recipe, recorded.record(recipe), before)) == []


def test_a_difference_is_seen() -> None:
    before = [{"step": 1.0, "loss": 0.5, "grad_norm": 2.0}]
    assert list(recorded.differences("x", before, before)) == []
    for change in ({"loss": 0.50002}, {"loss": float("inf")}, {"more": 1.0}):
        assert len(list(recorded.differences("x", [{**before[0], **change}], before))) == 1
    assert len(list(recorded.differences("x", [{"step": 1.0, "loss": 0.5}], before))) == 1
