"""Features do not depend on the number of devices, nor on what else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.metrics.extraction import make_extractor
from safetydpo_jax.runtime.sharding import make_mesh
from tests.support.parity import draw


def network(params, rows):
  """Sums in an order that the compiler may choose."""
  return jnp.tanh(rows.reshape(len(rows), -1) @ params["w"])


def make(devices, per_device=3, apply=network):
  mesh = make_mesh(devices=jax.devices()[:devices])
  params = {"w": draw(75, 33)}
  return make_extractor(apply, params, mesh=mesh, per_device=per_device)


@pytest.mark.parametrize("count", [1, 3, 8, 25])
def test_one_device_equals_eight_bit_for_bit(count):
  rows = draw(count, 5, 5, 3, seed=1)
  one, eight = make(1)(rows), make(8)(rows)
  assert one.shape == (count, 33)
  assert one.dtype == np.float32
  np.testing.assert_array_equal(one, eight)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_device_meets_as_many_rows_whatever_their_number(devices):
  """Another number of rows is another program, which may round differently."""
  seen = []

  def apply(params, rows):
    seen.append(len(rows) // devices)
    return rows

  make(devices, apply=apply)(np.zeros((5, 2), np.float32))
  assert seen == [3]


def test_rows_keep_their_order_and_padding_leaves_no_trace():
  rows = draw(13, 5, 5, 3, seed=1)
  expected = np.tanh(rows.reshape(13, -1) @ draw(75, 33))
  np.testing.assert_allclose(make(2)(rows), expected, rtol=0, atol=1e-5)


def test_no_rows_give_no_features():
  assert make(2)(np.zeros((0, 5, 5, 3), np.float32)).shape == (0, 33)


def test_bytes_go_to_the_network_as_bytes():
  seen = []

  def apply(params, rows):
    seen.append(rows.dtype)
    return rows.reshape(len(rows), -1).astype(jnp.float32)

  make(2, apply=apply)(np.full((3, 2), 255, np.uint8))
  assert seen == [jnp.uint8]


def test_batches_are_split_over_the_devices():
  text = []

  def apply(params, rows):
    jax.debug.inspect_array_sharding(rows, callback=lambda s: text.append(s))
    return rows

  make(4, apply=apply)(np.zeros((12, 2), np.float32))
  assert len(text[0].device_set) == 4
  assert not text[0].is_fully_replicated


def test_features_that_are_not_finite_are_refused():
  with pytest.raises(InputError, match="not finite"):
    make(1, apply=lambda params, rows: jnp.log(rows))(np.array([[-1.0]], np.float32))


def test_per_device_must_be_positive():
  with pytest.raises(InputError, match="per_device is 0"):
    make(1, per_device=0)
