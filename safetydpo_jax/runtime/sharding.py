"""Devices as a mesh ('data', 'fsdp'), and where each array lives on it.

The batch is split over both axes; the LoRA and the optimizer's state are replicated
(under 30 MB); base weights are replicated unless `mesh.fsdp` > 1 splits them. Then the
only communication of a step is one all-reduce of the LoRA gradients, plus, with fsdp,
one gather of each split weight where it is read.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax.linen import Partitioned
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from safetydpo_jax.errors import InputError

Tree = TypeVar("Tree")  # of arrays
AXES = ("data", "fsdp")
BATCH = PartitionSpec(AXES)
REPLICATED = PartitionSpec()

# (path, spec), the first match wins; a split that does not divide the axis is dropped.
BASE_RULES = (
  (r"kernel$", PartitionSpec(..., "fsdp")),
  (r"embedding$", PartitionSpec("fsdp")),
  (r"", REPLICATED),
)


def use_precision(dtype: str) -> None:
  """Makes float32 mean float32: TPUs would multiply in bf16, GPUs in TF32."""
  if dtype == "float32":
    jax.config.update("jax_default_matmul_precision", "highest")


def axis_sizes(data: int, fsdp: int, count: int) -> tuple[int, int]:
  """The mesh's axes over `count` devices; `data` −1 takes what `fsdp` leaves.

  Raises:
    InputError: if they do not multiply to the number of devices.
  """
  if fsdp >= 1 and data == -1 and count % fsdp == 0:
    data = count // fsdp
  if data * fsdp != count:
    raise InputError(
      f"mesh.data × mesh.fsdp is {data} × {fsdp}, but there are {count} devices; "
      "set mesh.data=-1 to use all that mesh.fsdp leaves"
    )
  return data, fsdp


def make_mesh(
  data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh over `devices`, by default all of all hosts; `data` −1 takes the rest.

  Several TPU slices lie along `data`, which crosses the slower network once a step.

  Raises:
    InputError: if the axes do not multiply to the number of devices, or `data` not by
      that of slices.
  """
  devices = jax.devices() if devices is None else devices
  data, fsdp = axis_sizes(data, fsdp, len(devices))
  tpus = [device for device in devices if device.platform == "tpu"]
  slices = len({getattr(device, "slice_index", 0) for device in tpus})
  if slices < 2:
    return jax.make_mesh(
      (data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices
    )
  if data % slices:
    raise InputError(
      f"mesh.data is {data} on {slices} slices; expected a multiple, since mesh.fsdp "
      "stays within one slice"
    )
  each = mesh_utils.create_hybrid_device_mesh(
    (data // slices, fsdp), (slices, 1), devices=devices
  )
  return Mesh(each, AXES, axis_types=(AxisType.Auto,) * 2)


def _spec(path: str, shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  rule = next(spec for pattern, spec in BASE_RULES if re.search(pattern, path))
  axes = list(rule)
  if axes and axes[0] is ...:
    axes = [None] * (len(shape) - len(axes) + 1) + axes[1:]
  divides = all(name is None or size % fsdp == 0 for size, name in zip(shape, axes))
  return PartitionSpec(*axes) if divides else REPLICATED


def base_shardings(mesh: Mesh, params: Mapping[str, Any]) -> dict:
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


def gather_at_use(mesh: Mesh, params: Mapping[str, Any]) -> Any:
  """Weights of a jitted step that are gathered where a layer reads them, if split.

  Without this the compiler may as well split the products, and does: the activations
  then go from device to device some hundred times a step. A layer under remat gathers
  again in the backward pass and keeps nothing between.
  """

  def box(leaf, sharding):
    whole = sharding.spec == REPLICATED
    names = (None,) * leaf.ndim
    return leaf if whole else Partitioned(leaf, names=names, mesh=mesh)

  return jax.tree.map(box, params, base_shardings(mesh, params))


def place(tree: Tree, shardings: Any) -> Tree:
  """Host arrays, equal on every host, onto the devices of a sharding.

  `shardings` is one sharding or a tree of them. Only this host's parts are copied.
  """

  def put(leaf, sharding):
    leaf = np.asarray(leaf)
    return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

  if isinstance(shardings, NamedSharding):
    return jax.tree.map(lambda leaf: put(leaf, shardings), tree)
  return jax.tree.map(put, tree, shardings)


def host_rows(
  mesh: Mesh, batch_size: int, devices: Collection[jax.Device] | None = None
) -> np.ndarray:
  """Which rows of a batch a host's devices hold: ascending, and each once.

  Not always a block of its own: `jax.make_mesh` orders TPUs by their place in the torus
  and not by host.

  Args:
    mesh: the devices of all hosts.
    batch_size: rows of a batch, a multiple of the mesh's devices.
    devices: the host's, by default this host's.
  """
  devices = mesh.local_devices if devices is None else devices
  slices = NamedSharding(mesh, BATCH).devices_indices_map((batch_size,))
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[slices[device]] for device in devices]))


def place_batch(mesh: Mesh, batch: Tree) -> Tree:
  """This host's rows of a batch → global arrays split over the mesh's devices.

  `batch` is a tree of arrays whose rows are those of `host_rows`, in their order.
  """
  sharding = NamedSharding(mesh, BATCH)

  def put(rows):
    size = len(rows) * mesh.size // len(mesh.local_devices)
    own = host_rows(mesh, size)

    def part(index):
      first, last, _ = index[0].indices(size)
      start = np.searchsorted(own, first)
      return rows[start : start + last - first]

    return jax.make_array_from_callback((size, *rows.shape[1:]), sharding, part)

  return jax.tree.map(put, batch)
