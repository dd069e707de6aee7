"""A block is refused unless it is due, young enough, and from the published weights on the learner's own base."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from raydiff import fingerprint
from raydiff.config import Run
from raydiff.distributed import rows, weights
from raydiff.distributed.proof import Published
from raydiff.distributed.rows import Columns
from raydiff.distributed.weights import SyncError
from raydiff.session import Session

MakeRun = Callable[..., Run]
STEP = 3


class Side:
    """A learner or a generator: the tiny model after so many updates, each of which moves every weight."""

    def __init__(self, run: Run, version: int) -> None:
        self.session, self.version = Session(run), version
        with torch.no_grad():
            for p in self.session.model.trained().values():
                p.add_(0.01 * version)

    def base(self) -> dict[str, str]:
        return fingerprint.of_model(self.session.model)

    def digest(self) -> str:
        return weights.digest(weights.to_numpy(self.session.model.trained()))

    def columns(self, ticket: int, base: Mapping[str, str] | None = None) -> Columns:
        probe, base = weights.probe(self.session), json.dumps(base or self.base())  # type: ignore[assignment]
        rollouts = self.session.sample(STEP, ticket % 2)
        shared = {"version": self.version, "digest": self.digest(), "probe": probe, "base": base}
        columns = rows.to_columns(rollouts, ticket)
        return columns | {name: np.repeat(np.asarray(v)[None], len(rollouts), axis=0) for name, v in shared.items()}


@pytest.fixture(scope="module")
def run(tiny_run: MakeRun) -> Run:
    return tiny_run(changes={"generation.max_staleness": 1})


@pytest.fixture(scope="module")
def published(run: Run) -> Published:
    learner = Side(run, 0)
    found = Published(run, learner.base())
    for version in range(STEP + 1):
        side = Side(run, version)
        found.add(version, side.digest(), weights.probe(side.session))
    return found


@pytest.mark.parametrize("version", [STEP, STEP - 1])
def test_what_is_due_passes(run: Run, published: Published, version: int) -> None:
    assert published.check(Side(run, version).columns(6), STEP, 6) == (STEP - version, 0.0)


@pytest.mark.parametrize("version", [STEP + 1, STEP - 2, 0])
def test_a_version_that_is_too_old_or_not_there_yet_is_refused(run: Run, published: Published, version: int) -> None:
    with pytest.raises(SyncError, match=r"updates old, and generation\.max_staleness = 1"):
        published.check(Side(run, version).columns(6), STEP, 6)


@pytest.mark.parametrize("ticket", [5, 7, 0])
def test_a_lost_or_doubled_block_is_refused(run: Run, published: Published, ticket: int) -> None:
    with pytest.raises(SyncError, match=f"block {ticket} came where 6 was due"):
        published.check(Side(run, STEP).columns(ticket), STEP, 6)


def a_word(model: Any) -> None:
    model.pipe.tokenizer.add_tokens(["porcupine"])


def scaled(part: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        with torch.no_grad():
            next(iter(getattr(model.pipe, part).parameters())).mul_(1.001)

    return change


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("tokenizer's settings", a_word),
        ("text_encoder", scaled("text_encoder")),
        ("vae", scaled("vae")),
        ("scheduler's settings", lambda model: model.pipe.scheduler.register_to_config(beta_start=0.001)),
    ],
)
def test_another_base_is_refused_though_the_network_answers_alike(
    run: Run, published: Published, named: str, change: Callable[[Any], None]
) -> None:
    side = Side(run, STEP)
    change(side.session.model)
    with pytest.raises(SyncError, match=f"a generator holds another {named} than the trainer"):
        published.check(side.columns(6), STEP, 6)


def test_weights_that_did_not_arrive_are_refused(run: Run, published: Published) -> None:
    side = Side(run, STEP - 1)
    side.version = STEP  # it says so
    with pytest.raises(SyncError, match="the weights did not arrive"):
        published.check(side.columns(6), STEP, 6)


@pytest.mark.parametrize("updates", [0, 50])
def test_a_network_that_computes_with_other_weights_is_refused_however_far_training_has_moved(run: Run, updates: int) -> None:
    """The digest is of what it says it holds; the probe is of what it computes with."""
    start, now, deaf = Side(run, 0), Side(run, updates + 1), Side(run, updates)
    published = Published(run, start.base())
    published.add(0, start.digest(), weights.probe(start.session))
    published.add(STEP, now.digest(), weights.probe(now.session))
    columns = deaf.columns(6) | {"version": np.array([STEP]), "digest": np.array([now.digest()])}
    with pytest.raises(SyncError, match="its network answers as if it did not"):
        published.check(columns, STEP, 6)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-4), ("bfloat16", 3e-2), ("float16", 1e-2)])
def test_rounding_passes_and_no_more(tiny_run: MakeRun, run: Run, dtype: str, limit: float) -> None:
    probe = np.linspace(1, 2, weights.PROBE, dtype=np.float32)
    other = tiny_run(changes={"model.dtype": dtype})
    published = Published(other, {})
    published.add(0, "d", probe)
    columns = {name: np.array([value]) for name, value in (("ticket", 0), ("version", 0), ("digest", "d"), ("base", "{}"))}
    assert published.check(columns | {"probe": 0.9 * limit * probe[None] + probe}, 0, 0)[1] == pytest.approx(
        0.9 * limit, rel=1e-2
    )
    with pytest.raises(SyncError, match="of which rounding explains"):
        published.check(columns | {"probe": 1.1 * limit * probe[None] + probe}, 0, 0)
