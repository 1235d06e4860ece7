"""Linear multistep samplers, LMS and DEIS: past noise predictions, extrapolated.

With x/α = x_0 + σ ε, where dx/dσ = ε, and d = ε̂ in the equations of `table.py`, a step
from σ_i to σ_{i+1} integrates the polynomial through the last K predictions:

  (1)  x ← x + Σ_k d_k · ∫ Π_{j≠k} (f(σ) − f(σ_{i−j})) / (f(σ_{i−k}) − f(σ_{i−j})) dσ

LMS interpolates in σ itself, DEIS in f = log σ, and keeps α in its latents. Sources:
Liu et al. 2022 and Crowson's k-diffusion (LMS), Zhang & Chen 2023 (DEIS, log-ρ).
"""

from types import SimpleNamespace

import numpy as np
from numpy.polynomial import Polynomial

from safetydpo_jax.sampling.noise_levels import (
  clean_noise,
  fractional_levels,
  scales,
  unscaled,
  whole_levels,
)
from safetydpo_jax.sampling.table import Sampler, make_run

LMS_ORDER = 4  # diffusers' default, which its pipelines keep


def make_lms(c: SimpleNamespace, steps: int) -> Sampler:
  """Equation (1) in σ."""
  timesteps, sigmas = fractional_levels(c, steps, bounded_karras=False)
  history = np.zeros((steps, LMS_ORDER))
  for i in range(steps):
    known = sigmas[i::-1][:LMS_ORDER]
    # Centred on σ_i: powers of large σ would cancel.
    end = sigmas[i + 1] - sigmas[i]
    for k, weight in enumerate(_interpolate(known - sigmas[i])):
      history[i, k] = weight.integ()(end)
  return make_run(
    timesteps, **unscaled(c, clean_noise, sigmas[:-1]), keep=1.0, history=history
  )


def make_deis(c: SimpleNamespace, steps: int) -> Sampler:
  """Equation (1) in log σ; runs below 15 steps end in lower order if configured."""
  c.final_sigmas_type = "sigma_min"
  timesteps, sigmas = whole_levels(c, steps, ends_with_own=True)
  alpha, noise = scales(sigmas)
  history = np.zeros((steps, c.solver_order))
  ends_low = c.lower_order_final and steps < 15
  for i in range(steps):
    order = min(c.solver_order, i + 1, steps - i if ends_low else steps)
    known = np.log(sigmas[i::-1][:order])
    for k, weight in enumerate(map(_of_log, _interpolate(known - known[0]))):
      start, end = (s * weight(np.log(s) - known[0]) for s in sigmas[i : i + 2])
      history[i, k] = alpha[i + 1] * (end - start)
  return make_run(
    timesteps,
    clean=clean_noise(c.prediction_type, alpha[:-1], noise[:-1]),
    keep=alpha[1:] / alpha[:-1],
    history=history,
  )


def _interpolate(points: np.ndarray) -> list[Polynomial]:
  """Lagrange's polynomials: the k-th is 1 at points[k] and 0 at the others."""
  others = [np.delete(points, k) for k in range(len(points))]
  return [
    Polynomial.fromroots(roots) / np.prod(point - roots)
    if len(roots)
    else Polynomial([1.0])
    for point, roots in zip(points, others)
  ]


def _of_log(weight: Polynomial) -> Polynomial:
  """Q = P − P' + P'' − …, as s · Q(log s) has the derivative P(log s)."""
  total, term = weight, weight
  for _ in range(weight.degree()):
    term = -term.deriv()
    total = total + term
  return total
