"""The sampling grid and its algebra: one transition formula for DDIM at any eta and for flow-matching Euler.

Legend: B images, C h w latent, S sampler steps, T training steps. x = alpha·x0 + sigma·eps. Grid index 0 is noise, S is clean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Output = Literal["eps", "v", "flow"]
Spacing = Literal["leading", "trailing", "linspace"]
_OUTPUT_OF: dict[str, Output] = {"epsilon": "eps", "v_prediction": "v"}
_OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "sigma_min", "sigma_max")


@dataclass(frozen=True)
class Schedule:
    """Points of one sampling grid, in float64 on the CPU: a step reads Python floats, so no device is synchronised.

    `split` and `transition` take a grid index `i` that is an int, or a LongTensor (B,) with one index per image.
    """

    times: Tensor  # (S,) what the network is told at step i
    alpha: Tensor  # (S+1,) signal level
    sigma: Tensor  # (S+1,) noise level
    output: Output
    train_steps: int = 1000  # T of the noise process that the network was trained on

    @property
    def steps(self) -> int:
        return len(self.times)

    def time(self, i: int | Tensor, x: Tensor) -> Tensor:
        """Network time of step i for each image of x, (B,) fp32."""
        return self.times[i].to(x.device, torch.float32).expand(len(x))

    def split(self, out: Tensor, x: Tensor, i: int | Tensor) -> tuple[Tensor, Tensor]:
        """The network's output at x (B,C,h,w), point i, as its estimates (x0_hat, eps_hat) of the clean latent and the noise.

        eps: Ho et al. 2020; v = alpha·eps - sigma·x0: Salimans & Ho 2022, eq. 9; flow = eps - x0: Lipman et al. 2023.
        """
        alpha, sigma = _at(self.alpha, i, x), _at(self.sigma, i, x)
        if self.output == "eps":
            return (x - sigma * out) / alpha, out
        if self.output == "v":
            return alpha * x - sigma * out, sigma * x + alpha * out
        return x - sigma * out, x + alpha * out

    def std(self, i: int | Tensor, x: Tensor, eta: float) -> Any:
        """Standard deviation of the step i -> i+1: eta times that of the posterior q(x_{i+1} | x_i, x0)."""
        return _like(eta * _read(self.posterior_std, i), x)

    @cached_property
    def posterior_std(self) -> Tensor:
        """Of q(x_{i+1} | x_i, x0) for each step, (S,) float64.

        DDIM eq. 16 (Song et al. 2021), written for any alpha and sigma: std² = (σ'²/σ²)(σ² - (α/α')² σ'²).
        """
        alpha, sigma, alpha_next, sigma_next = self.alpha[:-1], self.sigma[:-1], self.alpha[1:], self.sigma[1:]
        variance = (sigma**2 - (alpha / alpha_next) ** 2 * sigma_next**2).clamp(min=0)
        return sigma_next / sigma * variance.sqrt()

    def transition(self, i: int | Tensor, x: Tensor, out: Tensor, eta: float = 0.0) -> tuple[Tensor, Any]:
        """The Gaussian step i -> i+1 as (mean (B,C,h,w), std): std is a float, or (B,1,1,1) when i is a tensor.

        DDIM eq. 12 at any eta; with flow outputs and eta = 0 it is the Euler step x + (s' - s)·v. At eta = 0, or where the
        grid ends in sigma = 0, std is 0 and the transition has no density.
        """
        x0, eps = self.split(out, x, i)
        std = eta * _read(self.posterior_std, i)
        kept = (_read(self.sigma, i + 1) ** 2 - std**2) ** 0.5  # of eps; the rest of the noise is drawn anew
        return _at(self.alpha, i + 1, x) * x0 + _like(kept, x) * eps, _like(std, x)

    def target(self, x0: Tensor, eps: Tensor, i: int | Tensor) -> Tensor:
        """What the network should answer at x = add_noise(x0, eps, i), (B,C,h,w): `split` of it gives (x0, eps) back."""
        if self.output == "eps":
            return eps
        return _at(self.alpha, i, x0) * eps - _at(self.sigma, i, x0) * x0 if self.output == "v" else eps - x0

    def add_noise(self, x0: Tensor, eps: Tensor, i: int | Tensor) -> Tensor:
        """x at grid point i, (B,C,h,w)."""
        return _at(self.alpha, i, x0) * x0 + _at(self.sigma, i, x0) * eps

    @classmethod
    def from_config(
        cls,
        config: Mapping[str, Any],
        steps: int,
        *,
        spacing: Spacing | None = None,
        final_alpha: float | None = None,
    ) -> Schedule:
        """The grid that a diffusers scheduler of this config would walk in `steps` steps.

        `spacing` and `final_alpha` (alpha-bar at the clean end; 1 = noise-free) override the config: where the last step
        stands decides the size of every truncated reward gradient. Any VP scheduler's config serves (DDIM, PNDM, Euler: they
        share the betas), and FlowMatchEulerDiscreteScheduler's, whose grid is its own and always ends noise-free.
        Raises ValueError for a field that is not supported or has no meaning there, and for steps outside
        1..num_train_timesteps.
        """
        train_steps = int(config.get("num_train_timesteps", 1000))
        if not 1 <= steps <= train_steps:
            raise ValueError(f"steps = {steps} is outside 1..{train_steps}, the scheduler's num_train_timesteps")
        if is_flow(config):
            _check_flow_grid(spacing, final_alpha)
            return _flow(config, steps)
        return _variance_preserving(config, steps, spacing, final_alpha)


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a diffusers scheduler config is of flow matching, x = (1 - s)·x0 + s·eps, and not of betas."""
    return "FlowMatch" in config.get("_class_name", "") or ("shift" in config and "beta_schedule" not in config)


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """alpha-bar of every training step, (T,) float64, from a diffusers scheduler config."""
    n = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
    elif kind == "linear":
        betas = torch.linspace(start, end, n, dtype=torch.float64)
    elif kind == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, n, dtype=torch.float64) ** 2
    elif kind == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
        grid = torch.arange(n + 1, dtype=torch.float64) / n
        bar = torch.cos((grid + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    else:
        raise ValueError(f"beta_schedule = {kind!r} is not supported; use linear, scaled_linear or squaredcos_cap_v2")
    if len(betas) != n or not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(
            f"betas must be num_train_timesteps = {n} numbers between 0 and 1; the scheduler's config gives others"
        )
    bars = torch.cumprod(1 - betas, 0)
    return _zero_terminal_snr(bars) if config.get("rescale_betas_zero_snr") else bars


def _zero_terminal_snr(bars: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha-bar) so that its last value is 0 and its first stays (Lin et al. 2023, algorithm 1)."""
    root = bars.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _variance_preserving(config: Mapping[str, Any], steps: int, spacing: Spacing | None, final_alpha: float | None) -> Schedule:
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in _OUTPUT_OF:
        raise ValueError(f"prediction_type = {prediction!r} is not supported; use one of {sorted(_OUTPUT_OF)}")
    if spacing is None and (own := [field for field in _OTHER_GRIDS if config.get(field)]):
        raise ValueError(
            f"the scheduler's own grid is not followed: its config has {own[0]} = {config[own[0]]!r};"
            ' set sampler.spacing to "trailing", "leading" or "linspace"'
        )
    bars = alphas_cumprod(config)
    times = _times(len(bars), steps, spacing or config.get("timestep_spacing", "leading"), int(config.get("steps_offset", 0)))
    if final_alpha is None:
        final_alpha = 1.0 if config.get("set_alpha_to_one", True) else float(bars[0])
    bar = torch.cat([bars[times], torch.tensor([final_alpha], dtype=torch.float64)])
    if prediction == "epsilon" and bar[0] == 0:
        raise ValueError("an epsilon-prediction network cannot start at zero signal: use a v-prediction model")
    return Schedule(times, bar.sqrt(), (1 - bar).sqrt(), _OUTPUT_OF[prediction], len(bars))


def _times(train_steps: int, steps: int, spacing: str, offset: int) -> Tensor:
    """Training steps that the grid visits, (S,) descending (Lin et al. 2023, table 2)."""
    if spacing == "leading":
        times = (torch.arange(steps) * (train_steps // steps)).flip(0) + offset
        if int(times[0]) >= train_steps:
            raise ValueError(
                f"steps = {steps}: the leading grid with steps_offset = {offset} begins at {int(times[0])}, beyond the last of"
                f' {train_steps} training steps; take fewer steps, or sampler.spacing = "trailing"'
            )
        return times
    if spacing == "trailing":
        return (train_steps - torch.arange(steps, dtype=torch.float64) * train_steps / steps).round().long() - 1
    if spacing == "linspace":
        return torch.linspace(train_steps - 1, 0, steps, dtype=torch.float64).round().long()
    raise ValueError(f"timestep_spacing = {spacing!r} is not supported; use leading, trailing or linspace")


def _check_flow_grid(spacing: Spacing | None, final_alpha: float | None) -> None:
    """Raise ValueError for what the fixed grid of flow matching cannot follow. The defaults of a run ask for nothing else."""
    for field, value, fits in (("spacing", spacing, (None, "trailing")), ("final_alpha", final_alpha, (None, 1.0))):
        if value not in fits:
            raise ValueError(
                f"sampler.{field} = {value!r} has no meaning for a flow-matching model, whose grid is its scheduler's and ends"
                f' noise-free: leave sampler.{field} out, or set it to "none"'
            )


def _flow(config: Mapping[str, Any], steps: int) -> Schedule:
    """x = (1 - s)·x0 + s·eps with the shifted grid of Stable Diffusion 3 (Esser et al. 2024, eq. 23)."""
    for field in (
        "use_dynamic_shifting", "shift_terminal", "invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas",
        "use_beta_sigmas", "stochastic_sampling",
    ):  # fmt: skip
        if config.get(field):
            raise ValueError(f"scheduler field {field} = {config[field]!r} is not supported; set it to false")
    train_steps, shift = int(config.get("num_train_timesteps", 1000)), float(config.get("shift", 1.0))

    def shifted(s: Tensor) -> Tensor:
        return shift * s / (1 + (shift - 1) * s)

    # diffusers spaces the grid between the shifted ends of the training grid, then shifts it a second time; pipelines of
    # shipped models rely on it.
    first, last = shifted(torch.tensor([1.0, 1 / train_steps], dtype=torch.float64)).tolist()
    s = shifted(torch.linspace(first, last, steps, dtype=torch.float64))
    sigma = torch.cat([s, torch.zeros(1, dtype=torch.float64)])
    return Schedule(s * train_steps, 1 - sigma, sigma, "flow", train_steps)


def _at(table: Tensor, i: int | Tensor, x: Tensor) -> Any:
    """table[i], ready to be multiplied with x."""
    return _like(_read(table, i), x)


def _read(table: Tensor, i: int | Tensor) -> Any:
    """table[i] as a Python float, or (B,) float64 on the CPU when i is a tensor: coefficients are worked out at full precision,
    so that a step is the same bits whether its index came as an int or as a tensor."""
    return table[i.cpu()] if isinstance(i, Tensor) else float(table[i])


def _like(coefficient: Any, x: Tensor) -> Any:
    """A coefficient as `_read` gave it; a tensor as (B,1,1,1) in x's device and dtype."""
    return coefficient.to(x.device, x.dtype)[:, None, None, None] if isinstance(coefficient, Tensor) else coefficient
