"""A sampling run as a table of numbers, and the one step that executes it.

All samplers but DDIM are linear in the latents x, in the UNet's prediction and in
noise, apart from clipping. So a run is a table, computed once in float64, with a row
for each evaluation of the UNet, and the same step serves all of them:

  (1)  y = UNet(s · x, t)
  (2)  d_0 = clip(p · x + q · y, ±l)             what the method works with: x̂_0, ε̂ or y
  (3)  x̄ ← u · x + w · x̄ + Σ_k b_k · d_k               where the step starts
  (4)  x ← a · x̄ + Σ_k c_k · d_k + n_0 · ξ_0 + n_1 · ξ_1      ξ ~ N(0, 1)

d_k and ξ_k are from k rows before. x̄ is x for most (u = 1, w = b = 0); a method that
starts again from earlier latents has w = 1 instead, and one that corrects them with
what it has seen since (UniPC) has b as well.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from safetydpo_jax.errors import InputError

# (latents (n, h, w, c), timestep ()) → prediction, guidance included
Predict = Callable[[jax.Array, jax.Array], jax.Array]
# the row's number () → standard normal noise, shaped like the latents
Noise = Callable[[jax.Array], jax.Array]
# (predict, standard normal latents (n, h, w, c) float32, noise) → clean latents
Sampler = Callable[[Predict, jax.Array, Noise], jax.Array]


class Table(NamedTuple):
  """The numbers of equations (1) to (4), a row for each evaluation of the UNet.

  Attributes:
    timesteps: t, (n,).
    scale: s, (n,).
    clean: p and q, (n, 2).
    limit: l, (n,), infinity for none.
    start: u and w, (n, 2).
    correct: b, (n, K).
    keep: a, (n,).
    history: c, (n, K).
    noise: n_0 and n_1, (n, 2).
  """

  timesteps: np.ndarray
  scale: np.ndarray
  clean: np.ndarray
  limit: np.ndarray
  start: np.ndarray
  correct: np.ndarray
  keep: np.ndarray
  history: np.ndarray
  noise: np.ndarray


def make_run(
  timesteps: ArrayLike,
  *,
  clean: ArrayLike,
  keep: ArrayLike,
  history: ArrayLike,
  initial: float = 1.0,
  scale: ArrayLike = 1.0,
  limit: ArrayLike = np.inf,
  start: ArrayLike = (1.0, 0.0),
  correct: ArrayLike = 0.0,
  noise: ArrayLike = 0.0,
) -> Sampler:
  """A sampler from the columns of its table, see `Table`.

  Args:
    initial: scales the first latents.
    clean, start, noise: p and q, u and w, n_0 and n_1, one of each for all rows or for
      each row; `noise` may be n_0 alone, (n,).

  Raises:
    InputError: a number is not finite, as the fields of the config divide by zero.
  """
  n = len(np.asarray(timesteps))
  history = np.asarray(history, np.float64)
  noise = np.asarray(noise, np.float64)
  if noise.ndim < 2:
    noise = np.stack([np.broadcast_to(noise, n), np.zeros(n)], axis=1)
  table = Table(
    *(
      np.broadcast_to(np.asarray(column, np.float64), shape)
      for column, shape in (
        (timesteps, (n,)),
        (scale, (n,)),
        (clean, (n, 2)),
        (limit, (n,)),
        (start, (n, 2)),
        (correct, history.shape),
        (keep, (n,)),
        (history, history.shape),
        (noise, (n, 2)),
      )
    )
  )
  finite = table._replace(limit=np.zeros(n))
  if not all(np.isfinite(column).all() for column in finite):
    raise InputError(
      f"scheduler_config.json: with {n} evaluations of the UNet its fields ask for a "
      "division by zero or a σ without bounds; compare final_sigmas_type, sigma_min, "
      "lower_order_final and solver_order, or choose another --sampler"
    )
  return partial(run_table, table, float(initial))


def run_table(
  table: Table, initial: float, predict: Predict, latents: jax.Array, noise: Noise
) -> jax.Array:
  """Equations (1) to (4) under one `lax.scan`; `initial` scales the first latents."""
  noisy = bool(table.noise.any())
  clipped = bool(np.isfinite(table.limit).any())
  corrected = bool(table.correct.any())

  def step(carry: Any, numbered: Any) -> tuple[Any, None]:
    number, row = numbered
    latents, start, history, draw = carry
    prediction = predict(row.scale * latents, row.timesteps).astype(jnp.float32)
    clean = row.clean[0] * latents + row.clean[1] * prediction
    if clipped:
      clean = jnp.clip(clean, -row.limit, row.limit)
    history = (clean, *history[:-1])
    start = row.start[0] * latents + row.start[1] * start
    if corrected:
      start = _add(start, row.correct, history)
    latents = _add(row.keep * start, row.history, history)
    if noisy:
      draws = (noise(number), draw)
      latents, draw = _add(latents, row.noise, draws), draws[0]
    return (latents, start, history, draw), None

  rows = Table(*(column.astype(np.float32) for column in table))
  latents = initial * latents
  history = (jnp.zeros_like(latents),) * table.history.shape[1]
  draw = jnp.zeros_like(latents) if noisy else None
  numbers = np.arange(len(table.timesteps))
  carry: Any = (latents, latents, history, draw)
  (latents, *_), _ = jax.lax.scan(step, carry, (numbers, rows))
  return latents


def _add(total: jax.Array, weights: jax.Array, terms: tuple) -> jax.Array:
  """total + Σ_k weights[k] · terms[k]."""
  for age, term in enumerate(terms):
    total = total + weights[age] * term
  return total
