"""One optimizer step: draws, loss, gradient, update.

Step n draws from fold_in(seed, n) alone: its posterior samples, noise, timesteps and
dropout are functions of the seed and the step, on any number of devices. So a resumed
run needs no saved key.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding

from safetydpo_jax import diffusion
from safetydpo_jax import lora as lora_lib
from safetydpo_jax.data.cache.batches import Batch
from safetydpo_jax.dpo import LOSSES, Metrics
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.lora import FactorTree, Tree
from safetydpo_jax.models import conditioning
from safetydpo_jax.models.flash import OnMesh
from safetydpo_jax.runtime import sharding
from safetydpo_jax.training.config import RunConfig
from safetydpo_jax.training.gradients import mean_gradient

# Keeps the keys of dropout apart from the step's other keys.
DROPOUT = 0xD50


@struct.dataclass
class TrainState:
  """Everything that training changes; nothing here belongs to the base model.

  Attributes:
    step: optimizer steps taken, () int32.
    lora: the factors, scale not folded in.
    opt_state: the optimizer's state for `lora`.
  """

  step: jax.Array
  lora: FactorTree
  opt_state: optax.OptState


# (state, params, batch) → (state, metrics)
TrainStep = Callable[[TrainState, Tree, Batch], tuple[TrainState, Metrics]]


def init_state(
  factors: FactorTree, optimizer: optax.GradientTransformation
) -> TrainState:
  """The state before the first step."""
  return TrainState(jnp.zeros((), jnp.int32), factors, optimizer.init(factors))


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
    Clean latents (B, 2, h, w, c), one posterior sample per image; noise (B, h, w, c)
    and timesteps (B,), one per pair.
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
  unet: nn.Module,
  schedule: diffusion.Schedule,
  encode_text: Callable[[Tree, Batch], tuple[jax.Array, dict[str, jax.Array] | None]],
  optimizer: optax.GradientTransformation,
  loss: Callable[..., tuple[jax.Array, Metrics]],
  alpha: float,
  scaling_factor: float,
  devices: int,
  accumulation: int,
  seed: int,
  alpha_pattern: lora_lib.Pattern = (),
  dropout: float = 0.0,
) -> TrainStep:
  """One optimizer step: `(state, params, batch) → (state, metrics)`, ready for jit.

  Args:
    unet: the Flax module.
    schedule: the checkpoint's noise schedule.
    encode_text: (params, batch) → (context (B, l, d), added_cond).
    optimizer: applied to nothing but the LoRA's factors.
    loss: a function of `dpo.LOSSES`, its hyperparameters bound.
    alpha: of the LoRA; s = alpha / rank is folded in before the loss.
    scaling_factor: the VAE's.
    devices: number of devices that the batch is split over.
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
    # One key per pair, from a stream of its own: no other draw depends on dropout.
    keys = None
    if dropout:
      keys = jax.random.split(jax.random.fold_in(key, DROPOUT), noise.shape[0])

    def loss_fn(factors, rows):
      latents, context, noise, timesteps, added_cond, keys = rows
      return loss(
        lora_lib.fold_alpha(factors, alpha, alpha_pattern),
        params["unet"],
        latents,
        context,
        noise,
        timesteps,
        unet=unet,
        schedule=schedule,
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
    factors = optax.apply_updates(state.lora, updates)
    metrics |= {
      "gradient_norm": optax.tree.norm(gradients),
      "lora_norm": optax.tree.norm(factors),
    }
    return TrainState(state.step + 1, factors, opt_state), metrics

  return train_step


def jit_train_step(
  config: RunConfig,
  pipeline: Pipeline,
  mesh: Mesh,
  tx: optax.GradientTransformation,
  shardings: Tree,
) -> jax.stages.Wrapped:
  """The jitted step of a run, a `TrainStep`; its state is donated.

  Args:
    config: the run's config.
    pipeline: the base model; its weights are an argument of the step.
    mesh: the devices.
    tx: the optimizer.
    shardings: where the base weights are, see `sharding.base_shardings`.
  """
  replicated = NamedSharding(mesh, sharding.REPLICATED)

  def encode_text(params, batch):
    return conditioning.encode(
      pipeline.text_encoders, params, batch.token_ids, batch.time_ids
    )

  unet = pipeline.unet.clone(attention=OnMesh(config.attention, mesh))
  loss, reads = LOSSES[config.dpo.loss]
  train_step = make_train_step(
    unet=unet,
    schedule=pipeline.schedule,
    encode_text=encode_text,
    optimizer=tx,
    loss=partial(loss, **{name: getattr(config.dpo, name) for name in reads}),
    alpha=config.lora.alpha,
    alpha_pattern=config.lora.alpha_pattern,
    dropout=config.lora.dropout,
    scaling_factor=pipeline.scaling_factor,
    devices=mesh.size,
    accumulation=config.accumulation,
    seed=config.seed,
  )

  def step(state, params, batch):
    return train_step(state, sharding.gather_at_use(mesh, params), batch)

  return jax.jit(
    step,
    in_shardings=(replicated, shardings, NamedSharding(mesh, sharding.BATCH)),
    out_shardings=replicated,
    donate_argnums=0,
  )
