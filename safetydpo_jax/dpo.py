"""The preference loss.

For a pair of a preferred image x^w and a dispreferred image x^l under one caption c,
one timestep t and one noise ε shared by both:

  (1)  e_θ(x) = mean over h, w, c of (f_θ(x_t, t, c) − y)²       denoising error
  (2)  m = −½ β · ((e_θ(x^w) − e_θ(x^l)) − (e_ref(x^w) − e_ref(x^l)))     margin
  (3)  loss = mean over pairs of −log σ(m)
  (4)  loss = mean over pairs of e_θ(x^w)                  supervised fine-tuning

f_θ is the UNet with its LoRA, f_ref the same UNet without. The margin is positive where
the policy prefers x^w more than the reference does; implicit accuracy is the share of
such pairs. With b = 0 the margin is 0 and the loss log 2.

Source: Wallace et al. 2023 (Diffusion-DPO), as SafetyDPO's released code uses it: the
mean over latent elements sets the size of β = 5000. diffusers' SD1.5 script writes
σ(β·x) without the ½ and takes β = 2500, which is the same.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from safetydpo_jax import diffusion
from safetydpo_jax import lora as lora_lib
from safetydpo_jax.lora import LoraTree, Tree

# Accuracy is reported by quarter of the noise schedule.
TIMESTEP_BINS = 4

Metrics = dict[str, jax.Array]


def denoising_errors(
  lora: LoraTree | None,
  params: Tree,
  latents: jax.Array,
  context: jax.Array,
  noise: jax.Array,
  timesteps: jax.Array,
  *,
  unet: nn.Module,
  schedule: diffusion.Schedule,
  added_cond: Mapping[str, jax.Array] | None = None,
  dropout: tuple[jax.Array, float] | None = None,
) -> jax.Array:
  """Equation (1) for k images that share caption, noise and timestep.

  Args:
    lora: scale folded in; None for the frozen base model.
    params: the UNet's parameters.
    latents: (B, k, h, w, c) clean.
    context: (B, l, d).
    noise: (B, h, w, c).
    timesteps: (B,) int32.
    unet: the Flax module.
    schedule: the checkpoint's noise schedule.
    added_cond: None, or arrays (B, …) for SDXL.
    dropout: None, or (keys (B,), rate) of the LoRA's dropout.

  Returns:
    (B, k) float32. Predictions are cast to float32 before the difference: at β = 5000
    the rounding of bf16 would be larger than the margin.
  """
  chex.assert_rank([latents, context, noise, timesteps], [5, 3, 4, 1])
  batch, images = latents.shape[:2]
  chex.assert_shape(noise, (batch, *latents.shape[2:]))
  chex.assert_shape([timesteps, context], [(batch,), (batch, ...)])

  def per_image(x):  # (B, …) → (B·k, …): the caption's value for each of its images
    return jnp.repeat(x, images, axis=0)

  latents = latents.reshape(batch * images, *latents.shape[2:])
  noise, timesteps = per_image(noise), per_image(timesteps)
  noisy = diffusion.add_noise(schedule, latents, noise, timesteps)
  variables = {"params": params} if lora is None else {"params": params, "lora": lora}
  if lora is not None and dropout is not None:
    keys, rate = dropout
    keys = jax.vmap(lambda key: jax.random.split(key, images))(keys).reshape(-1)
    variables["lora_dropout"] = lora_lib.dropout_draws(lora, keys, rate)
  prediction: Any = unet.apply(
    variables,
    noisy,
    timesteps,
    per_image(context),
    added_cond=jax.tree.map(per_image, added_cond),
  )
  wanted = diffusion.target(schedule, latents, noise, timesteps)
  errors = jnp.square(prediction.astype(jnp.float32) - wanted)
  return errors.mean(axis=(1, 2, 3)).reshape(batch, images)


def preference_metrics(
  policy: jax.Array,
  reference: jax.Array,
  margin: jax.Array,
  timesteps: jax.Array,
  schedule: diffusion.Schedule,
) -> Metrics:
  """What a loss on preferences reports.

  Args:
    policy, reference: equation (1) with the LoRA and without, (B, 2).
    margin: (B,), positive where the preference is met.
    timesteps: (B,) int32.
    schedule: the checkpoint's noise schedule.

  Returns:
    Means over the batch of the four errors, the margin and the accuracy, and by quarter
    of the schedule (4,) the share of pairs that are correct there and the share of
    pairs drawn there.
  """
  # A tie, as at step 0, is half right.
  correct = 0.5 * (jnp.sign(margin) + 1.0)
  bins = timesteps * TIMESTEP_BINS // schedule.num_timesteps
  in_bin = jax.nn.one_hot(bins, TIMESTEP_BINS)  # (B, bins)
  return {
    "preferred_error": policy[:, 0].mean(),
    "dispreferred_error": policy[:, 1].mean(),
    "reference_preferred_error": reference[:, 0].mean(),
    "reference_dispreferred_error": reference[:, 1].mean(),
    "margin": margin.mean(),
    "accuracy": correct.mean(),
    "correct_by_timestep": (correct[:, None] * in_bin).mean(axis=0),
    "share_by_timestep": in_bin.mean(axis=0),
  }


def dpo_loss(
  lora: LoraTree,
  params: Tree,
  latents: jax.Array,
  context: jax.Array,
  noise: jax.Array,
  timesteps: jax.Array,
  *,
  unet: nn.Module,
  schedule: diffusion.Schedule,
  beta: float,
  added_cond: Mapping[str, jax.Array] | None = None,
  dropout: tuple[jax.Array, float] | None = None,
) -> tuple[jax.Array, Metrics]:
  """Equations (1) to (3); a pure function of its random draws.

  Args:
    lora: scale folded in; the only input meant to be differentiated.
    params: the UNet's parameters, frozen.
    latents: (B, 2, h, w, c) clean, index 0 of the pair axis preferred.
    context: (B, l, d) text encoder output, shared by the pair.
    noise: (B, h, w, c), shared by the pair.
    timesteps: (B,) int32, shared by the pair.
    unet: the Flax module.
    schedule: the checkpoint's noise schedule.
    beta: β of equation (2).
    added_cond: None, or {'text_embeds': (B, e), 'time_ids': (B, 6)}.
    dropout: None, or (keys (B,), rate): the share of LoRA inputs that the policy does
      not see, drawn for each image. The reference has no LoRA, so no dropout.

  Returns:
    The loss, () float32, and the metrics: it and those of `preference_metrics`.
  """
  chex.assert_axis_dimension(latents, 1, 2)
  inputs = (params, latents, context, noise, timesteps)
  errors = partial(
    denoising_errors, unet=unet, schedule=schedule, added_cond=added_cond
  )
  policy = errors(lora, *inputs, dropout=dropout)  # (B, 2)
  reference = jax.lax.stop_gradient(errors(None, *inputs))

  gap = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
  margin = -0.5 * beta * gap  # (B,)
  loss = -jax.nn.log_sigmoid(margin).mean()
  metrics = preference_metrics(policy, reference, margin, timesteps, schedule)
  return loss, {"loss": loss, **metrics}


def sft_loss(
  lora: LoraTree,
  params: Tree,
  latents: jax.Array,
  context: jax.Array,
  noise: jax.Array,
  timesteps: jax.Array,
  *,
  unet: nn.Module,
  schedule: diffusion.Schedule,
  added_cond: Mapping[str, jax.Array] | None = None,
  dropout: tuple[jax.Array, float] | None = None,
) -> tuple[jax.Array, Metrics]:
  """Equation (4): the ablation without a preference. Arguments as in `dpo_loss`."""
  errors = denoising_errors(
    lora,
    params,
    latents[:, :1],
    context,
    noise,
    timesteps,
    unet=unet,
    schedule=schedule,
    added_cond=added_cond,
    dropout=dropout,
  )
  loss = errors.mean()
  return loss, {"loss": loss, "preferred_error": loss}


class Loss(NamedTuple):
  """A loss that `config.dpo.loss` may name.

  Attributes:
    function: called as `dpo_loss` is, on one microbatch of one device; a mean over its
      pairs.
    reads: its hyperparameters, fields of `DpoConfig` and keywords of `function`.
  """

  function: Callable[..., tuple[jax.Array, Metrics]]
  reads: tuple[str, ...] = ()


LOSSES = {"dpo": Loss(dpo_loss, ("beta",)), "sft": Loss(sft_loss)}
