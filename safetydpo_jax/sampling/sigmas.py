"""Samplers in terms of σ, as in k-diffusion: Euler, Euler ancestral, Heun, DPM++ SDE.

With σ of a step's start, σ' of its end, and d = x̂_0 in the equations of `table.py`:

  (1)  x ← σ'/σ · x + (1 − σ'/σ) · d_0                                    Euler
  (2)  x ← σ_d/σ · x + (1 − σ_d/σ) · d_0 + σ_u · ξ                          ancestral
       σ_d = σ'²/σ,  σ_u² = σ'² − σ_d²
  (3)  x ← x̄ + ½ (σ' − σ) · ((x̄ − d_1)/σ + (x − d_0)/σ')                    Heun
  (4)  x ← σ_d/σ · x̄ + (1 − σ_d/σ) · d_0 + σ_u · (W_σ − W_σ')/√(σ − σ')     DPM++ SDE

x is x_0 + σ ε. Heun takes equation (1) to σ' and then (3) from where (1) started.
DPM++ SDE takes (2) to the middle, σ_m = √(σ σ'), and then (4), with d_0 as seen there;
both draw on one Brownian motion W. Both methods evaluate the UNet twice for each step
but the last, which is (1) to σ' = 0.

Sources: Karras et al. 2022 (1, 3), Crowson's k-diffusion (2, 4).
"""

from types import SimpleNamespace

import numpy as np

from safetydpo_jax.sampling.noise_levels import (
  clean_image,
  fractional_levels,
  timesteps_of,
  training_sigmas,
  unscaled,
)
from safetydpo_jax.sampling.table import Sampler, make_run


def make_euler(c: SimpleNamespace, steps: int) -> Sampler:
  """Equation (1)."""
  timesteps, sigmas = fractional_levels(c, steps)
  if c.timestep_type == "continuous" and c.prediction_type == "v_prediction":
    timesteps = 0.25 * np.log(sigmas[:-1])
  ratio = sigmas[1:] / sigmas[:-1]
  return _make_run(c, timesteps, sigmas[:-1], keep=ratio, history=(1 - ratio)[:, None])


def make_euler_ancestral(c: SimpleNamespace, steps: int) -> Sampler:
  """Equation (2)."""
  timesteps, sigmas = fractional_levels(c, steps)
  down, up = _split(sigmas[:-1], sigmas[1:])
  ratio = down / sigmas[:-1]
  return _make_run(
    c, timesteps, sigmas[:-1], keep=ratio, history=(1 - ratio)[:, None], noise=up
  )


def make_heun(c: SimpleNamespace, steps: int) -> Sampler:
  """Equations (1) and (3), x of equation (3) written in terms of x̄ and d_1."""
  timesteps, sigmas = fractional_levels(c, steps)
  high, low = sigmas[:-1], sigmas[1:]
  ratio, half = low / high, (low - high) / 2
  first = np.stack([1 - ratio, np.zeros(steps)], axis=1)
  with np.errstate(divide="ignore"):  # there is no second evaluation at σ' = 0
    second = np.stack([-half / low, half * (1 / low - 2 / high)], axis=1)
  return _make_run(
    c,
    _alternate(timesteps, timesteps[1:]),
    _alternate(high, low),
    keep=_alternate(ratio, ratio),
    history=_alternate(first, second),
    start=_alternate(*_starts(steps)),
    limit=c.clip_sample_range if c.clip_sample else np.inf,
  )


def make_dpmpp_sde(c: SimpleNamespace, steps: int) -> Sampler:
  """Equations (2) and (4).

  The increments of W over [σ_m, σ] and [σ', σ] are joint normal of correlation
  ρ² = (σ − σ_m)/(σ − σ'), so the second one is ρ ξ_1 + √(1 − ρ²) ξ_0. diffusers takes
  them from a Brownian tree of torchsde: of this law, but other numbers.
  """
  timesteps, sigmas = fractional_levels(c, steps, bounded_karras=False)
  high, low = sigmas[:-1], sigmas[1:]
  middle = np.sqrt(high[:-1] * low[:-1])
  (down, up), (whole_down, whole_up) = (
    _split(high[:-1], to) for to in (middle, low[:-1])
  )
  first = np.append(down / high[:-1], 0.0)  # the last step is that of Euler, to 0
  second = whole_down / high[:-1]
  shared = (high[:-1] - middle) / (high[:-1] - low[:-1])  # ρ²
  first_noise = np.stack([np.append(up, 0.0), np.zeros(steps)], axis=1)
  second_noise = whole_up * np.sqrt([1 - shared, shared])
  return _make_run(
    c,
    _alternate(timesteps, timesteps_of(middle, training_sigmas(c))),
    _alternate(high, middle),
    keep=_alternate(first, second),
    history=_alternate(1 - first, 1 - second)[:, None],
    start=_alternate(*_starts(steps)),
    noise=_alternate(first_noise, second_noise.T),
  )


def _alternate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """Rows first[0], second[0], first[1], …, first[−1], of n and at least n − 1."""
  rows = np.zeros((2 * len(first) - 1, *first.shape[1:]))
  rows[::2], rows[1::2] = first, second[: len(first) - 1]
  return rows


def _starts(steps: int) -> tuple[np.ndarray, np.ndarray]:
  """u and w of `table.py` for steps from x, and for second tries from their start."""
  return np.tile([1.0, 0.0], (steps, 1)), np.tile([0.0, 1.0], (steps, 1))


def _split(high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """σ_d and σ_u of a step from `high` to `low`."""
  up = low * np.sqrt(1 - (low / high) ** 2)
  return low**2 / high, up


def _make_run(c: SimpleNamespace, timesteps, sigmas, **columns) -> Sampler:
  return make_run(timesteps, **unscaled(c, clean_image, sigmas), **columns)
