"""Rewards that do what a reward must not: each is kept from spoiling anything, or refused in one sentence with its name."""

import asyncio
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raydiff import local
from raydiff.config import Run
from raydiff.contents import Contents
from raydiff.core.learner import TorchEngine
from raydiff.core.policy import NonFiniteReward, RewardFailed, checked
from raydiff.core.reward_vjp import RewardError, score_and_grad, weighted_sum
from raydiff.distributed import score
from raydiff.session import Scores, Session
from tests.rewards import naughty

PROMPTS = ["a cat", "a dog", "a fox"]
SEEDS = [11, 12, 13]
Reward = Callable[[Tensor, Sequence[str]], Any]


def pictures() -> Tensor:
    return torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def blue(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return -(images - images.new_tensor((0.1, 0.3, 0.9))[:, None, None]).square().mean((1, 2, 3))


def beside(reward: Reward) -> Any:
    """The score of a misbehaving reward and, after it, a good one."""
    return weighted_sum({"bad": reward, "good": blue}, {"bad": 0.0, "good": 1.0})


@pytest.mark.parametrize("name", naughty.SPOILERS)
@pytest.mark.parametrize("gradient", [True, False])
def test_what_a_reward_does_to_its_input_reaches_nothing_else(name: str, gradient: bool) -> None:
    images, prompts, alone = pictures().requires_grad_(gradient), list(PROMPTS), pictures().requires_grad_(gradient)
    total, parts = checked(beside(naughty.SPOILERS[name]), images, prompts, SEEDS)
    torch.testing.assert_close(parts["good"], blue(pictures(), PROMPTS))
    assert torch.equal(images.detach(), pictures())
    assert prompts == PROMPTS
    if gradient:
        total.sum().backward()
        blue(alone, PROMPTS).sum().backward()
        torch.testing.assert_close(images.grad, alone.grad)


def test_a_change_in_place_keeps_its_gradient() -> None:
    """Such rewards are common: images.mul_(2).sub_(1) is a CLIP's normalisation. Twice the blue distance moves as 2x does."""

    def doubled(images: Tensor, prompts: Sequence[str]) -> Tensor:
        images.mul_(2).sub_(1)
        return images.square().mean((1, 2, 3))

    images = pictures().requires_grad_(True)
    weighted_sum({"doubled": doubled}, {"doubled": 1.0})(images, PROMPTS)[0].sum().backward()
    torch.testing.assert_close(images.grad, 4 * (2 * pictures() - 1) / images[0].numel())


def test_a_buffer_that_is_returned_again_is_copied() -> None:
    buffer = torch.zeros(3)

    def reused(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return buffer.copy_(images.mean((1, 2, 3)))

    ask = weighted_sum({"reused": reused}, {"reused": 1.0})
    first = ask(pictures(), PROMPTS)[1]["reused"]
    ask(torch.zeros(3, 3, 8, 8), PROMPTS)
    torch.testing.assert_close(first, pictures().mean((1, 2, 3)))


@pytest.mark.parametrize("name", naughty.GLOBAL)
@pytest.mark.parametrize("gradient", [True, False])
def test_torchs_settings_are_what_they_were(name: str, gradient: bool) -> None:
    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    images = pictures().requires_grad_(gradient)
    total, _ = beside(naughty.GLOBAL[name])(images, PROMPTS)
    assert (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()) == before
    assert total.requires_grad == gradient


WRONG = {
    "list": (lambda images, prompts: [0.0] * len(images), "an object of type list"),
    "float": (lambda images, prompts: 0.5, "an object of type float"),
    "none": (lambda images, prompts: None, "an object of type NoneType"),
    "numpy": (lambda images, prompts: images.detach().mean((1, 2, 3)).numpy(), "an object of type ndarray"),
    "tuple": (lambda images, prompts: (blue(images, prompts), {}), "an object of type tuple"),
    "column": (lambda images, prompts: blue(images, prompts)[:, None], r"a tensor of shape \(3, 1\)"),
    "row": (lambda images, prompts: blue(images, prompts)[None], r"a tensor of shape \(1, 3\)"),
    "scalar": (lambda images, prompts: blue(images, prompts).mean(), r"a tensor of shape \(\)"),
    "short": (lambda images, prompts: blue(images, prompts)[1:], r"a tensor of shape \(2,\)"),
    "long": (lambda images, prompts: blue(images, prompts).repeat(2), r"a tensor of shape \(6,\)"),
    "int": (lambda images, prompts: torch.arange(3), "a tensor of type torch.int64"),
    "bool": (lambda images, prompts: blue(images, prompts) > 0, "a tensor of type torch.bool"),
    "complex": (lambda images, prompts: blue(images, prompts) * 1j, "a tensor of type torch.complex64"),
    "device": (lambda images, prompts: torch.zeros(3, device="meta"), "a tensor on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("gradient", [True, False])
def test_a_wrong_answer_is_named_with_what_it_must_be(name: str, gradient: bool) -> None:
    reward, found = WRONG[name]
    with pytest.raises(RewardFailed) as error:
        checked(beside(reward), pictures().requires_grad_(gradient), PROMPTS, SEEDS)  # type: ignore[arg-type]
    assert re.fullmatch(
        f"reward 'bad' failed: it returned {found}; it must return a float tensor of shape \\(3,\\) on cpu, one value for each"
        " picture",
        str(error.value),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_becomes_fp32(dtype: torch.dtype) -> None:
    score = weighted_sum(
        {"typed": lambda images, prompts: blue(images, prompts).to(dtype), "good": blue}, {"typed": 1, "good": 1}
    )
    images = pictures().requires_grad_(True)
    total, parts = score(images, PROMPTS)
    assert total.dtype == parts["typed"].dtype == torch.float32
    torch.testing.assert_close(parts["typed"], parts["good"], atol=1e-2, rtol=0)
    total.sum().backward()


@pytest.mark.parametrize("name", naughty.DETACHED)
def test_what_has_no_gradient_is_refused_where_one_is_needed(name: str) -> None:
    reward = naughty.DETACHED[name]
    message = "reward 'bad' failed: training needs its gradient, and none reaches the pictures: .*evaluate.rewards only"
    with pytest.raises(RewardFailed, match=message):
        checked(
            weighted_sum({"good": blue, "bad": reward}, {"good": 1.0, "bad": 1.0}), pictures().requires_grad_(), PROMPTS, SEEDS
        )
    with pytest.raises(RewardError, match=message):  # as a replica asks
        score_and_grad(weighted_sum({"bad": reward}, {"bad": 1.0}))(pictures(), PROMPTS)
    assert checked(beside(reward), pictures(), PROMPTS, SEEDS)[1]["bad"].isfinite().all()  # measured only, it will do


def test_not_finite_among_finite_ones_is_named() -> None:
    for value in (float("nan"), float("inf")):

        def broken(images: Tensor, prompts: Sequence[str], value: float = value) -> Tensor:
            return blue(images, prompts) * images.new_tensor([1.0, value, 1.0])

        with pytest.raises(NonFiniteReward, match=r"reward 'bad' is -?(nan|inf) for prompt 'a dog', seed 12"):
            checked(beside(broken), pictures().requires_grad_(), PROMPTS, SEEDS)


def test_a_finite_value_with_a_broken_gradient_is_named() -> None:
    def root(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (images - images.detach() * images.new_tensor([0.5, 1.0, 0.5])[:, None, None, None]).sum((1, 2, 3)).sqrt()

    with pytest.raises(RewardFailed, match=r"'bad' failed for prompt 'a dog', seed 12: its value is 0, and the gradient of it"):
        checked(weighted_sum({"bad": root}, {"bad": 1.0}), pictures().requires_grad_(), PROMPTS, SEEDS)


@pytest.mark.parametrize("name", naughty.RAISING)
@pytest.mark.parametrize("gradient", [True, False])
def test_what_raises_is_named_with_its_prompt_and_seed(name: str, gradient: bool) -> None:
    if name == "in the backward pass" and not gradient:
        return
    reward, message = naughty.RAISING[name]
    with pytest.raises(RewardFailed, match=rf"reward 'bad' failed for prompt 'a fox', seed 13: {message}"):
        checked(beside(reward), pictures().requires_grad_(gradient), PROMPTS, SEEDS)


def test_what_raises_for_the_batch_alone_names_no_prompt() -> None:
    def small(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if len(images) > 1:
            raise RuntimeError("out of memory")
        return blue(images, prompts)

    with pytest.raises(RewardFailed, match="^reward 'bad' failed: RuntimeError: out of memory$"):
        checked(beside(small), pictures(), PROMPTS, SEEDS)


def test_what_raises_once_is_asked_again() -> None:
    calls: list[int] = []

    def flaky(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(images))
        if len(calls) == 1:
            raise ConnectionError("try later")
        return blue(images, prompts)

    torch.testing.assert_close(checked(beside(flaky), pictures(), PROMPTS, SEEDS)[1]["bad"], blue(pictures(), PROMPTS))
    assert calls == [3, 3]


def test_an_empty_batch_asks_nobody() -> None:
    total, parts = beside(lambda images, prompts: 1 / 0)(torch.zeros(0, 3, 8, 8), [])
    assert total.shape == parts["bad"].shape == parts["good"].shape == (0,)


@pytest.fixture
def naughty_run(tiny_run: Callable[..., Run]) -> Callable[..., Run]:
    """naughty_run(how): DRaFT-1 on a reward that misbehaves, with `blue` beside it."""

    def make(how: str, method: str = "draft_k", **changes: Any) -> Run:
        bad = {"kind": "tests.rewards.naughty", "how": how, "weight": 0.5}
        rewards = {"bad": bad, "blue": {"kind": "colour"}, "where": changes.pop("where", "learner")}
        return tiny_run(method, {"rewards": rewards, "train.updates": 1, "evaluate.images": 2, **changes})

    return make


def last(run: Run) -> dict[str, float]:
    *_, row = local.fit(run)
    return {name: value for name, value in row.items() if name != "seconds"}


@pytest.mark.parametrize("how", ["in place", "numpy view", "prompts", "random seed", "default dtype", "grad off after"])
def test_a_run_with_it_is_the_run_with_an_honest_one(naughty_run: Callable[..., Run], how: str) -> None:
    """Rewards, gradient and pictures are bit for bit those of a run where the same values come without the mischief."""
    assert last(naughty_run(how)) == last(naughty_run("honest"))


def test_the_evaluations_pictures_are_what_was_drawn(naughty_run: Callable[..., Run]) -> None:
    spoilt, honest = (Session(naughty_run(how)).evaluate() for how in ("in place", "honest"))
    assert all(torch.equal(a.image, b.image) and a.rewards == b.rewards for a, b in zip(spoilt, honest, strict=True))


@pytest.mark.parametrize(
    ("how", "method", "message"),
    [
        ("raises", "draft_k", r"reward 'bad' failed for prompt 'a \w+', seed \d+: KeyError: 'judge'"),
        ("raises", "sft", r"reward 'bad' failed for prompt 'a \w+', seed \d+: KeyError: 'judge'"),
        ("backward", "draft_k", r"reward 'bad' failed for prompt 'a \w+', seed \d+: ValueError: no way back"),
        ("detached", "draft_k", "reward 'bad' failed: training needs its gradient"),
        ("column", "sft", r"reward 'bad' failed: it returned a tensor of shape \(\d, 1\)"),
    ],
)
def test_a_run_ends_with_its_name(naughty_run: Callable[..., Run], how: str, method: str, message: str) -> None:
    session = Session(naughty_run(how, method))
    optimizer, scheduler = session.optimizer()
    engine = TorchEngine(optimizer, scheduler, session.geometry.step_accumulation, 1.0)
    with pytest.raises(RewardFailed, match=message):
        session.update(engine, 0)


@pytest.mark.parametrize("how", ["in place", "numpy view", "prompts", "default dtype", "grad off after"])
def test_a_replica_answers_as_the_learner_does(
    naughty_run: Callable[..., Run], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "device", lambda cpus: torch.device("cpu"))
    replica = score.RewardReplica(naughty_run(how, where="pool").model_dump_json(), ("bad", "blue"))
    answer = asyncio.run(replica.score(pictures().numpy(), list(PROMPTS), False, True))
    assert not isinstance(answer, RewardError)
    _, parts, gradient = score_and_grad(Scores.here(naughty_run("honest"), "cpu").training)(pictures(), PROMPTS)
    assert torch.equal(torch.from_numpy(answer.gradient), gradient)
    assert all(torch.equal(torch.from_numpy(answer.parts[name]), parts[name]) for name in parts)


@pytest.mark.parametrize("how", ["detached", "column"])
def test_a_replica_refuses_as_the_learner_does(
    naughty_run: Callable[..., Run], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score, "device", lambda cpus: torch.device("cpu"))
    replica = score.RewardReplica(naughty_run(how, where="pool").model_dump_json(), ("bad", "blue"))
    answer = asyncio.run(replica.score(pictures().numpy(), list(PROMPTS), False, True))
    assert isinstance(answer, RewardError)
    assert (answer.name, answer.row) == ("bad", None)


def test_score_leaves_out_the_row_that_raises_and_ends_where_all_would(naughty_run: Callable[..., Run], tmp_path: Path) -> None:
    from PIL import Image

    from raydiff.data.images import Columns
    from raydiff.distributed.batch import Output
    from raydiff.distributed.score_batch import Scorer

    rows = [(i, Image.new("RGB", (8, 8), (40 * i, 9, 9)), prompt) for i, prompt in enumerate(["a cat", "a pig", "a fox"])]

    def scored(how: str) -> tuple[dict[str, Any], list[str]]:
        rewards = naughty_run(how).rewards.named
        scorer = Scorer(Output(str(tmp_path)), rewards, None, Columns(), str(tmp_path), 4, 4, Contents({}).dump(), "cpu")
        parts, reasons = {name: torch.full((3,), torch.nan).numpy() for name in rewards}, ["", "", ""]
        scorer._score(rows, parts, reasons)
        return parts, reasons

    parts, reasons = scored("raises for a pig")
    assert reasons == ["", "reward 'bad' failed: KeyError: 'judge'", ""]
    assert list(torch.from_numpy(parts["bad"]).isfinite()) == [True, False, True]
    with pytest.raises(RewardError, match=r"'bad' failed: it returned a tensor of shape \(3, 1\)"):
        scored("column")


def test_a_reward_may_recompute_its_own_activations() -> None:
    from torch.utils.checkpoint import checkpoint

    def recomputed(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return checkpoint(blue, images, prompts, use_reentrant=True)

    found, expected = (
        score_and_grad(weighted_sum({"r": reward}, {"r": 1.0}))(pictures(), PROMPTS)[2] for reward in (recomputed, blue)
    )
    torch.testing.assert_close(found, expected)
