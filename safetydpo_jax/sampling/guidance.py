"""Guidance: away from the empty or negative prompt's prediction.

  (1)  ŷ = ŷ_∅ + g · (ŷ_c − ŷ_∅)                    classifier-free guidance
  (2)  ŷ ← φ · ŷ · std(ŷ_c) / std(ŷ) + (1 − φ) · ŷ          rescaled guidance
  (3)  w = 1000 · (g − 1),  [sin(w ω_i), cos(w ω_i)]           embedded guidance scale
       ω_i = 10000^(−i / (dim/2 − 1))

A UNet that was distilled with guidance (`time_cond_proj_dim`, LCM) takes (3) and the
prompt alone. Sources: Ho & Salimans 2022 (1), Lin et al. 2023 (2), Luo et al. 2023 (3).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from safetydpo_jax.models.layers import timestep_embedding
from safetydpo_jax.sampling.table import Predict


def guided(
  prediction: Callable[..., jax.Array],
  context: jax.Array,
  null_context: jax.Array,
  guidance_scale: float | jax.Array,
  rescale: float = 0.0,
) -> Predict:
  """Equation (1) as one doubled batch, and equation (2) if φ is not 0.

  Args:
    prediction: (latents (m, h, w, c), timesteps (m,), context (m, l, d)) → prediction
      (m, h, w, c); the first m/2 rows are those of the empty or negative prompt.
    context, null_context: (n, l, d), of the prompts and of the empty prompt.
    guidance_scale: g, a scalar or (n,).
    rescale: φ, 0 to 1; each image has its own standard deviations.
  """
  both = jnp.concatenate([null_context, context])
  scale = jnp.broadcast_to(jnp.asarray(guidance_scale, jnp.float32), context.shape[:1])
  scale = scale[:, None, None, None]

  def predict(latents, timestep):
    doubled = jnp.concatenate([latents, latents])
    timesteps = jnp.full((doubled.shape[0],), timestep)
    out = prediction(doubled, timesteps, both).astype(jnp.float32)
    unconditional, conditional = jnp.split(out, 2)
    mixed = unconditional + scale * (conditional - unconditional)
    if not rescale:
      return mixed
    axes = tuple(range(1, mixed.ndim))
    wanted, found = (
      jnp.std(values, axes, keepdims=True) for values in (conditional, mixed)
    )
    return mixed * (rescale * wanted / found + (1.0 - rescale))

  return predict


def embed_scale(guidance_scale: jax.Array, dim: int) -> jax.Array:
  """Equation (3), g (n,) → (n, dim) float32."""
  return timestep_embedding(
    1000.0 * (guidance_scale - 1.0), dim, flip_sin_to_cos=False, freq_shift=1
  )
