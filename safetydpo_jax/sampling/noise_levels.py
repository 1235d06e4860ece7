"""Which timesteps a run visits, and how noisy the latents are at each of them.

With σ² = (1 − ᾱ) / ᾱ, a run's σ are those of its timesteps, or spread between a largest
and a smallest σ, and then the timesteps follow from them:

  (1)  σ_i = (σ_max^⅐ + i/(n−1) · (σ_min^⅐ − σ_max^⅐))^7             Karras
  (2)  σ_i = exp(log σ_max + i/(n−1) · (log σ_min − log σ_max))       exponential, Lu
  (3)  σ_i = σ_min + F⁻¹(1 − i/(n−1)) · (σ_max − σ_min)               beta

F is the distribution function of Beta(⅗, ⅗). In the samplers' equations latents are
x_0 + σ ε, or α times that with α = 1/√(1 + σ²). Sources: Karras et al. 2022 (1), Lu et
al. 2022 (2), Lee et al. 2024 (3); details are those of diffusers' scheduler classes.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from safetydpo_jax import diffusion
from safetydpo_jax.errors import InputError

SPREADS = (
  "use_karras_sigmas",
  "use_exponential_sigmas",
  "use_beta_sigmas",
  "use_lu_lambdas",
)


class Levels(NamedTuple):
  """The noise levels of a run of n steps.

  Attributes:
    timesteps: where the UNet is evaluated, (n,).
    sigmas: σ of each and of the end, (n + 1,).
  """

  timesteps: np.ndarray
  sigmas: np.ndarray


def training_alphas(c: SimpleNamespace) -> np.ndarray:
  """ᾱ_t of all training timesteps, (T,) float32, bit for bit as in diffusers.

  Where diffusers cuts timesteps to integers (`whole_levels`), one rounding error would
  move a timestep by one; so torch's order of float32 arithmetic is kept.
  """
  root = c.beta_schedule == "scaled_linear"
  ends = (c.beta_start**0.5, c.beta_end**0.5) if root else (c.beta_start, c.beta_end)
  betas = _linspace(*ends, c.num_train_timesteps)
  betas = betas**2 if root else betas
  if c.trained_betas is not None:
    betas = np.asarray(c.trained_betas, np.float32)
  if getattr(c, "rescale_betas_zero_snr", False):
    betas = diffusion.without_terminal_signal(betas)
  return np.cumprod(1 - betas, dtype=np.float64).astype(np.float32)


def _linspace(start: float, end: float, count: int) -> np.ndarray:
  """torch.linspace in float32: from both ends to the middle, by fused multiply-add."""
  first, last = np.float32(start), np.float32(end)
  step = np.float64((last - first) / np.float32(count - 1))
  i = np.arange(count)
  rising, falling = first + step * i, last - step * (count - 1 - i)
  return np.where(i < count // 2, rising, falling).astype(np.float32)


def training_sigmas(c: SimpleNamespace) -> np.ndarray:
  """σ of all training timesteps, (T,) float32, rising."""
  alphas = training_alphas(c)
  if getattr(c, "rescale_betas_zero_snr", False):
    alphas[-1] = 2.0**-24  # as diffusers: σ of no signal at all would be infinite
  return np.sqrt((1 - alphas) / alphas)


def fractional_levels(
  c: SimpleNamespace, steps: int, *, bounded_karras: bool = True
) -> Levels:
  """Levels of the classes whose timesteps may be fractions: Euler, Heun, LMS, SDE.

  Args:
    c: the fields of scheduler_config.json.
    steps: n.
    bounded_karras: whether sigma_min and sigma_max count with Karras' σ, too.
  """
  training = training_sigmas(c)
  timesteps = diffusion.spaced_timesteps(
    len(training), steps, c.timestep_spacing, c.steps_offset, rounded=False
  )
  sigmas = np.interp(timesteps, np.arange(len(training)), training)
  kind = _spread_of(c)
  if kind:
    bounded = bounded_karras or kind != "use_karras_sigmas"
    high, low = _bounds(c, sigmas[0], sigmas[-1]) if bounded else sigmas[[0, -1]]
    sigmas = _spread(kind, high, low, steps)
    timesteps = timesteps_of(sigmas, training)
  ends_at_zero = getattr(c, "final_sigmas_type", "zero") == "zero"
  return Levels(timesteps, np.append(sigmas, 0.0 if ends_at_zero else training[0]))


def whole_levels(
  c: SimpleNamespace, steps: int, *, ends_with_own: bool = False
) -> Levels:
  """Levels of the classes whose timesteps are integers: DPM-Solver, UniPC, DEIS.

  Args:
    c: the fields of scheduler_config.json.
    steps: n.
    ends_with_own: whether a run of spread σ with final_sigmas_type 'sigma_min' ends
      with its own last σ, and not with that of the training schedule.
  """
  training = training_sigmas(c)
  if getattr(c, "lambda_min_clipped", -np.inf) > -np.log(training[-1]):
    raise InputError(
      f"scheduler_config.json: lambda_min_clipped = {c.lambda_min_clipped} is not "
      f"supported: it cuts this noise schedule, which ends at {-np.log(training[-1])}; "
      "choose another --sampler"
    )
  trailing = c.timestep_spacing == "trailing"
  timesteps = diffusion.spaced_timesteps(
    len(training), steps, c.timestep_spacing, c.steps_offset, extra=0 if trailing else 1
  )
  sigmas = np.interp(timesteps, np.arange(len(training)), training)
  last, kind = training[0], _spread_of(c)
  if kind:
    ends = float(training[-1]), float(training[0])
    high, low = ends if kind == "use_lu_lambdas" else _bounds(c, *ends)
    sigmas = _spread(kind, high, low, steps)
    rounded = kind in ("use_karras_sigmas", "use_lu_lambdas")
    timesteps = timesteps_of(sigmas, training)
    timesteps = timesteps.round() if rounded else np.trunc(timesteps)
    last = sigmas[-1] if ends_with_own else last
  return Levels(
    timesteps, np.append(sigmas, 0.0 if c.final_sigmas_type == "zero" else last)
  )


def _spread_of(c: SimpleNamespace) -> str | None:
  """The field that says how σ are spread; None: as the timesteps are.

  Raises:
    InputError: more than one of them is set.
  """
  chosen = [field for field in SPREADS if getattr(c, field, False)]
  if len(chosen) > 1:
    raise InputError(
      f"scheduler_config.json: {' and '.join(chosen)} are set; expected one at most"
    )
  return chosen[0] if chosen else None


def _bounds(c: SimpleNamespace, high: float, low: float) -> tuple[float, float]:
  """`sigma_max` and `sigma_min` of the config where it has them."""
  return (
    high if c.sigma_max is None else c.sigma_max,
    low if c.sigma_min is None else c.sigma_min,
  )


def _spread(kind: str, high: float, low: float, steps: int) -> np.ndarray:
  """Equations (1) to (3), (steps,) float64."""
  if not 0 < low <= high:
    raise InputError(
      f"scheduler_config.json: sigma_min {low} and sigma_max {high} with {kind}; "
      "expected positive numbers, the first one at most as large as the other"
    )
  ramp = np.linspace(0, 1, steps)
  if kind == "use_karras_sigmas":
    high, low = high ** (1 / 7), low ** (1 / 7)
    return (high + ramp * (low - high)) ** 7
  if kind == "use_beta_sigmas":
    from scipy import special  # not above: few checkpoints ask for it

    return low + special.betaincinv(0.6, 0.6, 1 - ramp) * (high - low)
  return np.exp(np.linspace(np.log(high), np.log(low), steps))


def timesteps_of(sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
  """The fractional timesteps at which the training schedule has `sigmas`."""
  return np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))


def scales(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(α, α σ): of image and noise in latents of variance 1."""
  alphas = 1 / np.sqrt(sigmas**2 + 1)
  return alphas, alphas * sigmas


def unscaled(
  c: SimpleNamespace,
  clean: Callable[[str, np.ndarray, np.ndarray], np.ndarray],
  sigmas: np.ndarray,
) -> dict[str, Any]:
  """What latents x_0 + σ ε need in `table.make_run`: the UNet sees α times them.

  Args:
    c: the fields of scheduler_config.json.
    clean: `clean_image` or `clean_noise`.
    sigmas: σ of the evaluations, (n,).
  """
  alpha, noise = scales(sigmas)
  return {
    "initial": np.hypot(sigmas.max(), c.timestep_spacing == "leading"),
    "scale": alpha,
    "clean": clean(c.prediction_type, alpha, noise)
    * np.stack([alpha, np.ones_like(alpha)], axis=1),
  }


def clean_image(kind: str, alpha: np.ndarray, noise: np.ndarray) -> np.ndarray:
  """p and q of `table.py` for d_0 = x̂_0, (n, 2).

  Args:
    kind: the prediction_type.
    alpha, noise: (n,), x = alpha · x_0 + noise · ε; α and σ of equal variance for
      `v_prediction`, else of any.
  """
  if kind == "epsilon":
    return np.stack([1 / alpha, -noise / alpha], axis=1)
  if kind == "sample":
    return np.tile([0.0, 1.0], (len(alpha), 1))
  return np.stack([alpha, -noise], axis=1)


def clean_noise(kind: str, alpha: np.ndarray, noise: np.ndarray) -> np.ndarray:
  """p and q for d_0 = ε̂, (n, 2), as `clean_image`."""
  if kind == "epsilon":
    return np.tile([0.0, 1.0], (len(alpha), 1))
  if kind == "sample":
    return np.stack([1 / noise, -alpha / noise], axis=1)
  return np.stack([noise, alpha], axis=1)
