"""Samplers in terms of σ: Euler, Euler ancestral, DPM-Solver++ 2M.

With σ² = (1 − ᾱ) / ᾱ at a row's timestep, σ' that of the next row, σ_1 that of the row
before, and d = x̂_0 in the equations of `table.py`:

  (1)  x ← σ'/σ · x + (1 − σ'/σ) · d_0                                  Euler
  (2)  x ← σ_d/σ · x + (1 − σ_d/σ) · d_0 + σ_u · ξ                        ancestral
       σ_d = σ'²/σ,  σ_u² = σ'² − σ_d²
  (3)  x ← (α'σ')/(ασ) · x + α' (1 − σ'/σ) · (d_0 + (d_0 − d_1) / 2r)     DPM-Solver++
       α = 1 / √(1 + σ²),  r = log(σ_1/σ) / log(σ/σ')
  (4)  σ_i = (σ_max^⅐ + i/(n−1) · (σ_min^⅐ − σ_max^⅐))^7                  Karras' σ

x is x_0 + σ ε in (1) and (2), and α times that in (3). Sources: Karras et al. 2022 (1,
4), Crowson's k-diffusion (2), Lu et al. 2022 (3).
"""

from functools import partial
from types import SimpleNamespace

import numpy as np

from safetydpo_jax import diffusion
from safetydpo_jax.diffusion import Schedule
from safetydpo_jax.sampling.table import Sampler, Table, run_table


def make_euler(c: SimpleNamespace, schedule: Schedule, steps: int) -> Sampler:
  """Equation (1)."""
  timesteps, sigmas, training = _spaced(c, schedule, steps, rounded=False)
  if c.use_karras_sigmas:
    sigmas = _karras(c, sigmas[0], sigmas[-1], steps)
    timesteps = _timesteps_of(sigmas, training)
  following = np.append(sigmas[1:], _last(c, training))
  return _exploding(c, schedule, timesteps, sigmas, following, following)


def make_euler_ancestral(c: SimpleNamespace, schedule: Schedule, steps: int) -> Sampler:
  """Equation (2)."""
  timesteps, sigmas, _ = _spaced(c, schedule, steps, rounded=False)
  following = np.append(sigmas[1:], 0)
  return _exploding(c, schedule, timesteps, sigmas, following, following**2 / sigmas)


def make_dpmpp_2m(c: SimpleNamespace, schedule: Schedule, steps: int) -> Sampler:
  """Equation (3); the first step is of order 1, and so is the last if configured."""
  timesteps, sigmas, training = _spaced(c, schedule, steps, extra=1)
  if c.use_karras_sigmas:
    sigmas = _karras(c, training[-1], training[0], steps)
    timesteps = _timesteps_of(sigmas, training).round()
  last = _last(c, training)
  following = np.append(sigmas[1:], last)
  alpha, next_alpha = (1 / np.sqrt(s**2 + 1) for s in (sigmas, following))
  second = np.arange(steps) > 0
  short = c.lower_order_final and steps < 15
  if c.euler_at_final or short or last == 0:
    second[-1] = False
  second = np.flatnonzero(second & (c.solver_order > 1))

  gain = next_alpha * (1 - following / sigmas)
  history = np.stack([gain, 0 * gain], axis=1)
  span, before = (
    np.log(high[second] / low)
    for high, low in ((sigmas, following[second]), (np.roll(sigmas, 1), sigmas[second]))
  )
  slope = gain[second] / 2
  if c.solver_type == "heun":
    slope = next_alpha[second] * (np.expm1(-span) / span + 1)
  slope = slope * span / before
  history[second] += np.stack([slope, -slope], axis=1)
  of_latents, of_prediction = _clean(schedule.prediction_type, sigmas)
  table = Table(
    timesteps,
    scale=np.ones(steps),
    clean=np.stack([of_latents / alpha, of_prediction], axis=1),
    again=np.zeros(steps, bool),
    keep=next_alpha * following / (alpha * sigmas),
    history=history,
    noise=np.zeros(steps),
  )
  return partial(run_table, table, 1.0)


def _exploding(c, schedule, timesteps, sigmas, following, down) -> Sampler:
  """Steps from `sigmas` down to `down`, then by noise up to `following`."""
  table = Table(
    timesteps,
    scale=1 / np.sqrt(sigmas**2 + 1),
    clean=np.stack(_clean(schedule.prediction_type, sigmas), axis=1),
    again=np.zeros(len(sigmas), bool),
    keep=down / sigmas,
    history=(1 - down / sigmas)[:, None],
    noise=np.sqrt(following**2 - down**2),
  )
  initial = np.hypot(sigmas.max(), c.timestep_spacing == "leading")
  return partial(run_table, table, float(initial))


def _spaced(c, schedule, steps, **how) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Timesteps of the run, their σ, and the σ of all T training timesteps; float64."""
  alphas = np.array(schedule.alphas_cumprod, np.float64)
  if schedule.config.get("rescale_betas_zero_snr"):
    alphas[-1] = 2.0**-24  # as diffusers: σ of no signal at all would be infinite
  training = np.sqrt((1 - alphas) / alphas)
  timesteps = diffusion.spaced_timesteps(
    len(training), steps, c.timestep_spacing, c.steps_offset, **how
  )
  return timesteps, np.interp(timesteps, np.arange(len(training)), training), training


def _clean(kind: str, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """p and q that give x̂_0 from x = x_0 + σ ε and a prediction of `kind`."""
  variance = sigmas**2 + 1
  if kind == "epsilon":
    return np.ones_like(sigmas), -sigmas
  if kind == "sample":
    return np.zeros_like(sigmas), np.ones_like(sigmas)
  return 1 / variance, -sigmas / np.sqrt(variance)


def _karras(c: SimpleNamespace, high: float, low: float, steps: int) -> np.ndarray:
  """Equation (4), between `sigma_max` and `sigma_min` where the config has them."""
  high = (high if c.sigma_max is None else c.sigma_max) ** (1 / 7)
  low = (low if c.sigma_min is None else c.sigma_min) ** (1 / 7)
  return (high + np.linspace(0, 1, steps) * (low - high)) ** 7


def _timesteps_of(sigmas: np.ndarray, training: np.ndarray) -> np.ndarray:
  """The fractional timesteps at which the training schedule has `sigmas`."""
  return np.interp(np.log(sigmas), np.log(training), np.arange(len(training)))


def _last(c: SimpleNamespace, training: np.ndarray) -> float:
  """The σ at the end of the last step."""
  return 0.0 if c.final_sigmas_type == "zero" else training[0]
