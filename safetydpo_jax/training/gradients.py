"""Gradients summed over microbatches and devices, with one all-reduce a step."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from safetydpo_jax.dpo import Metrics
from safetydpo_jax.lora import FactorTree
from safetydpo_jax.runtime.sharding import BATCH


def mean_gradient(
  loss: Callable[[FactorTree, chex.ArrayTree], tuple[jax.Array, Metrics]],
  factors: FactorTree,
  inputs: chex.ArrayTree,
  *,
  devices: int,
  accumulation: int,
) -> tuple[FactorTree, Metrics]:
  """The mean over a batch of (gradient, metrics), reduced across devices once.

  Every device sums the microbatches of its own rows in a buffer of its own, one slice
  of a leading axis, and that axis is summed after the loop. A plain loop would leave
  the sum over devices to the compiler, which would all-reduce every microbatch.

  Args:
    loss: (factors, inputs) → (loss, metrics), means over the rows it is given.
    factors: what to differentiate by.
    inputs: arrays (B, …), split over the devices along B.
    devices: number of devices that B is split over.
    accumulation: microbatches of B / accumulation rows over all devices.
  """

  def microbatches(x):  # (B, …) → (accumulation, devices, rows, …)
    split = x.reshape(devices, accumulation, -1, *x.shape[1:])
    return jnp.swapaxes(split, 0, 1)

  gradient = jax.vmap(
    jax.grad(loss, has_aux=True), in_axes=(None, 0), spmd_axis_name=BATCH[0]
  )

  def accumulate(total, rows):
    return jax.tree.map(jnp.add, total, gradient(factors, rows)), None

  inputs = jax.tree.map(microbatches, inputs)
  first = jax.tree.map(lambda x: x[0], inputs)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, factors, first)
  )
  total, _ = jax.lax.scan(accumulate, zeros, inputs)
  return jax.tree.map(lambda x: x.mean(axis=0) / accumulation, total)
