"""encoding: one compiled program for all caches of equal VAEs."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from safetydpo_jax import load_pipeline
from safetydpo_jax.data.cache import encoding


def test_equal_vaes_share_a_program(tiny_checkpoint):
  mesh = jax.make_mesh((8,), ("data",))
  rows = NamedSharding(mesh, PartitionSpec("data"))

  def make(dtype=jnp.float32, rows=rows):
    vae = load_pipeline(tiny_checkpoint, components=(), dtype=dtype).vae
    return encoding._jit_encode(vae, rows)

  first = make()
  assert make() is first
  assert make(dtype=jnp.bfloat16) is not first
  assert make(rows=NamedSharding(mesh, PartitionSpec())) is not first
