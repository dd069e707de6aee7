"""Diffusion-DPO and D3PO on a float64 model: their losses and gradients against ones taken by hand."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from raydiff.config import ConfigError, Run
from raydiff.core.denoising import noised
from raydiff.core.policy import Policy
from raydiff.core.rollouts import Rollouts
from raydiff.core.schedule import Schedule
from raydiff.methods import d3po, diffusion_dpo
from raydiff.methods.base import Method
from raydiff.session import Session
from tests.core.tiny import SD, gradient, make_policy, make_rollouts

PROMPTS = ("a cat", "a horse", "an ant")
LABELS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
DPO = diffusion_dpo.Plugin(beta=200.0, caption_dropout=0.0)
D3PO = d3po.Plugin(beta=50.0)  # far enough from linear for a wrong sign or factor to show


def make(*, at_reference: bool = False) -> Policy:
    policy = make_policy(eta=1.0, final_alpha=None)
    if at_reference:
        with torch.no_grad():
            policy.model.trained()["delta"].zero_()
    return policy


def labelled(policy: Policy, labels: Tensor = LABELS) -> Rollouts:
    return make_rollouts(policy, PROMPTS, labels.shape[1], rewards=labels)


def value(method: Method, policy: Policy, batch: Rollouts) -> float:
    return method.loss(policy, batch)[0].item()


def errors(policy: Policy, batch: Rollouts, seeds: list[int], *, reference: bool = False) -> Tensor:
    """(B,G) denoising errors by hand, from the network itself, with the draws of `seeds`."""
    asked = noised(policy, batch.at(4), batch.flat_prompts(), seeds, 0.0)
    policy.denoiser.on = not reference  # type: ignore[assignment]
    codes = torch.tensor([len(p) / 10 for p in batch.flat_prompts()], dtype=torch.float64)
    out = policy.denoiser(asked.x, asked.time, codes)
    policy.denoiser.on = True  # type: ignore[assignment]
    return (out - asked.target).square().mean((1, 2, 3)).view(batch.seeds.shape)


def dpo_by_hand(policy: Policy, batch: Rollouts, seeds: list[int]) -> Tensor:
    """Eq. 14 with the official β, for labels that decide every pair."""
    sign = batch.total()[:, 0] - batch.total()[:, 1]  # 1: the first attempt wins
    ours, base = errors(policy, batch, seeds), errors(policy, batch, seeds, reference=True)
    inside = -0.5 * DPO.beta * sign * ((ours[:, 0] - ours[:, 1]) - (base[:, 0] - base[:, 1]))
    return -torch.log(1 / (1 + torch.exp(-inside))).mean()


def test_dpo_starts_at_log_2_with_a_quarter_beta_of_the_gradient_of_delta() -> None:
    policy = make(at_reference=True)
    batch = labelled(policy)
    loss, metrics = DPO.loss(policy, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15) and metrics["implicit_accuracy"] == 0.5
    ours = errors(policy, batch, batch.loss_seeds(shared=True))
    sign = LABELS[:, 0] - LABELS[:, 1]
    delta = (sign * (ours[:, 0] - ours[:, 1])).mean()
    expected = DPO.beta / 4 * gradient(delta, policy)
    assert expected.norm() > 0.1
    assert torch.allclose(gradient(loss, policy), expected, rtol=1e-9)


def test_dpo_is_equation_14_with_one_draw_for_both_sides() -> None:
    policy = make()
    batch = labelled(policy)
    shared = batch.loss_seeds(shared=True)
    assert value(DPO, policy, batch) == pytest.approx(dpo_by_hand(policy, batch, shared).item(), rel=1e-9)
    ours, by_hand = gradient(DPO.loss(policy, batch)[0], policy), gradient(dpo_by_hand(policy, batch, shared), policy)
    assert torch.allclose(ours, by_hand, rtol=1e-8)
    apart = dpo_by_hand(policy, batch, batch.loss_seeds(shared=False)).item()  # each side its own noise: another loss
    assert abs(apart - value(DPO, policy, batch)) > 1e-3


@pytest.mark.parametrize("method", [DPO, D3PO])
def test_swapping_winner_and_loser_flips_the_margin(method: Method) -> None:
    policy = make()
    batch = labelled(policy)
    margin = method.loss(policy, batch)[1]["margin"]
    swapped = method.loss(policy, replace(batch, rewards={"total": 1 - LABELS}))[1]["margin"]
    assert margin.abs() > 1e-3 and swapped.item() == pytest.approx(-margin.item(), rel=1e-9)
    assert value(method, policy, batch) != pytest.approx(value(method, policy, replace(batch, rewards={"total": 1 - LABELS})))


@pytest.mark.parametrize("method", [DPO, D3PO])
def test_ties_alone_give_zero_with_a_graph_and_say_so(method: Method) -> None:
    policy = make()
    loss, metrics = method.loss(policy, labelled(policy, torch.full((3, 2), 0.5)))
    assert loss.item() == 0.0 and metrics["pairs_used"] == 0 and metrics["implicit_accuracy"] == 0.5
    assert torch.count_nonzero(gradient(loss, policy)) == 0


@pytest.mark.parametrize("method", [DPO, D3PO])
def test_a_tie_among_pairs_is_left_out_of_the_mean(method: Method) -> None:
    policy = make()
    labels = LABELS.clone()
    labels[1] = 0.5
    ours = value(method, policy, labelled(policy, labels))
    decided = [value(method, policy, labelled(policy).select([b])) for b in (0, 2)]
    assert ours == pytest.approx(sum(decided) / 2, rel=1e-9)


@pytest.mark.parametrize("method", [DPO, D3PO])
def test_two_halves_of_a_batch_are_one_batch(method: Method) -> None:
    policy = make()
    whole = make_rollouts(policy, ("a cat", "a horse", "an ant", "a bee"), 2)
    loss = gradient(method.loss(policy, whole)[0], policy)
    halves = [gradient(method.loss(policy, whole.select(rows))[0], policy) for rows in ([0, 1], [2, 3])]
    assert torch.allclose(loss, (halves[0] + halves[1]) / 2, rtol=1e-9)


def test_all_pairs_are_the_mean_over_each_two_attempts() -> None:
    policy = make()
    batch = make_rollouts(policy, PROMPTS, 3)
    two = [
        replace(
            batch,
            seeds=batch.seeds[:, ij],
            latents=batch.latents[:, ij],
            log_probs=None,
            rewards={"total": batch.total()[:, ij]},
        )
        for ij in ([0, 1], [0, 2], [1, 2])
    ]
    two = [replace(b, seeds=batch.seeds[:, :2]) for b in two]  # the draws belong to the prompt
    for method in (DPO, D3PO):
        mean = sum(value(method, policy, b) for b in two) / 3
        assert value(method.model_copy(update={"pairs": "all"}), policy, batch) == pytest.approx(mean, rel=1e-9)
        best_worst = value(method, policy, batch)
        assert best_worst != pytest.approx(mean, rel=1e-3)
        order = batch.total().argsort(1)
        ends = torch.stack([order[:, 0], order[:, -1]], 1)
        rows = torch.arange(3)[:, None]
        only = replace(
            batch,
            seeds=batch.seeds[:, :2],
            latents=batch.latents[rows, ends],
            log_probs=None,
            rewards={"total": batch.total()[rows, ends]},
        )
        assert best_worst == pytest.approx(value(method, policy, only), rel=1e-9)


def test_dpo_without_beta_has_no_preference_and_ipo_wants_a_half() -> None:
    policy = make()
    batch = labelled(policy)
    assert value(DPO.model_copy(update={"beta": 1e-9}), policy, batch) == pytest.approx(math.log(2), abs=1e-9)
    margin = DPO.loss(policy, batch.select([0]))[1]["margin"].item()
    assert value(DPO.model_copy(update={"objective": "ipo"}), policy, batch.select([0])) == pytest.approx((margin - 0.5) ** 2)


def test_dpo_draws_anew_in_each_pass_and_for_other_seeds() -> None:
    policy = make()
    batch = labelled(policy)
    first = value(DPO, policy, batch)
    assert value(DPO, policy, batch) == first
    assert value(DPO, policy, replace(batch, epoch=1)) != pytest.approx(first, rel=1e-6)
    assert value(DPO, policy, replace(batch, seeds=batch.seeds + 100)) != pytest.approx(first, rel=1e-6)


def test_dpo_drops_the_captions_of_whole_pairs() -> None:
    policy, asked = make(), []
    predict = policy.model.predict

    def watched(denoiser, prompts, guidance, detach_negative=False):  # type: ignore[no-untyped-def]
        asked.append((list(prompts), guidance))
        return predict(denoiser, prompts, guidance, detach_negative)

    policy.model.predict = watched  # type: ignore[method-assign]
    batch = make_rollouts(policy, [f"prompt {n}" for n in range(40)], 2, rewards=torch.tensor([[1.0, 0.0]] * 40))
    asked.clear()
    DPO.model_copy(update={"caption_dropout": 0.5}).loss(policy, batch)
    (ours, guidance), (reference, _) = asked
    assert ours == reference and guidance == 1.0
    assert ours[::2] == ours[1::2] and 8 < ours[::2].count("") < 32


@pytest.mark.parametrize("method", [DPO, D3PO])
def test_training_makes_the_implicit_reward_agree_and_leaves_the_reference(method: Method) -> None:
    policy = make(at_reference=True)
    batch = make_rollouts(policy, [f"prompt {'x' * n}" for n in range(8)], 2)

    def judged() -> dict[str, float]:
        """Metrics over draws that training never sees."""
        with torch.no_grad():
            rows = [method.loss(policy, replace(batch, epoch=epoch))[1] for epoch in range(100, 104)]
        return {name: float(torch.stack([row[name] for row in rows]).mean()) for name in rows[0]}

    before = judged()
    optimizer = torch.optim.Adam(policy.model.trained().values(), lr=0.01)
    for epoch in range(12 if method is D3PO else 40):
        loss, _ = method.loss(policy, replace(batch, epoch=epoch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = judged()
    assert before["implicit_accuracy"] == 0.5 and after["implicit_accuracy"] > 0.65 and after["margin"] > before["margin"] == 0
    if "reference_error" in before:
        assert after["reference_error"] == before["reference_error"] == before["policy_error"] != after["policy_error"]


def d3po_by_hand(policy: Policy, batch: Rollouts, method: d3po.Plugin, steps: list[int]) -> Tensor:
    """Eq. 14 with means over the latent and clamped ratios, from the network, diffusers' formulas and torch's Normal."""
    return d3po_terms_by_hand(policy, batch, method, steps).mean()


def d3po_terms_by_hand(policy: Policy, batch: Rollouts, method: d3po.Plugin, steps: Sequence[int]) -> Tensor:
    """Of each step and pair, (steps,B)."""
    sign, predict = batch.total()[:, 0] - batch.total()[:, 1], policy.predict(batch.flat_prompts())
    terms = []
    for i in steps:
        x, x_next = batch.at(i), batch.at(i + 1)
        ratio = []
        for on in (True, False):
            policy.denoiser.on = on  # type: ignore[assignment]
            mean, std = policy.schedule.transition(i, x, predict(x, policy.schedule.time(i, x)), 1.0)
            ratio.append(Normal(mean, torch.tensor(std, dtype=torch.float64)).log_prob(x_next).mean((1, 2, 3)))
        policy.denoiser.on = True  # type: ignore[assignment]
        rho = torch.exp(ratio[0] - ratio[1].detach()).clamp(1 - method.clip, 1 + method.clip).view(-1, 2)
        inside = method.beta * sign * (rho[:, 0].log() - rho[:, 1].log())
        terms.append(-torch.log(torch.sigmoid(inside)))
    return torch.stack(terms)


def test_d3po_starts_at_log_2_with_a_gradient() -> None:
    policy = make(at_reference=True)
    batch = labelled(policy)
    loss, metrics = D3PO.loss(policy, batch)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert metrics["log_ratio"] == 0 and metrics["clipped"] == 0 and metrics["pairs_used"] == 1
    by_hand = gradient(d3po_by_hand(policy, batch, D3PO, [0, 1, 2, 3]), policy)
    assert by_hand.norm() > 1e-3 and torch.allclose(gradient(loss, policy), by_hand, rtol=1e-8)


@pytest.mark.parametrize("clip", [0.9, 0.02])
def test_d3po_is_the_official_formula_away_from_the_reference(clip: float) -> None:
    policy = make()
    batch, method = labelled(policy), D3PO.model_copy(update={"clip": clip})
    loss, metrics = method.loss(policy, batch)
    by_hand = d3po_by_hand(policy, batch, method, [0, 1, 2, 3])
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-9)
    assert torch.allclose(gradient(loss, policy), gradient(by_hand, policy), rtol=1e-7)
    assert 0 < metrics["clipped"] < 1


def test_d3po_has_no_gradient_beyond_the_clamp() -> None:
    policy = make()
    loss, metrics = D3PO.model_copy(update={"clip": 1e-7}).loss(policy, labelled(policy))
    assert metrics["clipped"] == 1.0
    assert torch.count_nonzero(gradient(loss, policy)) == 0


def test_d3po_keeps_ties_as_log_2_if_asked() -> None:
    policy = make()
    labels = LABELS.clone()
    labels[1] = 0.5
    batch = labelled(policy, labels)
    drop, keep = D3PO.loss(policy, batch)[0], D3PO.model_copy(update={"ties": "keep"}).loss(policy, batch)[0]
    assert keep.item() == pytest.approx((2 * drop.item() + math.log(2)) / 3, rel=1e-9)
    assert torch.allclose(gradient(keep, policy), gradient(drop, policy) * 2 / 3, rtol=1e-9)


def test_d3po_trains_on_the_same_random_steps_of_both() -> None:
    policy = make()
    batch, method = labelled(policy), D3PO.model_copy(update={"timestep_fraction": 0.5})
    terms = d3po_terms_by_hand(policy, batch, method, range(4)).detach()
    drawn = set()
    for epoch in range(12):
        again = replace(batch, epoch=epoch)
        steps = method.steps(again)  # (2,B·G), the same for both attempts of a prompt
        assert torch.equal(steps, method.steps(again)) and torch.equal(steps[:, ::2], steps[:, 1::2]) and len(steps) == 2
        drawn |= set(steps.flatten().tolist())
        expected = terms.gather(0, steps[:, ::2]).mean().item()
        assert value(method, policy, again) == pytest.approx(expected, rel=1e-9)
    assert drawn == {0, 1, 2, 3}


def test_the_sum_is_the_mean_with_another_beta() -> None:
    policy = make()
    batch = labelled(policy)
    wide = {"clip": 0.999}
    total = D3PO.model_copy(update={"log_prob_reduction": "sum", "beta": D3PO.beta / 32, **wide})
    ours, mean = total.loss(policy, batch)[1], D3PO.model_copy(update=wide).loss(policy, batch)[1]
    assert ours["log_ratio"].item() == pytest.approx(32 * mean["log_ratio"].item(), rel=1e-9)


def test_sampled_pairs_share_their_start_from_the_tickets_own_seed(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run("d3po", {"sampler.eta": 1.0, "sampler.final_alpha": None})
    session = Session(run)
    batch = next(iter(session.batches(0)))
    assert batch.kept == (0, 1, 2, 3, 4) and batch.rewards is not None
    assert torch.equal(batch.latents[:, 0, 0], batch.latents[:, 1, 0])
    assert not torch.equal(batch.latents[0, 0, 0], batch.latents[1, 0, 0])
    assert not torch.equal(batch.latents[:, 0, 1], batch.latents[:, 1, 1])
    from raydiff.data.prompts import tickets

    base = [seed for _, seed in tickets(run, session.train_prompts, 0)[:2]]
    assert torch.equal(batch.latents[:, 0, 0], session.policy.noise(base)(-1))


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("d3po", {"sampler.final_alpha": None}, "sampler.eta = 0.*set sampler.eta to 1"),
        ("d3po", {"sampler.eta": 1.0}, 'sampler.final_alpha = 1.*to "none"'),
        ("d3po", {"sampler.eta": 1.0, "sampler.final_alpha": None, "method.preference": "pareto", "rewards.blue.weight": -1.0}, r"rewards.blue.weight = -1.*evaluate.rewards.blue"),
        ("d3po", {"method.attempts": 1}, "attempts"),
        ("diffusion_dpo", {"method.beta": -1.0}, "beta"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_with_the_field_to_set(
    tiny_run: Callable[..., Run], method: str, changes: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_run(method, changes)


def test_a_model_grid_with_a_deterministic_step_is_refused(tiny_run: Callable[..., Run]) -> None:
    run = tiny_run("d3po", {"sampler.eta": 1.0, "sampler.final_alpha": None, "sampler.spacing": "linspace"})
    with pytest.raises(ValueError, match="step 3 of 4 is deterministic.*trailing"):
        Session(run)
    # What the error recommends works, with few steps and with as many as there are.
    for steps, spacing, last in ((4, "linspace", 0.99915), (1000, "leading", 0.5)):
        with pytest.raises(ValueError, match="set sampler.final_alpha|and sampler.final_alpha") as refused:
            run.method.check_grid(
                Schedule.from_config({**SD, "steps_offset": 0}, steps, spacing=spacing, final_alpha=last), 1.0
            )
        value = float(str(refused.value).rpartition(" ")[2])
        run.method.check_grid(Schedule.from_config(SD, steps, spacing="trailing", final_alpha=value), 1.0)


def test_fields_without_meaning_for_a_flow_model_are_refused(tiny_run: Callable[..., Run]) -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    for spacing, final_alpha in ((None, None), ("trailing", 1.0)):
        schedule = Schedule.from_config(flow, 4, spacing=spacing, final_alpha=final_alpha)
    for field, options in (("spacing", {"spacing": "leading"}), ("final_alpha", {"final_alpha": 0.999})):
        with pytest.raises(ValueError, match=rf"sampler\.{field} = .* has no meaning for a flow-matching model"):
            Schedule.from_config(flow, 4, **options)
    method = tiny_run("d3po", {"sampler.eta": 1.0, "sampler.final_alpha": None}).method
    with pytest.raises(ValueError, match='flow-matching.*set method.kind to "draft_k" or "diffusion_dpo"'):
        method.check_grid(schedule, 1.0)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_reference_is_the_model_from_before_training(tiny_run: Callable[..., Run], train: str) -> None:
    from raydiff.core.learner import TorchEngine

    run = tiny_run("diffusion_dpo", {"model.train": train, "optimizer.lr": 1e-3})
    session = Session(run)
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([10.0, 500.0])
    predict = session.policy.predict(["a cat", "a dog"])

    @torch.no_grad()
    def reference() -> Tensor:
        with session.model.reference():
            return predict(x, time)

    with torch.no_grad():
        start = predict(x, time)
    assert torch.equal(reference(), start)
    engine = TorchEngine(*session.optimizer(), session.geometry.step_accumulation, 1.0)
    for step in range(2):
        session.update(engine, step)
    with torch.no_grad():
        assert not torch.equal(predict(x, time), start)
    assert torch.equal(reference(), start)
