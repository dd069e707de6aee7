"""The currency between stages: taken apart and put together it is the same, and what does not belong together is refused."""

from dataclasses import replace

import pytest
import torch

from raydiff.core.rollouts import Rollouts
from tests.core.tiny import make_policy, make_rollouts


def test_rows_are_selected_and_joined_with_all_their_parts() -> None:
    batch = make_rollouts(make_policy(eta=1.0, final_alpha=None), ("a cat", "a horse", "an ant"), 2)
    batch = replace(batch, advantages=torch.arange(6.0).view(3, 2), epoch=2)
    again = Rollouts.cat([batch.select([0]), batch.select([1, 2])])
    assert (again.prompts, again.kept, again.epoch) == (batch.prompts, batch.kept, 2)
    for part in ("seeds", "latents", "log_probs", "advantages"):
        assert torch.equal(getattr(again, part), getattr(batch, part)), part
    assert torch.equal(again.total(), batch.total())
    for other in (
        replace(batch, advantages=None),
        replace(batch, log_probs=None),
        replace(batch, epoch=0),
        replace(batch, rewards=None),
    ):
        with pytest.raises(ValueError, match="cannot be one batch"):
            Rollouts.cat([batch, other])
    assert replace(batch.to("meta"), seeds=batch.seeds).advantages.device.type == "meta"  # type: ignore[union-attr]


def test_draws_of_a_loss_are_the_prompts_or_each_attempts_and_differ_by_pass() -> None:
    batch = make_rollouts(make_policy(), ("a cat", "a horse"), 3)
    shared, own = batch.loss_seeds(shared=True), batch.loss_seeds(shared=False)
    assert shared[0] == shared[1] == shared[2] != shared[3] == shared[4] and len(set(own)) == 6 and own[0] == shared[0]
    assert not set(own) & set(replace(batch, epoch=1).loss_seeds(shared=False))
    assert batch.select([1]).loss_seeds(shared=True) == shared[3:]
