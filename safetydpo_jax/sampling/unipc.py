"""UniPC, the unified predictor-corrector (Zhao et al. 2023).

In the notation of `dpm.py`, with u = −h and f = α' for d = x̂_0 (`predict_x0`), u = h
and f = s' for d = ε̂, and r_j = (λ_j − λ)/h of evaluations before the step's start:

  (1)  x ← a · x̄ − f · (φ_1 · d_0 + B · Σ_j ρ_j · (d_j − d_0)/r_j)          predictor
  (2)  x̄ ← the same over the step before, with the new d as one more point    corrector
       R ρ = b,  R_kj = r_j^k,  b_k = k! φ_{k+1}/B,  B = u (bh1) or e^u − 1 (bh2)

The corrector replaces where a step starts, before the predictor goes on from there.
"""

import math
from types import SimpleNamespace

import numpy as np

from safetydpo_jax.sampling.noise_levels import (
  clean_image,
  clean_noise,
  scales,
  whole_levels,
)
from safetydpo_jax.sampling.table import Sampler, make_run


def make_unipc(c: SimpleNamespace, steps: int) -> Sampler:
  """Equations (1) and (2)."""
  timesteps, sigmas = whole_levels(c, steps, ends_with_own=True)
  start = np.tile([1.0, 0.0], (steps, 1))
  correct = np.zeros((steps, c.solver_order + 1))
  history = np.zeros((steps, c.solver_order + 1))
  keep = np.zeros(steps)
  order = 0
  for i in range(steps):
    if i and i - 1 not in c.disable_corrector:
      kept, weights = _step(c, sigmas, i - 1, order, corrects=True)
      start[i], correct[i, : order + 1] = (0.0, kept), weights
    left = steps - i if c.lower_order_final else steps
    order = min(c.solver_order, left, i + 1)
    keep[i], history[i, :order] = _step(c, sigmas, i, order, corrects=False)
  clean = clean_image if c.predict_x0 else clean_noise
  return make_run(
    timesteps,
    clean=clean(c.prediction_type, *scales(sigmas[:-1])),
    start=start,
    correct=correct,
    keep=keep,
    history=history,
  )


def _step(
  c: SimpleNamespace, sigmas: np.ndarray, i: int, order: int, *, corrects: bool
) -> tuple[float, np.ndarray]:
  """The step from σ_i to σ_{i+1}.

  Returns:
    a, and the weights of d by age, (order,), or (order + 1,) for the corrector, where
    the newest d is that at the step's end.
  """
  high, low = sigmas[i : i + 2]
  (alpha, s), (next_alpha, next_s) = scales(high), scales(low)
  h = np.log(high / low) if low else np.inf
  keep, factor, u = next_alpha / alpha, next_s, h
  if c.predict_x0:
    keep, factor, u = next_s / s, next_alpha, -h
  ratios = np.log(high / sigmas[i - np.arange(1, order)]) / h
  points = [*ratios, 1.0] if corrects else [*ratios]
  # Weights of d_0 at the step's start, of those before it, and of that at its end.
  weights = np.zeros(order + 1)
  weights[0] = -factor * np.expm1(u)
  if points:
    scale = u if c.solver_type == "bh1" else np.expm1(u)
    for j, (point, rho) in enumerate(zip(points, _solve(np.array(points), u, scale))):
      weight = -factor * scale * rho / point
      weights[j + 1 if j < order - 1 else order] += weight
      weights[0] -= weight
  if corrects:
    return keep, np.array([weights[-1], *weights[:-1]])
  return keep, weights[:-1]


def _solve(points: np.ndarray, u: float, scale: float) -> np.ndarray:
  """ρ of equation (2); one point has ½, which diffusers takes at every h."""
  if len(points) == 1:
    return np.array([0.5])
  phi, b = np.expm1(u) / u - 1, []
  for k in range(1, len(points) + 1):
    b.append(phi * math.factorial(k) / scale)
    phi = phi / u - 1 / math.factorial(k + 1)
  return np.linalg.solve(np.vander(points, increasing=True).T, np.array(b))
