"""DPM-Solver: multistep (DPM++ 2M, with and without noise) and single-step (2S).

With x = α x_0 + s ε, λ = log(α/s) and h = λ' − λ from a step's start to its end, every
step has the form

  (1)  x ← a · x̄ − f · (φ_1 · D_0 + φ_2 · D_1 + φ_3 · D_2) + n · ξ
       φ_1 = e^u − 1,  φ_2 = φ_1/u − 1,  φ_3 = (φ_1 − u)/u² − ½

  dpmsolver++      d = x̂_0   u = −h    f = α'   a = s'/s          n = 0
  dpmsolver        d = ε̂     u = h     f = s'   a = α'/α          n = 0
  sde-dpmsolver++  d = x̂_0   u = −2h   f = α'   a = s'/s · e^−h   n² = s'² (1 − e^−2h)
  sde-dpmsolver    d = ε̂     u = h     f = 2s'  a = α'/α          n² = s'² (e^2h − 1)

D_0 is d at the step's start, D_1 and D_2 are its derivatives by λ/h, from differences.
At order 2 the solver type 'midpoint' has φ_1/2 in place of φ_2. Multistep solvers take
d from the steps before; single-step solvers evaluate it within the step, and then x̄ is
where the step started. Sources: Lu et al. 2022, DPM-Solver and DPM-Solver++.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling.noise_levels import (
  clean_image,
  clean_noise,
  scales,
  whole_levels,
)
from safetydpo_jax.sampling.table import Sampler, make_run

ODES = ("dpmsolver++", "dpmsolver")
SDES = ("sde-dpmsolver++", "sde-dpmsolver")


class Row(NamedTuple):
  """One evaluation of the UNet.

  Attributes:
    keep, noise: a and n of equation (1).
    history: the weights of d by age, (solver_order,).
    again: whether x̄ is that of the row before.
  """

  keep: float
  noise: float
  history: np.ndarray
  again: bool


def make_dpmpp_2m(c: SimpleNamespace, steps: int) -> Sampler:
  """The multistep solver without noise: 'dpmsolver' if the config says so, or '++'."""
  return _make_multistep(c, steps, ODES)


def make_dpmpp_2m_sde(c: SimpleNamespace, steps: int) -> Sampler:
  """The multistep solver with noise: 'sde-dpmsolver' if the config says so, or '++'."""
  return _make_multistep(c, steps, SDES)


def _make_multistep(c: SimpleNamespace, steps: int, family: Sequence[str]) -> Sampler:
  """First steps, and last ones if so configured or to σ = 0, are of lower order."""
  algorithm = _algorithm(c, family)
  timesteps, sigmas = whole_levels(c, steps)
  few = c.lower_order_final and steps < 15
  rows = []
  for i in range(steps):
    order = min(c.solver_order, i + 1, steps - i if few else steps)
    if i == steps - 1 and (c.euler_at_final or c.final_sigmas_type == "zero"):
      order = 1
    lambdas = -np.log(sigmas[i::-1][:order])
    rows.append(_row(c, algorithm, sigmas[i], sigmas[i + 1], _backward(lambdas)))
  return _make_run(c, algorithm, timesteps, sigmas, rows)


def make_dpmpp_2s(c: SimpleNamespace, steps: int) -> Sampler:
  """The single-step solver; `steps` counts evaluations of the UNet, as in diffusers."""
  c.timestep_spacing, c.steps_offset = "linspace", 0  # its class has no other
  algorithm = _algorithm(c, (*ODES, SDES[0]))
  timesteps, sigmas = whole_levels(c, steps)
  rows = []
  for i, order in enumerate(_orders(c, steps)):
    start = i + 1 - order
    lambdas = -np.log(sigmas[start : i + 1])
    differences = _forward(lambdas, c.solver_type)
    row = _row(c, algorithm, sigmas[start], sigmas[i + 1], differences)
    rows.append(row._replace(again=order > 1))
  return _make_run(c, algorithm, timesteps, sigmas, rows)


def _algorithm(c: SimpleNamespace, family: Sequence[str]) -> str:
  """The config's algorithm_type if it is one of `family`, else the first of these."""
  algorithm = c.algorithm_type if c.algorithm_type in family else family[0]
  if not algorithm.endswith("++") and c.final_sigmas_type == "zero":
    raise InputError(
      f"scheduler_config.json: algorithm_type = {algorithm!r} needs final_sigmas_type "
      "'sigma_min', not 'zero'; set it, or choose another --sampler"
    )
  if algorithm in SDES and c.solver_order > 2:
    raise InputError(
      f"scheduler_config.json: solver_order = {c.solver_order} is not supported with "
      f"algorithm_type {algorithm!r}, only 1 or 2; choose another --sampler"
    )
  return algorithm


def _row(
  c: SimpleNamespace, algorithm: str, high: float, low: float, differences: np.ndarray
) -> Row:
  """Equation (1) from σ = `high` to `low`.

  Args:
    c: the fields of scheduler_config.json.
    algorithm: one of `ODES` and `SDES`.
    high, low: σ of start and end; `low` may be 0 at order 1.
    differences: D_0 … in terms of d by age and of λ: row 0 times d is D_0; the others
      are derivatives by λ itself, (order, order).
  """
  (alpha, next_alpha), (s, next_s) = scales(np.array([high, low]))
  h = np.log(high / low) if low else np.inf
  u, factor, keep, variance = {
    "dpmsolver++": (-h, next_alpha, next_s / s, 0.0),
    "dpmsolver": (h, next_s, next_alpha / alpha, 0.0),
    "sde-dpmsolver++": (
      -2 * h,
      next_alpha,
      next_s / s * np.exp(-h),
      -np.expm1(-2 * h),
    ),
    "sde-dpmsolver": (h, 2 * next_s, next_alpha / alpha, np.expm1(2 * h)),
  }[algorithm]
  order = len(differences)
  phi = [np.expm1(u)]
  if order > 1:
    midpoint = order == 2 and c.solver_type != "heun"
    phi.append(phi[0] / 2 if midpoint else phi[0] / u - 1)
  if order > 2:
    phi.append((phi[0] - u) / u**2 - 1 / 2)
  history = np.zeros(c.solver_order)
  for power, (weight, difference) in enumerate(zip(phi, differences)):
    history[:order] -= factor * weight * h**power * difference
  return Row(keep, next_s * np.sqrt(variance), history, False)


def _backward(lambdas: np.ndarray) -> np.ndarray:
  """D_0, D_1 and D_2 by λ, of d at λ of this step and of those before, by age."""
  if len(lambdas) == 1:
    return np.eye(1)
  if len(lambdas) == 2:
    return np.array([[1, 0], np.array([1, -1]) / (lambdas[0] - lambdas[1])])
  before, earlier = lambdas[0] - lambdas[1], lambdas[1] - lambdas[2]
  slope = np.array([1, -1, 0]) / before
  bend = (slope - np.array([0, 1, -1]) / earlier) / (before + earlier)
  return np.array([[1, 0, 0], slope + before * bend, bend])


def _forward(lambdas: np.ndarray, solver_type: str) -> np.ndarray:
  """D_0, D_1 and D_2 by λ, of d at λ of the step's evaluations, by age."""
  order = len(lambdas)
  first = np.eye(order)[-1]
  if order == 1:
    return np.eye(1)
  # Slopes from the start to each later evaluation, the last one first.
  slopes = [
    (np.eye(order)[age] - first) / (lambdas[-1 - age] - lambdas[0])
    for age in range(order - 1)
  ]
  if order == 2:
    return np.array([first, slopes[0]])
  late, early = slopes
  if solver_type != "heun":
    return np.array([first, late, np.zeros(3)])
  near, far = lambdas[1] - lambdas[0], lambdas[2] - lambdas[0]
  slope = (far * early - near * late) / (far - near)
  return np.array([first, slope, 2 * (late - early) / (far - near)])


def _orders(c: SimpleNamespace, steps: int) -> list[int]:
  """The order at each evaluation of a single-step solver: 1, 2, …, and again."""
  order = c.solver_order
  to_zero = c.final_sigmas_type == "zero"
  orders = [1 + i % order for i in range(steps)]
  if to_zero or (c.lower_order_final and steps % order == 0):
    orders[-1] = 1
  return orders


def _make_run(c: SimpleNamespace, algorithm, timesteps, sigmas, rows) -> Sampler:
  clean = clean_image if algorithm.endswith("++") else clean_noise
  again = np.array([row.again for row in rows])
  return make_run(
    timesteps,
    clean=clean(c.prediction_type, *scales(sigmas[:-1])),
    start=np.stack([~again, again], axis=1),
    keep=[row.keep for row in rows],
    history=[row.history for row in rows],
    noise=[row.noise for row in rows],
  )
