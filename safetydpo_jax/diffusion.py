"""The diffusion process: noise schedule, training targets, DDIM.

With ᾱ_t the cumulative product of 1 − β_t over the checkpoint's schedule:

  (1)  x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε                       forward process
  (2)  y = ε                          (epsilon prediction)     training target
       y = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0       (v prediction)
       y = x_0                                 (sample prediction)
  (3)  x_0 = s · (μ + exp(½ logvar) · η)               a VAE posterior sample
  (4)  x_s = √ᾱ_s · x̂_0 + √(1 − ᾱ_s) · ε̂            one DDIM step from t to s < t
  (5)  √ᾱ_t ← (√ᾱ_t − √ᾱ_T) · √ᾱ_1 / (√ᾱ_1 − √ᾱ_T)     no signal at the last step

Sources: Ho et al. 2020 (1, 2), Salimans & Ho 2022 (v), Song et al. 2021 (4, η = 0), Lin
et al. 2023 (5). Constants follow the checkpoint's scheduler_config.json, read as
diffusers reads it. Guidance and other samplers: `sampling/`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from flax.core import FrozenDict
from jax.typing import ArrayLike

from safetydpo_jax.errors import InputError
from safetydpo_jax.models.config import freeze

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_MOST_TIMESTEPS = 100_000  # published models have 1,000
_SWITCHES = ("set_alpha_to_one", "rescale_betas_zero_snr")


def _betas(kind: str, start: float, end: float, steps: int) -> np.ndarray:
  """β_t in float32, as torch computes it."""
  if kind == "linear":
    return np.linspace(start, end, steps, dtype=np.float32)
  if kind == "scaled_linear":
    return np.linspace(start**0.5, end**0.5, steps, dtype=np.float32) ** 2
  raise InputError(
    f"scheduler_config.json: beta_schedule {kind!r} is not supported; "
    "expected 'linear' or 'scaled_linear'"
  )


def _numbers(values: Any) -> np.ndarray:
  """A list of numbers, float32; empty if it is none."""
  try:
    return np.asarray(values, np.float32)
  except (TypeError, ValueError, OverflowError):
    return np.zeros(0, np.float32)


def without_terminal_signal(betas: np.ndarray) -> np.ndarray:
  """Equation (5) on β_t, in float32 and in the order of diffusers' arithmetic."""
  signal = np.sqrt(np.cumprod(1.0 - betas, dtype=np.float32))
  first, last = signal[0], signal[-1]
  alphas_cumprod = ((signal - last) * (first / (first - last))) ** 2
  ratios = alphas_cumprod[1:] / alphas_cumprod[:-1]
  return 1.0 - np.concatenate([alphas_cumprod[:1], ratios])


def read_alphas_cumprod(config: Mapping[str, Any], *, zero_snr: bool) -> np.ndarray:
  """ᾱ_t of a scheduler_config.json, (T,) float32; by equation (5) if `zero_snr`.

  Raises:
    InputError: a field has a value that makes no noise schedule.
  """
  steps = config.get("num_train_timesteps", 1000)
  if type(steps) is not int or not 1 < steps <= _MOST_TIMESTEPS:
    raise InputError(
      f"scheduler_config.json: num_train_timesteps = {steps!r}; expected a whole "
      f"number from 2 to {_MOST_TIMESTEPS:,}"
    )
  trained, ends = config.get("trained_betas"), ("beta_start", "beta_end")
  if trained is None:
    start, end = (config.get(*end) for end in zip(ends, (0.0001, 0.02)))
    if not all(type(beta) in (int, float) and 0 <= beta <= 1 for beta in (start, end)):
      raise InputError(
        f"scheduler_config.json: {' and '.join(ends)} are {start!r} and {end!r}; "
        "expected numbers from 0 to 1"
      )
    betas = _betas(config.get("beta_schedule", "linear"), start, end, steps)
  else:
    betas = _numbers(trained)
    if betas.shape != (steps,) or not ((betas >= 0) & (betas <= 1)).all():
      raise InputError(
        f"scheduler_config.json: trained_betas are not {steps:,} numbers from 0 to "
        "1, as many as num_train_timesteps"
      )
  if zero_snr:
    betas = without_terminal_signal(betas)
  return np.cumprod(1.0 - betas, dtype=np.float32)


@struct.dataclass
class Schedule:
  """A checkpoint's noise schedule.

  Attributes:
    alphas_cumprod: ᾱ_t, (T,) float32.
    final_alpha_cumprod: ᾱ of the step after DDIM's last one, () float32.
    prediction_type: what the UNet predicts, one of `PREDICTION_TYPES`.
    config: the whole scheduler_config.json, frozen, for `sampling/`.
  """

  alphas_cumprod: jax.Array | np.ndarray
  final_alpha_cumprod: ArrayLike
  prediction_type: str = struct.field(pytree_node=False, default="epsilon")
  config: FrozenDict[str, Any] = struct.field(
    pytree_node=False, default_factory=FrozenDict
  )

  @classmethod
  def from_config(cls, config: Mapping[str, Any]) -> "Schedule":
    """Reads a diffusers scheduler_config.json.

    Raises:
      InputError: for a beta schedule or prediction type that is not supported, or a
        field that has no such value.
    """
    prediction_type = config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
      raise InputError(
        f"scheduler_config.json: prediction_type {prediction_type!r} is not "
        f"supported; expected one of {', '.join(PREDICTION_TYPES)}"
      )
    for field in _SWITCHES:
      if config.get(field) not in (None, False, True):
        raise InputError(
          f"scheduler_config.json: {field} = {config[field]!r}; expected true or false"
        )
    alphas_cumprod = read_alphas_cumprod(
      config, zero_snr=bool(config.get("rescale_betas_zero_snr"))
    )
    final = 1.0 if config.get("set_alpha_to_one", True) else alphas_cumprod[0]
    return cls(
      alphas_cumprod=alphas_cumprod,
      final_alpha_cumprod=np.float32(final),
      prediction_type=prediction_type,
      config=freeze(config),
    )

  @property
  def num_timesteps(self) -> int:
    """T: training draws timesteps from 0 to T − 1."""
    return self.alphas_cumprod.shape[0]


def _signal_and_noise(
  schedule: Schedule, timesteps: jax.Array, ndim: int
) -> tuple[jax.Array, jax.Array]:
  """√ᾱ_t and √(1 − ᾱ_t), shaped (n, 1, …, 1) to stand beside rank-`ndim` arrays."""
  alphas = jnp.asarray(schedule.alphas_cumprod)[timesteps]
  alphas = alphas.reshape(alphas.shape + (1,) * (ndim - 1))
  return jnp.sqrt(alphas), jnp.sqrt(1.0 - alphas)


def add_noise(
  schedule: Schedule, latents: jax.Array, noise: jax.Array, timesteps: jax.Array
) -> jax.Array:
  """Equation (1): latents and noise (n, …), timesteps (n,) → noisy latents (n, …)."""
  chex.assert_equal_shape([latents, noise])
  chex.assert_shape(timesteps, latents.shape[:1])
  signal, noise_level = _signal_and_noise(schedule, timesteps, latents.ndim)
  return signal * latents + noise_level * noise


def target(
  schedule: Schedule, latents: jax.Array, noise: jax.Array, timesteps: jax.Array
) -> jax.Array:
  """Equation (2): what the UNet should predict, shaped like `latents` (n, …)."""
  chex.assert_equal_shape([latents, noise])
  if schedule.prediction_type == "epsilon":
    return noise
  if schedule.prediction_type == "sample":
    return latents
  signal, noise_level = _signal_and_noise(schedule, timesteps, latents.ndim)
  return signal * noise - noise_level * latents


def posterior_sample(
  moments: jax.Array, noise: jax.Array, scaling_factor: float | jax.Array
) -> jax.Array:
  """Equation (3).

  Args:
    moments: (…, 2c), mean and log variance side by side, as the VAE encoder gives.
    noise: η, (…, c), standard normal.
    scaling_factor: s of the VAE's config.json, 0.18215 for SD1.5.

  Returns:
    Clean latents (…, c) float32. The log variance is clipped to [−30, 20] as in
    diffusers.
  """
  mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
  chex.assert_equal_shape([mean, noise])
  deviation = jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))
  return scaling_factor * (mean + deviation * noise)


def spaced_timesteps(
  total: int, steps: int, spacing: str, offset: int, *, rounded=True, extra: int = 0
) -> np.ndarray:
  """Timesteps as diffusers spaces them, (steps,) float64, descending.

  Args:
    total: T of the training schedule.
    steps: how many.
    spacing: `timestep_spacing`: leading, trailing or linspace.
    offset: `steps_offset`, added to leading timesteps.
    rounded: whether linspace gives whole timesteps.
    extra: space out this many more and leave out the last.

  Raises:
    InputError: for a step count or spacing the schedule cannot serve.
  """
  if not 1 <= steps <= total - extra:
    raise InputError(f"steps is {steps}; expected 1 to {total - extra}")
  points = steps + extra
  descending: np.ndarray
  if spacing == "leading":
    descending = np.arange(points)[::-1] * (total // points) + offset
    if descending[0] >= total or offset < 0:
      raise InputError(
        f"{steps} steps with steps_offset {offset} go beyond the schedule's {total} "
        "timesteps; take fewer"
      )
  elif spacing == "trailing":
    descending = np.round(np.arange(total, 0, -total / steps)) - 1
  elif spacing == "linspace":
    descending = np.linspace(0, total - 1, points)[::-1]
    descending = descending.round() if rounded else descending
  else:
    raise InputError(
      f"scheduler_config.json: timestep_spacing {spacing!r} is not supported; expected "
      "leading, trailing or linspace"
    )
  # Rounding makes arange one longer for 62 step counts; its last timestep would be −1.
  return descending[:steps].astype(np.float64)


def sampling_timesteps(schedule: Schedule, steps: int) -> np.ndarray:
  """The (steps,) descending timesteps that diffusers' DDIM scheduler visits.

  Raises:
    InputError: for a step count or spacing the schedule cannot serve.
  """
  config = schedule.config
  spacing = config.get("timestep_spacing", "leading")
  offset = config.get("steps_offset", 0)
  timesteps = spaced_timesteps(schedule.num_timesteps, steps, spacing, offset)
  return timesteps.astype(np.int32)


def ddim_step(
  schedule: Schedule,
  prediction: jax.Array,
  latents: jax.Array,
  timestep: jax.Array,
  previous_timestep: jax.Array,
) -> jax.Array:
  """Equation (4): latents at `timestep` → latents at `previous_timestep`.

  `prediction` and `latents` are (n, h, w, c) float32; a negative
  `previous_timestep` means the end of the schedule.
  """
  alphas = jnp.asarray(schedule.alphas_cumprod)
  alpha = alphas[timestep]
  previous_alpha = jnp.where(
    previous_timestep >= 0,
    alphas[jnp.maximum(previous_timestep, 0)],
    schedule.final_alpha_cumprod,
  )
  signal, noise_level = jnp.sqrt(alpha), jnp.sqrt(1.0 - alpha)
  if schedule.prediction_type == "epsilon":
    clean, noise = (latents - noise_level * prediction) / signal, prediction
  elif schedule.prediction_type == "sample":
    clean, noise = prediction, (latents - signal * prediction) / noise_level
  else:
    clean = signal * latents - noise_level * prediction
    noise = signal * prediction + noise_level * latents
  if schedule.config.get("clip_sample", True):  # as diffusers' DDIMScheduler
    limit = schedule.config.get("clip_sample_range", 1.0)
    clean = jnp.clip(clean, -limit, limit)
  return jnp.sqrt(previous_alpha) * clean + jnp.sqrt(1.0 - previous_alpha) * noise


def sample_ddim(
  predict: Callable[[jax.Array, jax.Array], jax.Array],
  schedule: Schedule,
  latents: jax.Array,
  steps: int,
) -> jax.Array:
  """Denoises `latents` (n, h, w, c) with `steps` DDIM steps under one `lax.scan`.

  Args:
    predict: (latents (n, h, w, c), timestep ()) → prediction, guidance included.
    schedule: the checkpoint's noise schedule.
    latents: initial standard normal noise, float32.
    steps: number of UNet evaluations.
  """
  timesteps = sampling_timesteps(schedule, steps)
  previous = timesteps - schedule.num_timesteps // steps

  def step(latents, times):
    timestep, previous_timestep = times
    prediction = predict(latents, timestep).astype(jnp.float32)
    return (
      ddim_step(schedule, prediction, latents, timestep, previous_timestep),
      None,
    )

  latents, _ = jax.lax.scan(step, latents, (timesteps, previous))
  return latents
