"""Features of many images: a network over batches that are split over the devices.

Every device gets `per_device` rows at a time, whatever the number of devices, and the
end of the list is padded with zeros. So the same program runs on one device and on
eight, and an image's features are the same bit for bit, as long as the images come in
the same order.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import sharding

Extractor = Callable[[np.ndarray], np.ndarray]


def make_extractor(
  apply: Callable[[Any, jax.Array], jax.Array],
  params: Any,
  *,
  mesh: Mesh | None = None,
  per_device: int = 8,
) -> Extractor:
  """A function (n, ...) → (n, d) float32 over any number of rows.

  Args:
    apply: a pure (params, rows) → (rows, d), run with full float32 products.
    params: its weights, on the host; they are copied to every device.
    mesh: the devices, by default this host's.
    per_device: rows per device at a time.

  Returns:
    The function; it raises InputError if a feature is not finite.

  Raises:
    InputError: `per_device` is below 1.
  """
  mesh = sharding.make_mesh(devices=jax.local_devices()) if mesh is None else mesh
  if per_device < 1:
    raise InputError(f"per_device is {per_device}; expected 1 or more")
  rows = NamedSharding(mesh, sharding.BATCH)
  replicated = NamedSharding(mesh, sharding.REPLICATED)
  placed = sharding.place(params, replicated)

  def compute(params, batch):
    with jax.default_matmul_precision("highest"):
      return apply(params, batch).astype(jnp.float32)

  run = jax.jit(compute, in_shardings=(replicated, rows), out_shardings=rows)
  size = mesh.size * per_device

  def extract(batch: np.ndarray) -> np.ndarray:
    parts = []
    for start in range(0, max(len(batch), 1), size):
      part = batch[start : start + size]
      padded = np.zeros((size, *batch.shape[1:]), batch.dtype)
      padded[: len(part)] = part
      parts.append((run(placed, padded), len(part)))
    features = np.concatenate([np.asarray(part)[:count] for part, count in parts])
    if not np.isfinite(features).all():
      raise InputError(
        "a network's features are not finite: its weights are damaged or need float32; "
        "fetch them again"
      )
    return features

  return extract
