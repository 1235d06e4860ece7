"""Activations of all experts on calibration inputs, equations (1) and (2) of `comerge`.

The networks are unchanged: a Flax interceptor sees each adapted layer's input while the
UNet runs, once for every expert, with that expert's LoRA.
"""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from safetydpo_jax import diffusion
from safetydpo_jax.data.cache import batches
from safetydpo_jax.data.cache.batches import Draw
from safetydpo_jax.data.cache.records import PairCache
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.lora import Tree
from safetydpo_jax.merging.calibration import Batch
from safetydpo_jax.models import conditioning
from safetydpo_jax.models.layers import low_rank_input
from safetydpo_jax.runtime import sharding

COLLECTION = "activations"


def stack(loras: Sequence[Tree]) -> dict:
  """Trees of one structure → one tree with a leading expert axis, float32 numpy.

  Smaller ranks are padded with zeros, which change no product.
  """
  flat = [flatten_dict(lora) for lora in loras]
  stacked = {}
  for path in flat[0]:
    leaves = [np.asarray(tree[path], np.float32) for tree in flat]
    shape = np.max([leaf.shape for leaf in leaves], axis=0)
    stacked[path] = np.stack(
      [
        np.pad(x, [(0, full - size) for full, size in zip(shape, x.shape)])
        for x in leaves
      ]
    )
  return unflatten_dict(stacked)


def _capture(next_call, args, kwargs, context):
  """Equations (1) and (2) of each adapted layer, beside what it computes.

  In float32 whatever the compute type: a matrix of rank r costs almost nothing.
  """
  module = context.module
  if context.method_name == "__call__" and module.has_variable("lora", "a"):
    a, b = (module.get_variable("lora", part) for part in "ab")
    hidden = low_rank_input(module, args[0].astype(jnp.float32), a, "highest")
    parts = {"a": hidden, "b": jnp.dot(hidden, b, precision="highest")}
    for part, value in parts.items():
      tokens = tuple(range(1, value.ndim - 1))
      module.sow(
        COLLECTION,
        part,
        jnp.abs(value).mean(tokens),
        init_fn=lambda: None,
        reduce_fn=lambda before, now: now,
      )
  return next_call(*args, **kwargs)


def make_measure(
  pipeline: Pipeline, mesh: Mesh, shardings: Tree, *, seed: int, experts_at_once: int
) -> Callable[[Tree, Tree, Batch], dict]:
  """The jitted pass `(stacked loras, params, batch) → activations`.

  Args:
    pipeline: the base model; its weights are not read here.
    mesh: the devices; a batch is split over them.
    shardings: where the base weights are.
    seed: of posterior samples and noise. As in training, each image has a posterior
      sample and both share one noise; a draw depends on seed, pair and timestep alone.
    experts_at_once: how many experts' activations are in memory together.
      Seven SD1.5 experts one at a time, bf16, two pairs at 512: 1.9 GiB of arguments
      and 2.3 of temporaries, compiled for a v5e chip. More pairs use a device as well
      as more experts do.

  Returns:
    A function; its result mirrors the LoRA tree, with leaves (N, 2B, units) float32,
    the same on every host.
  """
  scaling_factor, schedule = pipeline.scaling_factor, pipeline.schedule
  unet = pipeline.unet.on_mesh(mesh, sharding.BATCH)

  def draw(pair, timestep, moments):  # moments (2, h, w, 2c)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), pair), timestep)
    posterior_key, noise_key = jax.random.split(key)
    shape = (*moments.shape[:-1], moments.shape[-1] // 2)
    latents = diffusion.posterior_sample(
      moments, jax.random.normal(posterior_key, shape), scaling_factor
    )
    noise = jax.random.normal(noise_key, shape[1:])
    timesteps = jnp.broadcast_to(timestep, (2,))
    return diffusion.add_noise(
      schedule, latents, jnp.broadcast_to(noise[None], shape), timesteps
    )

  def measure(loras, params, batch):
    noisy = jax.vmap(draw)(batch.pairs, batch.timesteps, batch.moments)
    noisy = noisy.reshape(-1, *noisy.shape[2:])  # (2B, h, w, c)
    timesteps = jnp.repeat(batch.timesteps, 2)
    conditions = conditioning.encode(
      pipeline.text_encoders, params, batch.token_ids, batch.time_ids
    )
    context, added_cond = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=0), conditions)

    def one_expert(lora):
      variables = {"params": params["unet"], "lora": lora}
      with nn.intercept_methods(_capture):
        _, state = unet.apply(
          variables, noisy, timesteps, context, added_cond, mutable=[COLLECTION]
        )
      return state[COLLECTION]

    return jax.lax.map(one_expert, loras, batch_size=experts_at_once)

  replicated = NamedSharding(mesh, sharding.REPLICATED)
  return jax.jit(
    measure,
    in_shardings=(replicated, shardings, NamedSharding(mesh, sharding.BATCH)),
    out_shardings=replicated,
  )


def measure(
  pipeline: Pipeline,
  loras: Sequence[Tree],
  cache: PairCache,
  pairs: Sequence[Draw],
  timesteps: Sequence[int],
  *,
  seed: int,
  batch_size: int,
  mesh: Mesh,
  experts_at_once: int = 1,
) -> list[dict]:
  """The activations of each expert on every pair at every timestep.

  Args:
    pipeline: the base model with the weights of UNet and text encoders, which move to
      the devices: the host's copy is cleared.
    loras: LoRA trees with the same layers.
    cache, pairs, timesteps: the calibration, see `calibration.py`.
    seed, experts_at_once: see `make_measure`.
    batch_size: pairs per device and call.
    mesh: the devices.

  Returns:
    For each expert a tree like its LoRA with leaves (inputs, units) float32 numpy;
    inputs in the order pair, timestep, image.
  """
  shardings = sharding.base_shardings(mesh, pipeline.params)
  params = sharding.place(pipeline.params, shardings)
  pipeline.params.clear()
  step = make_measure(
    pipeline, mesh, shardings, seed=seed, experts_at_once=experts_at_once
  )
  batch_size *= mesh.size
  items = [(p, t) for p in range(len(pairs)) for t in timesteps]
  stacked = sharding.place(stack(loras), NamedSharding(mesh, sharding.REPLICATED))
  rows = sharding.host_rows(mesh, batch_size)
  empty, found = cache.empty_token_ids, []
  for start in range(0, len(items), batch_size):
    batch = items[start : start + batch_size]
    padded = batch + batch[-1:] * (batch_size - len(batch))
    own = [padded[row] for row in rows]
    loaded = batches.assemble(cache, [pairs[p] for p, _ in own], empty)
    numbers = np.array(own, np.int32)
    rows_of_batch = Batch(
      loaded.moments,
      loaded.token_ids,
      numbers[:, 0],
      numbers[:, 1],
      loaded.time_ids,
    )
    activations = step(stacked, params, sharding.place_batch(mesh, rows_of_batch))
    found.append(
      {
        p: np.asarray(x)[:, : 2 * len(batch)]
        for p, x in flatten_dict(activations).items()
      }
    )
  joined = {path: np.concatenate([x[path] for x in found], 1) for path in found[0]}
  return [
    unflatten_dict(
      {
        path: leaf[n, :, : flatten_dict(lora)[path].shape[1]]
        for path, leaf in joined.items()
      }
    )
    for n, lora in enumerate(loras)
  ]
