"""Devices as a mesh ('data', 'fsdp'), and where each array lives on it.

The batch is split over both axes; the LoRA and the optimizer's state are replicated
(under 30 MB); base weights are replicated unless `mesh.fsdp` > 1 splits them. Then the
only communication of a step is one all-reduce of the LoRA gradients, plus, with fsdp,
the gathers of the weights.
"""

import os
import re
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from safetydpo_jax.errors import InputError

BATCH = PartitionSpec(("data", "fsdp"))
REPLICATED = PartitionSpec()

# (path, spec), the first match wins; a split that does not divide the axis is dropped.
BASE_RULES = (
  (r"kernel$", PartitionSpec(..., "fsdp")),
  (r"embedding$", PartitionSpec("fsdp")),
  (r"", REPLICATED),
)


def initialize_hosts() -> None:
  """Joins the other processes when the launcher names a coordinator.

  JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and
  JAX_PROCESS_ID; a single process needs none.

  Raises:
    InputError: if only some of them are set.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  address, count, index = map(os.environ.get, names)
  if address is None or jax.distributed.is_initialized():
    return
  if not (count and index and count.isdigit() and index.isdigit()):
    raise InputError(
      f"{names[0]} is set; {names[1]} and {names[2]} must be whole numbers, they are "
      f"{count} and {index}"
    )
  jax.distributed.initialize(address, int(count), int(index))


def use_precision(dtype: str) -> None:
  """Makes float32 mean float32: TPUs would multiply in bf16, GPUs in TF32."""
  if dtype == "float32":
    jax.config.update("jax_default_matmul_precision", "highest")


def make_mesh(data: int = -1, fsdp: int = 1, devices: Any = None) -> Mesh:
  """A mesh over `devices`, by default all of all hosts; `data` −1 takes the rest.

  Raises:
    InputError: if the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if fsdp >= 1 and data == -1 and count % fsdp == 0:
    data = count // fsdp
  if data * fsdp != count:
    raise InputError(
      f"mesh.data × mesh.fsdp is {data} × {fsdp}, but there are {count} devices; "
      "set mesh.data=-1 to use what mesh.fsdp leaves"
    )
  axis_types = (AxisType.Auto,) * 2
  return jax.make_mesh(
    (data, fsdp), ("data", "fsdp"), axis_types=axis_types, devices=devices
  )


def _spec(path: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  rule = next(spec for pattern, spec in BASE_RULES if re.search(pattern, path))
  axes = list(rule)
  if axes and axes[0] is ...:
    axes = [None] * (len(shape) - len(axes) + 1) + axes[1:]
  divides = all(name is None or size % fsdp == 0 for size, name in zip(shape, axes))
  return PartitionSpec(*axes) if divides else REPLICATED


def base_shardings(mesh: Mesh, params: Any) -> dict:
  """A NamedSharding for every base weight, by `BASE_RULES`."""
  fsdp = mesh.shape["fsdp"]
  return unflatten_dict(
    {
      path: NamedSharding(
        mesh, _spec("/".join(path), leaf.shape, fsdp) if fsdp > 1 else REPLICATED
      )
      for path, leaf in flatten_dict(params).items()
    }
  )


def place(tree: Any, shardings: Any) -> Any:
  """Host arrays, equal on every host, onto the devices of a sharding.

  `shardings` is one sharding or a tree of them. Only this host's parts are copied.
  """

  def put(leaf, sharding):
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

  if isinstance(shardings, NamedSharding):
    return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
  return jax.tree.map(put, tree, shardings)


def place_batch(mesh: Mesh, batch: Any) -> Any:
  """This host's rows of a batch → global arrays split over the mesh's devices."""
  sharding = NamedSharding(mesh, BATCH)
  return jax.tree.map(
    lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch
  )
