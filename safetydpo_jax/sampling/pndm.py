"""PNDM: pseudo numerical methods for diffusion models (Liu et al. 2022).

With ᾱ where a row starts, ᾱ' where it ends, and d = y in the equations of `table.py`:

  (1)  x ← √(ᾱ'/ᾱ) · x̄ − (ᾱ' − ᾱ) / (ᾱ √(1−ᾱ') + √(ᾱ (1−ᾱ) ᾱ')) · ε̂
  (2)  ε̂ = Σ_k w_k · d_k                       (epsilon prediction)
       ε̂ = √ᾱ · Σ_k w_k · d_k + √(1−ᾱ) · x̄       (v prediction)

w are the Adams–Bashforth weights of up to four past predictions (PLMS). The first steps
lack those: they are three Runge–Kutta steps of four evaluations each or, with
`skip_prk_steps` as Stable Diffusion 1 ships, formulas of lower order, the first of
which takes its step twice.
"""

import itertools
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from safetydpo_jax import diffusion
from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling.noise_levels import training_alphas
from safetydpo_jax.sampling.table import Sampler, make_run

ADAMS_BASHFORTH = (
  (1,),
  (3 / 2, -1 / 2),
  (23 / 12, -16 / 12, 5 / 12),
  (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class Row(NamedTuple):
  """One evaluation of the UNet.

  Attributes:
    at: its timestep.
    start, end: the timesteps its step leads from and to.
    again: whether it starts from the latents the row before started from.
    weights: w by the number of the evaluation.
  """

  at: int
  start: int
  end: int
  again: bool
  weights: dict[int, float]


def make_pndm(c: SimpleNamespace, steps: int) -> Sampler:
  """Equation (1), with either way to start."""
  total = c.num_train_timesteps
  times = diffusion.spaced_timesteps(total, steps, c.timestep_spacing, c.steps_offset)
  make_rows = _rows if c.skip_prk_steps else _rows_after_runge_kutta
  rows = make_rows([int(time) for time in times], total // steps)
  return _make_run(c, rows)


def _rows(times: list[int], stride: int) -> list[Row]:
  """The n + 1 evaluations of `skip_prk_steps`."""
  rows, kept = [], []
  for number, time in enumerate([*times[:2], *times[1:]]):
    if number == 1:  # the first step again, with the mean of its two ends
      rows.append(Row(time, time + stride, time, True, {0: 1 / 2, 1: 1 / 2}))
      continue
    kept = [number, *kept[:3]]
    weights = dict(zip(kept, ADAMS_BASHFORTH[len(kept) - 1]))
    rows.append(Row(time, time, time - stride, False, weights))
  return rows


def _rows_after_runge_kutta(times: list[int], stride: int) -> list[Row]:
  """Three steps of four evaluations, then steps of one evaluation."""
  if len(times) < 4:
    raise InputError(
      f"steps is {len(times)}; PNDM needs 4 or more, unless scheduler_config.json sets "
      "skip_prk_steps"
    )
  rows, kept, half = [], [], stride // 2
  for time, following in itertools.pairwise(times[:4]):
    n, middle = len(rows), following + half
    kept = [n, *kept]
    whole = {n: 1 / 6, n + 1: 1 / 3, n + 2: 1 / 3, n + 3: 1 / 6}
    rows += [
      Row(time, time, time - half, False, {n: 1}),
      Row(middle, time, middle, True, {n + 1: 1}),
      Row(middle, time, middle - half, True, {n + 2: 1}),
      Row(following, time, following, True, whole),
    ]
  for time in times[3:]:
    kept = [len(rows), *kept[:3]]
    weights = dict(zip(kept, ADAMS_BASHFORTH[3]))
    rows.append(Row(time, time, time - stride, False, weights))
  return rows


def _make_run(c: SimpleNamespace, rows: list[Row]) -> Sampler:
  """Equations (1) and (2)."""
  training = training_alphas(c).astype(np.float64)
  beyond = 1.0 if c.set_alpha_to_one else training[0]
  start, end = (
    np.array([training[time] if time >= 0 else beyond for time in times])
    for times in ([row.start for row in rows], [row.end for row in rows])
  )
  keep = np.sqrt(end / start)
  gain = -(end - start) / (
    start * np.sqrt(1 - end) + np.sqrt(start * (1 - start) * end)
  )
  if c.prediction_type == "v_prediction":
    keep, gain = keep + gain * np.sqrt(1 - start), gain * np.sqrt(start)
  oldest = max(i - min(row.weights) for i, row in enumerate(rows))
  history = np.zeros((len(rows), 1 + oldest))
  for i, row in enumerate(rows):
    for number, weight in row.weights.items():
      history[i, i - number] = gain[i] * weight
  again = np.array([row.again for row in rows])
  return make_run(
    [row.at for row in rows],
    clean=(0.0, 1.0),
    start=np.stack([~again, again], axis=1),
    keep=keep,
    history=history,
  )
