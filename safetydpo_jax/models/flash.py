"""Attention over long sequences on TPU, with the splash kernel that comes with JAX.

    out = softmax(q kᵀ / √d) v,  block by block: no (l, m) matrix exists     (1)

The kernel is a program for one chip, which the compiler cannot split over a mesh. So
the forward and the backward pass each run under `shard_map`, where every device
computes its own rows. The backward pass is not left to the transpose of `shard_map`:
that would sum gradients over the axes that `rows` does not name, and under
`vmap(spmd_axis_name=…)` exactly those axes hold other rows.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh, PartitionSpec

# Blocks of queries and keys: the largest that divides the length. Blocks of 512 compile
# for v5e with heads of 40, 64, 80 and 160, for v6e with 40 and 160.
BLOCKS = (512, 256, 128)


@dataclasses.dataclass(frozen=True)
class OnMesh:
  """How attention is computed where the batch is split over several devices.

  Attributes:
    kernel: as in `attention.attend`.
    mesh: the devices, also those of a topology that is only compiled for.
    rows: how the first axis of q, k and v is split. None under a `vmap` over the
      devices whose `spmd_axis_name` names the mesh's axes.
  """

  kernel: str
  mesh: Mesh
  rows: PartitionSpec | None = None

  @property
  def platform(self) -> str:
    return self.mesh.devices.flat[0].platform


def takes(length: int, keys: int, head: int) -> bool:
  """Whether the kernel computes these sizes without padding."""
  return length % BLOCKS[-1] == 0 == keys % BLOCKS[-1] and head <= 256


def flash(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  place: OnMesh | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Equation (1) for every head.

  Args:
    q: (n, l, heads, d), l a multiple of 128, d up to 256: a size that is not a multiple
      of the chip's lanes is padded in its registers, with zeros that add nothing.
    k, v: (n, m, heads, d), m a multiple of 128.
    place: the mesh, if the step runs on more than one device.
    interpret: compute without a TPU, slowly.

  Returns:
    (n, l, heads, d), in the type of `q`.
  """
  q = q / math.sqrt(q.shape[-1])
  attend = partial(_attend, interpret=interpret)
  if place is None or place.mesh.size == 1:
    return attend(q, k, v)

  rows = PartitionSpec() if place.rows is None else place.rows

  def split(function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.shard_map(
      function,
      mesh=place.mesh,
      in_specs=rows,
      out_specs=rows,
      check_vma=False,  # the kernel does not say over which axes its results vary
    )

  compute = jax.custom_vjp(split(attend))
  compute.defvjp(
    split(lambda *inputs: jax.vjp(attend, *inputs)),
    split(lambda pull, cotangent: pull(cotangent)),
  )
  return compute(q, k, v)


def _attend(q, k, v, *, interpret):
  """softmax(q kᵀ) v on one device."""
  heads, head = q.shape[2:]
  block_q, block_kv = (
    next(block for block in BLOCKS if x.shape[1] % block == 0) for x in (q, k)
  )
  # What is kept for the backward pass has the sequence along the lanes: heads of 40 in
  # 128 lanes would take three times the memory.
  layout = splash.QKVLayout.SEQ_MINOR if head % 128 else splash.QKVLayout.HEAD_DIM_MINOR
  sizes = splash.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
    q_layout=layout,
    k_layout=layout,
    v_layout=layout,
  )
  whole = splash.FullMask((q.shape[1], k.shape[1]))
  kernel = splash.make_splash_mha_single_device(
    splash.MultiHeadMask([whole] * heads), block_sizes=sizes, interpret=interpret
  )
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # (n, heads, l, d)
  return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
