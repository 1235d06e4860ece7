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

# Options of the compiler by backend. XLA:CPU by default widens its schedule to keep
# more threads busy and so holds policy and reference activations at once: a step of one
# SD1.5 pair at 512 pixels then takes 23.4 GiB of temporaries where 7.7 do.
COMPILER_OPTIONS = {"cpu": {"xla_cpu_enable_concurrency_optimized_scheduler": False}}

# (path, spec), the first match wins; a split that does not divide the axis is dropped.
BASE_RULES = (
  (r"kernel$", PartitionSpec(..., "fsdp")),
  (r"embedding$", PartitionSpec("fsdp")),
  (r"", REPLICATED),
)


def initialize_hosts() -> None:
  """Joins the other hosts when the launcher names a coordinator.

  JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, as JAX's own
  documentation spells them; a single process needs none.
  """
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if address and not jax.distributed.is_initialized():
    jax.distributed.initialize(
      address,
      int(os.environ["JAX_NUM_PROCESSES"]),
      int(os.environ["JAX_PROCESS_ID"]),
    )


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
