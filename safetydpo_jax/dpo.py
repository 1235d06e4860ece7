"""The preference loss and one train step.

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
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import struct

from safetydpo_jax import diffusion
from safetydpo_jax import lora as lora_lib
from safetydpo_jax.gradients import mean_gradient

# Accuracy is reported by quarter of the noise schedule.
TIMESTEP_BINS = 4
# Tells the keys of dropout from the step's others.
DROPOUT = 0xD50

Metrics = dict[str, jax.Array]


def denoising_errors(
  lora: Any,
  params: Any,
  latents: jax.Array,
  context: jax.Array,
  noise: jax.Array,
  timesteps: jax.Array,
  *,
  unet: Any,
  schedule: diffusion.Schedule,
  added_cond: Mapping[str, jax.Array] | None = None,
  dropout: tuple[jax.Array, float] | None = None,
) -> jax.Array:
  """Equation (1) for k images that share caption, noise and timestep.

  Args:
    lora: the LoRA tree, or None for the frozen base model.
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
  if dropout is not None:
    keys, rate = dropout
    keys = jax.vmap(lambda key: jax.random.split(key, images))(keys).reshape(-1)
    variables["lora_dropout"] = lora_lib.dropout_draws(lora, keys, rate)
  prediction = unet.apply(
    variables,
    noisy,
    timesteps,
    per_image(context),
    added_cond=jax.tree.map(per_image, added_cond),
  )
  wanted = diffusion.target(schedule, latents, noise, timesteps)
  errors = jnp.square(prediction.astype(jnp.float32) - wanted)
  return errors.mean(axis=(1, 2, 3)).reshape(batch, images)


def dpo_loss(
  lora: Any,
  params: Any,
  latents: jax.Array,
  context: jax.Array,
  noise: jax.Array,
  timesteps: jax.Array,
  *,
  unet: Any,
  schedule: diffusion.Schedule,
  beta: float,
  added_cond: Mapping[str, jax.Array] | None = None,
  dropout: tuple[jax.Array, float] | None = None,
) -> tuple[jax.Array, Metrics]:
  """Equations (1) to (3); a pure function of its random draws.

  Args:
    lora: the LoRA tree, scale folded in; the only input meant to be differentiated.
    params: the UNet's parameters, frozen.
    latents: (B, 2, h, w, c) clean, index 0 of the pair axis preferred.
    context: (B, l, d) text encoder output, shared by the pair.
    noise: (B, h, w, c), shared by the pair.
    timesteps: (B,) int32, shared by the pair.
    unet: the Flax module.
    schedule: the checkpoint's noise schedule.
    beta: β of equation (2).
    added_cond: None, or {'text_embeds': (B, e), 'time_ids': (B, 6)}.
    dropout: None, or (keys (B,), rate): each image's share of LoRA inputs that the
      policy does not see. The reference has no LoRA, and none.

  Returns:
    The loss, () float32, and metrics: means over the batch of the four errors, the
    margin and the accuracy, and by quarter of the schedule (4,) the share of pairs that
    are correct there and the share of pairs drawn there.
  """
  chex.assert_axis_dimension(latents, 1, 2)
  inputs = (params, latents, context, noise, timesteps)
  model = {"unet": unet, "schedule": schedule, "added_cond": added_cond}
  policy = denoising_errors(lora, *inputs, dropout=dropout, **model)  # (B, 2)
  reference = jax.lax.stop_gradient(denoising_errors(None, *inputs, **model))

  gap = (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])
  margin = -0.5 * beta * gap  # (B,)
  loss = -jax.nn.log_sigmoid(margin).mean()
  # A tie, as at step 0, is half right.
  correct = 0.5 * (jnp.sign(margin) + 1.0)
  bins = timesteps * TIMESTEP_BINS // schedule.num_timesteps
  in_bin = jax.nn.one_hot(bins, TIMESTEP_BINS)  # (B, bins)
  return loss, {
    "loss": loss,
    "preferred_error": policy[:, 0].mean(),
    "dispreferred_error": policy[:, 1].mean(),
    "reference_preferred_error": reference[:, 0].mean(),
    "reference_dispreferred_error": reference[:, 1].mean(),
    "margin": margin.mean(),
    "accuracy": correct.mean(),
    "correct_by_timestep": (correct[:, None] * in_bin).mean(axis=0),
    "share_by_timestep": in_bin.mean(axis=0),
  }


def sft_loss(
  lora: Any,
  params: Any,
  latents: jax.Array,
  context: jax.Array,
  noise: jax.Array,
  timesteps: jax.Array,
  *,
  unet: Any,
  schedule: diffusion.Schedule,
  beta: float = 0.0,
  added_cond: Mapping[str, jax.Array] | None = None,
  dropout: tuple[jax.Array, float] | None = None,
) -> tuple[jax.Array, Metrics]:
  """Equation (4): the ablation without a preference. Arguments as in `dpo_loss`."""
  del beta
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


LOSSES = {"dpo": dpo_loss, "sft": sft_loss}


@struct.dataclass
class TrainState:
  """All that training changes; nothing here belongs to the base model.

  Attributes:
    step: optimizer steps taken, () int32.
    lora: the LoRA tree, scale not folded in.
    opt_state: the optimizer's state for `lora`.
  """

  step: jax.Array
  lora: Any
  opt_state: Any


def init_state(lora: Any, optimizer: optax.GradientTransformation) -> TrainState:
  """The state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora))


def draw(
  key: jax.Array, moments: jax.Array, schedule: diffusion.Schedule, scaling: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The random draws of one step.

  Args:
    key: this step's key.
    moments: (B, 2, h, w, 2c) VAE moments.
    schedule: the checkpoint's noise schedule.
    scaling: the VAE's scaling factor.

  Returns:
    Clean latents (B, 2, h, w, c), one posterior sample an image; noise (B, h, w, c)
    and timesteps (B,), one a pair.
  """
  posterior_key, noise_key, timestep_key = jax.random.split(key, 3)
  shape = (*moments.shape[:-1], moments.shape[-1] // 2)
  latents = diffusion.posterior_sample(
    moments, jax.random.normal(posterior_key, shape), scaling
  )
  noise = jax.random.normal(noise_key, (shape[0], *shape[2:]))
  timesteps = jax.random.randint(timestep_key, shape[:1], 0, schedule.num_timesteps)
  return latents, noise, timesteps


def make_train_step(
  *,
  unet: Any,
  schedule: diffusion.Schedule,
  encode_text: Callable[[Any, Any], tuple[jax.Array, Any]],
  optimizer: optax.GradientTransformation,
  loss: str,
  beta: float,
  alpha: float,
  scaling_factor: float,
  devices: int,
  accumulation: int,
  seed: int,
  alpha_pattern: lora_lib.Pattern = (),
  dropout: float = 0.0,
) -> Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]:
  """One optimizer step: `(state, params, batch) → (state, metrics)`, ready for jit.

  Args:
    unet: the Flax module.
    schedule: the checkpoint's noise schedule.
    encode_text: (params, batch) → (context (B, l, d), added_cond).
    optimizer: applied to the LoRA tree alone.
    loss: 'dpo' or 'sft'.
    beta: β of equation (2).
    alpha: of the LoRA; s = alpha / rank is folded in before the loss.
    scaling_factor: the VAE's.
    devices: devices that the batch is split over.
    accumulation: microbatches per step; devices × accumulation must divide the batch.
    seed: the run's seed; step n draws from fold_in(seed, n), so a resumed run needs
      no saved key and any number of devices draws the same.
    alpha_pattern: alphas of single layers, see `lora.fold_alpha`.
    dropout: share of a LoRA's inputs dropped; at 0 nothing is drawn for it.
  """

  def train_step(state, params, batch):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    latents, noise, timesteps = draw(key, batch.moments, schedule, scaling_factor)
    context, added_cond = encode_text(params, batch)
    # One key a pair, from a stream of its own: no other draw depends on dropout.
    keys = None
    if dropout:
      keys = jax.random.split(jax.random.fold_in(key, DROPOUT), noise.shape[0])

    def loss_fn(lora, rows):
      latents, context, noise, timesteps, added_cond, keys = rows
      return LOSSES[loss](
        lora_lib.fold_alpha(lora, alpha, alpha_pattern),
        params["unet"],
        latents,
        context,
        noise,
        timesteps,
        unet=unet,
        schedule=schedule,
        beta=beta,
        added_cond=added_cond,
        dropout=None if keys is None else (keys, dropout),
      )

    gradients, metrics = mean_gradient(
      loss_fn,
      state.lora,
      (latents, context, noise, timesteps, added_cond, keys),
      devices=devices,
      accumulation=accumulation,
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.lora)
    lora = optax.apply_updates(state.lora, updates)
    metrics |= {
      "gradient_norm": optax.tree.norm(gradients),
      "lora_norm": optax.tree.norm(lora),
    }
    return TrainState(state.step + 1, lora, opt_state), metrics

  return train_step
