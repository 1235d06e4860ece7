"""A sampling run as a table of numbers, and the one step that executes it.

PNDM, Euler, Euler ancestral and DPM-Solver++ are linear in the latents x, in the UNet's
prediction and in noise. So a run is a table, computed once in float64, with a row for
each evaluation of the UNet, and the same step serves all samplers:

  (1)  y = UNet(s · x, t)
  (2)  d_0 = p · x + q · y                  what the method works with: x̂_0, or y
  (3)  x ← a · x̄ + Σ_k c_k · d_k + n · ξ       d_k from k rows before, ξ ~ N(0, 1)

x̄ is x, except where the method starts again from earlier latents.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# (latents (n, h, w, c), timestep ()) → prediction, guidance included
Predict = Callable[[jax.Array, jax.Array], jax.Array]
# the row's number () → standard normal noise, shaped like the latents
Noise = Callable[[jax.Array], jax.Array]
# (predict, standard normal latents (n, h, w, c) float32, noise) → clean latents
Sampler = Callable[[Predict, jax.Array, Noise], jax.Array]


class Table(NamedTuple):
  """The numbers of equations (1) to (3), a row for each evaluation of the UNet.

  Attributes:
    timesteps: t, (n,).
    scale: s, (n,).
    clean: p and q, (n, 2).
    again: whether x̄ is the x̄ of the row before instead of x, (n,) bool.
    keep: a, (n,).
    history: c, (n, K).
    noise: n, (n,).
  """

  timesteps: np.ndarray
  scale: np.ndarray
  clean: np.ndarray
  again: np.ndarray
  keep: np.ndarray
  history: np.ndarray
  noise: np.ndarray


def run_table(
  table: Table, initial: float, predict: Predict, latents: jax.Array, noise: Noise
) -> jax.Array:
  """Equations (1) to (3) under one `lax.scan`; `initial` scales the first latents."""
  noisy = bool(table.noise.any())

  def step(carry, numbered):
    number, row = numbered
    latents, start, history = carry
    start = jnp.where(row.again, start, latents)
    prediction = predict(row.scale * latents, row.timesteps).astype(jnp.float32)
    clean = row.clean[0] * latents + row.clean[1] * prediction
    history = (clean, *history[:-1])
    latents = row.keep * start
    for age, past in enumerate(history):
      latents = latents + row.history[age] * past
    if noisy:
      latents = latents + row.noise * noise(number)
    return (latents, start, history), None

  rows = Table(
    *(column if column.dtype == bool else column.astype(np.float32) for column in table)
  )
  latents = initial * latents
  history = (jnp.zeros_like(latents),) * table.history.shape[1]
  numbers = np.arange(len(table.timesteps))
  (latents, _, _), _ = jax.lax.scan(step, (latents, latents, history), (numbers, rows))
  return latents
