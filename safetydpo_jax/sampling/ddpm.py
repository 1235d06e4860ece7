"""DDPM, and the samplers of distilled models: LCM and TCD.

With ᾱ at a step's start, ᾱ' at its end, and d = x̂_0 in the equations of `table.py`:

  (1)  x ← √ᾱ' β/(1 − ᾱ) · d_0 + √(ᾱ/ᾱ') (1 − ᾱ')/(1 − ᾱ) · x + √v · ξ           DDPM
       β = 1 − ᾱ/ᾱ',  v = (1 − ᾱ')/(1 − ᾱ) · β  (fixed_small)  or β  (fixed_large)
  (2)  x ← √ᾱ' · (c_out · d_0 + c_skip · x) + √(1 − ᾱ') · ξ                       LCM
       c_skip = ¼/(τ² + ¼),  c_out = τ/√(τ² + ¼),  τ = timestep_scaling · t
  (3)  x ← √(ᾱ'/ᾱ_s) · (√ᾱ_s · d_0 + √(1 − ᾱ_s) · ε̂) + √(1 − ᾱ'/ᾱ_s) · ξ         TCD
       s = ⌊(1 − η) · t'⌋

LCM and TCD visit some of the `original_inference_steps` timesteps that the model was
distilled at, and add no noise in their last step, which ends at d_0 in (2) and at s = 0
in (3). Sources: Ho et al. 2020 (1), Luo et al. 2023 (2), Zheng et al. 2024 (3).
"""

from types import SimpleNamespace

import numpy as np

from safetydpo_jax import diffusion
from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling.noise_levels import clean_image, training_alphas
from safetydpo_jax.sampling.table import Sampler, make_run

ETA = 0.3  # of TCD, the default of diffusers' TCDScheduler.step


def make_ddpm(c: SimpleNamespace, steps: int) -> Sampler:
  """Equation (1); the last step ends at ᾱ' = 1."""
  training = training_alphas(c).astype(np.float64)
  timesteps = diffusion.spaced_timesteps(
    len(training), steps, c.timestep_spacing, c.steps_offset
  ).astype(int)
  alphas = training[timesteps]
  following = np.append(alphas[1:], 1.0)
  check_signal(c.prediction_type, alphas[0])
  beta = 1 - alphas / following
  variance = np.maximum((1 - following) / (1 - alphas) * beta, 1e-20)
  if c.variance_type == "fixed_large":
    variance = beta
  image = np.sqrt(following) * beta / (1 - alphas)
  return make_run(
    timesteps,
    clean=clean_image(c.prediction_type, np.sqrt(alphas), np.sqrt(1 - alphas)),
    limit=_limit(c),
    keep=np.sqrt(alphas / following) * (1 - following) / (1 - alphas),
    history=image[:, None],
    noise=np.sqrt(variance) * (timesteps > 0),
  )


def make_lcm(c: SimpleNamespace, steps: int) -> Sampler:
  """Equation (2)."""
  training = training_alphas(c).astype(np.float64)
  timesteps = _distilled_timesteps(c, steps)
  alphas = training[timesteps]
  following = np.append(alphas[1:], 1.0)
  check_signal(c.prediction_type, alphas[0])
  scaled = c.timestep_scaling * timesteps
  skip, out = 0.25 / (scaled**2 + 0.25), scaled / np.sqrt(scaled**2 + 0.25)
  return make_run(
    timesteps,
    clean=clean_image(c.prediction_type, np.sqrt(alphas), np.sqrt(1 - alphas)),
    limit=_limit(c),
    keep=np.sqrt(following) * skip,
    history=(np.sqrt(following) * out)[:, None],
    noise=np.sqrt(1 - following),
  )


def make_tcd(c: SimpleNamespace, steps: int) -> Sampler:
  """Equation (3), ε̂ written in terms of x and d_0."""
  training = training_alphas(c).astype(np.float64)
  timesteps = _distilled_timesteps(c, steps)
  alphas = training[timesteps]
  check_signal(c.prediction_type, alphas[0])
  following = np.append(timesteps[1:], 0)
  # In float32, as torch: the product may round to either side of a whole number.
  reached = np.floor(np.float32(1 - ETA) * following.astype(np.float32))
  between = training[reached.astype(int)]
  ratio = np.append(training[following[:-1]] / between[:-1], 1.0)
  noise = np.sqrt(ratio * (1 - between) / (1 - alphas))
  image = np.sqrt(ratio * between) - noise * np.sqrt(alphas)
  return make_run(
    timesteps,
    clean=clean_image(c.prediction_type, np.sqrt(alphas), np.sqrt(1 - alphas)),
    keep=noise,
    history=image[:, None],
    noise=np.sqrt(1 - ratio),
  )


def check_signal(prediction_type: str, alpha: float) -> None:
  """Raises `InputError` if no image can be recovered where ᾱ of the first step is 0."""
  if prediction_type == "epsilon" and not alpha:
    raise InputError(
      "scheduler_config.json: prediction_type 'epsilon' does not work with "
      "rescale_betas_zero_snr, as the first step has no signal to recover the image "
      "from; fix one of the two"
    )


def _limit(c: SimpleNamespace) -> float:
  """What x̂_0 is clipped to."""
  return c.clip_sample_range if c.clip_sample else np.inf


def _distilled_timesteps(c: SimpleNamespace, steps: int) -> np.ndarray:
  """(steps,) int, descending, evenly spread over those of the distillation.

  Raises:
    InputError: there are fewer of these.
  """
  original, total = c.original_inference_steps, c.num_train_timesteps
  if not 1 <= original <= total:
    raise InputError(
      f"scheduler_config.json: original_inference_steps = {original}; expected 1 to "
      f"num_train_timesteps, {total}"
    )
  if not 1 <= steps <= original:
    raise InputError(
      f"steps is {steps}; expected 1 to {original}, the original_inference_steps of "
      "scheduler_config.json"
    )
  timesteps = np.arange(original, 0, -1) * (total // original) - 1
  chosen = np.linspace(0, original, steps, endpoint=False)
  return timesteps[np.floor(chosen).astype(int)]
