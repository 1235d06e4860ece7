"""Gradients summed over microbatches and devices, with one all-reduce a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from safetydpo_jax.runtime.sharding import BATCH


def mean_gradient(
  loss: Callable[..., tuple[jax.Array, Any]],
  lora: Any,
  inputs: Any,
  *,
  devices: int,
  accumulation: int,
) -> tuple[Any, Any]:
  """The mean over a batch of (gradient, metrics), reduced across devices once.

  Every device sums the microbatches of its own rows in a buffer of its own, one slice
  of a leading axis, and that axis is summed after the loop. Summing over devices is
  left to the compiler nowhere else: a plain loop would all-reduce each microbatch.

  Args:
    loss: (lora, inputs) → (loss, metrics), means over the rows it is given.
    lora: what to differentiate by.
    inputs: arrays (B, …), split over the devices along B.
    devices: devices that B is split over.
    accumulation: microbatches of B / accumulation rows over all devices.
  """

  def microbatches(x):  # (B, …) → (accumulation, devices, rows, …)
    split = x.reshape(devices, accumulation, -1, *x.shape[1:])
    return jnp.swapaxes(split, 0, 1)

  gradient = jax.vmap(
    jax.grad(loss, has_aux=True), in_axes=(None, 0), spmd_axis_name=BATCH[0]
  )

  def accumulate(total, rows):
    return jax.tree.map(jnp.add, total, gradient(lora, rows)), None

  inputs = jax.tree.map(microbatches, inputs)
  first = jax.tree.map(lambda x: x[0], inputs)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, lora, first)
  )
  total, _ = jax.lax.scan(accumulate, zeros, inputs)
  return jax.tree.map(lambda x: x.mean(axis=0) / accumulation, total)
