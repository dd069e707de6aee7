"""Our grid and transition against diffusers' schedulers and closed forms."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from raydiff.core.log_prob import gaussian_log_prob, transition_log_prob
from raydiff.core.schedule import Schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_transition_equals_diffusers_ddim(eta: float, spacing: str, prediction: str) -> None:
    scheduler = DDIMScheduler(
        **SD, timestep_spacing=spacing, prediction_type=prediction, steps_offset=spacing == "leading", set_alpha_to_one=True
    )
    # diffusers steps by 1000 // steps also on a linspace grid; at 500 steps that mostly is the distance of its points.
    steps = 500 if spacing == "linspace" else 10
    scheduler.set_timesteps(steps)
    schedule = Schedule.from_config(scheduler.config, steps)
    assert schedule.times.tolist() == scheduler.timesteps.tolist()
    after = [*schedule.times.tolist()[1:], -1]
    same = [i for i in range(steps) if max(int(schedule.times[i]) - 1000 // steps, -1) == max(after[i], -1)]
    assert len(same) > 0.9 * steps
    torch.manual_seed(0)
    for i in same:
        x, out, z = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
        theirs = scheduler.step(out, scheduler.timesteps[i], x, eta=eta, variance_noise=z).prev_sample
        mean, std = schedule.transition(i, x, out, eta)
        assert relative(mean + std * z, theirs) < 1e-5


def test_linspace_walks_its_own_grid() -> None:
    """diffusers' DDIM strides by 1000 // steps also on a linspace grid; ours steps between the grid's own points."""
    scheduler = DDIMScheduler(**SD, timestep_spacing="linspace")
    schedule = Schedule.from_config(scheduler.config, 11)
    x, out = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    bars = scheduler.alphas_cumprod.double()
    for i in range(10):
        now, after = bars[schedule.times[i]], bars[schedule.times[i + 1]]
        expected = after.sqrt() * (x - (1 - now).sqrt() * out) / now.sqrt() + (1 - after).sqrt() * out
        assert relative(schedule.transition(i, x, out)[0], expected) < 1e-6


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_no_grid_leaves_the_training_steps(spacing: str, offset: int) -> None:
    """All 1000 step counts. diffusers walks to t = -1 at 61, 103, 121 and 59 more of them, and burns the picture."""
    config = {**SD, "timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": False}
    for steps in range(1, 1001):
        if spacing == "leading" and steps == 1000 and offset == 1:
            with pytest.raises(ValueError, match=r"steps = 1000: the leading grid with steps_offset = 1 begins at 1000"):
                Schedule.from_config(config, steps)
            continue
        schedule = Schedule.from_config(config, steps)
        assert schedule.times.min() >= 0 and schedule.times.max() <= 999 and len(schedule.alpha) == steps + 1
        assert (schedule.times.diff() < 0).all() and (schedule.alpha.diff() >= 0).all()
        assert schedule.posterior_std.isfinite().all() and (schedule.posterior_std <= schedule.sigma[1:] + 1e-12).all()


def test_a_step_is_the_same_bits_by_an_int_and_by_a_tensor() -> None:
    """Sampling walks by ints, and losses ask for a step of its own for each image: ratios of fresh samples are 1."""
    schedule = Schedule.from_config({**SD, "timestep_spacing": "trailing"}, 10)
    x, out = torch.randn(2, 10, 4, 8, 8)
    mean, std = schedule.transition(torch.arange(10), x, out, 1.0)
    for i in range(10):
        one, its = schedule.transition(i, x[i : i + 1], out[i : i + 1], 1.0)
        assert torch.equal(mean[i : i + 1], one) and float(std[i]) == pytest.approx(its, rel=1e-7)


def test_eta_one_is_the_ddpm_posterior() -> None:
    scheduler = DDPMScheduler(**SD, timestep_spacing="trailing", variance_type="fixed_small")
    scheduler.set_timesteps(20)
    schedule = Schedule.from_config(scheduler.config, 20)
    x, out = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for i in range(19):
        t = int(scheduler.timesteps[i])
        z = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(i))
        theirs = scheduler.step(out, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        mean, std = schedule.transition(i, x, out, 1.0)
        assert relative(mean + std * z, theirs) < 1e-5


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_transition_equals_diffusers_euler(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(12)
    schedule = Schedule.from_config(scheduler.config, 12)
    assert torch.allclose(schedule.sigma, scheduler.sigmas.double(), atol=1e-6)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for i in range(12):
        out = torch.randn_like(x)
        theirs = scheduler.step(out, scheduler.timesteps[i], x).prev_sample
        assert relative(schedule.transition(i, x, out)[0], theirs.double()) < 1e-6
        x = theirs.double()


def test_any_vp_config_gives_its_grid_and_final_alpha() -> None:
    config = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    ).config
    schedule = Schedule.from_config(config, 50)
    assert (schedule.times[0], schedule.times[-1]) == (981, 1)
    assert schedule.alpha[-1] ** 2 == pytest.approx(1 - 0.00085)
    trailing = Schedule.from_config(config, 50, spacing="trailing", final_alpha=1.0)
    assert (trailing.times[0], trailing.times[-1], trailing.sigma[-1]) == (999, 19, 0)


def test_zero_terminal_snr_and_cosine_equal_diffusers() -> None:
    for extra in (
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **SD},
        {"beta_schedule": "squaredcos_cap_v2"},
    ):
        scheduler = DDIMScheduler(**extra, timestep_spacing="trailing")
        schedule = Schedule.from_config(scheduler.config, 1000)
        assert torch.allclose(schedule.alpha[:-1].flip(0) ** 2, scheduler.alphas_cumprod.double(), atol=1e-6)


def test_the_last_step_decides_the_size_of_a_truncated_gradient() -> None:
    """|d x_S / d out| at the last step of the usual grids (design figures: .012, .105, .135 at N = 50)."""

    def sensitivity(**kw: object) -> float:
        schedule = Schedule.from_config({**SD, "steps_offset": 1, "set_alpha_to_one": False}, 50, **kw)  # type: ignore[arg-type]
        out = torch.zeros(1, 1, 1, 1, dtype=torch.float64, requires_grad=True)
        mean, _ = schedule.transition(49, torch.ones_like(out), out)
        return abs(float(torch.autograd.grad(mean.sum(), out)[0]))

    assert sensitivity() == pytest.approx(0.012, abs=5e-4)
    assert sensitivity(spacing="trailing") == pytest.approx(0.105, abs=1e-3)
    assert sensitivity(spacing="trailing", final_alpha=1.0) == pytest.approx(0.135, abs=1e-3)
    assert sensitivity(spacing="linspace") == 0.0


def test_batched_indices_equal_single_ones() -> None:
    schedule = Schedule.from_config({**SD, "set_alpha_to_one": False}, 10, spacing="trailing")
    x, out = torch.randn(2, 4, 3, 4, 4, dtype=torch.float64)
    index = torch.tensor([0, 3, 7, 9])
    mean, std = schedule.transition(index, x, out, 0.7)
    for row, i in enumerate(index.tolist()):
        one, s = schedule.transition(i, x[row : row + 1], out[row : row + 1], 0.7)
        assert torch.allclose(mean[row], one[0], rtol=1e-12) and float(std[row]) == pytest.approx(s)


def test_split_inverts_add_noise_for_every_output() -> None:
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for config in ({**SD}, {**SD, "prediction_type": "v_prediction"}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}):
        schedule = Schedule.from_config(config, 8)
        for i in range(1, 8):
            x = schedule.add_noise(x0, eps, i)
            a, s = schedule.alpha[i], schedule.sigma[i]
            out = {"eps": eps, "v": a * eps - s * x0, "flow": eps - x0}[schedule.output]
            x0_hat, eps_hat = schedule.split(out, x, i)
            assert torch.allclose(x0_hat, x0) and torch.allclose(eps_hat, eps)


def test_log_prob_equals_torch_distributions_and_refuses_std_zero() -> None:
    schedule = Schedule.from_config({**SD, "set_alpha_to_one": False}, 10, spacing="trailing")
    x, z = torch.randn(2, 4, 3, 4, 4)
    out = torch.randn_like(x)
    mean, std = schedule.transition(4, x, out, 1.0)
    x_next = mean + std * z
    ours = transition_log_prob(lambda x, t: out, schedule, 4, x, x_next, 1.0)
    expected = torch.distributions.Normal(mean, torch.tensor(std)).log_prob(x_next).sum((1, 2, 3))
    assert torch.allclose(ours, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="std 0"):
        gaussian_log_prob(x, mean, 0.0)


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        ({**SD, "beta_schedule": "sigmoid"}, 10, "beta_schedule"),
        ({**SD, "prediction_type": "sample"}, 10, "prediction_type"),
        (SD, 1001, "steps = 1001"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, 10, "use_dynamic_shifting"),
        ({**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, 10, "v-prediction"),
    ],
)
def test_unsupported_schedulers_say_which_field(config: dict, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule.from_config(config, steps)
