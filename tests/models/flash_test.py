"""The TPU's attention kernel equals XLA's attention, alone and split over a mesh.

Without a TPU the kernel is interpreted, operation by operation, so sizes are small.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from safetydpo_jax import load_pipeline, lora
from safetydpo_jax.merging import activations
from safetydpo_jax.merging.calibration import Batch
from safetydpo_jax.models import attention, flash
from safetydpo_jax.models.flash import OnMesh
from safetydpo_jax.planning import hlo
from safetydpo_jax.runtime import sharding
from safetydpo_jax.sampling.renderer import Inputs, key_words, make_renderer
from safetydpo_jax.training.gradients import mean_gradient
from tests.support.parity import draw

LAYER = 1e-5


def inputs(n, length, heads, head, dtype=jnp.float32):
  """q, k, v and a cotangent."""
  return [jnp.asarray(draw(n, length, heads, head, seed=i), dtype) for i in range(4)]


def value_and_gradients(kernel, q, k, v, cotangent):
  out, pull = jax.vjp(partial(attention.attend, kernel=kernel), q, k, v)
  return out, *pull(cotangent)


def assert_equal(got, expected, tolerance=LAYER):
  for mine, theirs in zip(got, expected, strict=True):
    assert mine.dtype == theirs.dtype
    scale = max(1.0, float(jnp.abs(theirs).max()))
    np.testing.assert_allclose(
      np.float32(mine), np.float32(theirs), rtol=0, atol=tolerance * scale
    )


@pytest.mark.parametrize(
  ("head", "length"),
  [(40, 384), (64, 128), (80, 128), (160, 128)],  # 384: three blocks
)
def test_values_and_gradients_equal_xla(head, length):
  values = inputs(1, length, 2, head)
  got = jax.jit(partial(value_and_gradients, "splash"))(*values)
  assert_equal(got, value_and_gradients("xla", *values))


def test_bfloat16_is_as_exact_as_xla():
  """Both differ from float32 by rounding, the kernel by less than twice as much."""
  exact = value_and_gradients("xla", *inputs(1, 256, 1, 40))
  values = inputs(1, 256, 1, 40, jnp.bfloat16)

  def error(kernel):
    found = jax.jit(partial(value_and_gradients, kernel))(*values)
    return [float(jnp.std(x.astype(jnp.float32) - y)) for x, y in zip(found, exact)]

  for mine, theirs in zip(error("splash"), error("xla"), strict=True):
    assert 0 < mine < 2 * theirs


def test_lengths_that_are_no_whole_blocks_stay_with_xla():
  assert not flash.takes(4096, 77, 40)
  assert not flash.takes(100, 128, 40)
  values = inputs(1, 100, 2, 40)
  assert_equal(
    value_and_gradients("splash", *values), value_and_gradients("xla", *values), 0
  )


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(2, 2, jax.devices()[:4])


def test_rows_split_over_a_mesh(mesh):
  """As in sampling: the batch itself is split."""
  values = inputs(4, 128, 1, 40)
  kernel = OnMesh("splash", mesh, sharding.BATCH)
  rows = NamedSharding(mesh, sharding.BATCH)
  run = jax.jit(partial(value_and_gradients, kernel), in_shardings=rows)
  assert_equal(run(*values), value_and_gradients("xla", *values))


def test_pictures_drawn_on_a_mesh_equal_those_of_one_device(mesh, tiny_checkpoint):
  """The renderer tells the kernel where its rows are; 16 × 8 latents are 128 tokens."""
  latents = draw(4, 16, 8, 4)

  def render(kernel, mesh):
    pipeline = load_pipeline(str(tiny_checkpoint), attention=kernel)
    ids = pipeline.tokenize(["the red one"] * 4), pipeline.tokenize([""] * 4)
    run = make_renderer(pipeline, "ddim", 2, 0.0, mesh)
    ones = np.ones(4, np.float32)
    words = key_words(range(4))
    inputs = Inputs(latents, words, *ids, ones, 5 * ones)
    lowered = run.lower(pipeline.params, {}, inputs)
    return lowered.compile()(pipeline.params, {}, inputs), lowered.as_text()

  image, program = render("splash", mesh)
  expected, _ = render("xla", sharding.make_mesh(devices=jax.devices()[:1]))
  assert_equal([image], [expected], 1e-4)
  assert "manual_computation" in program, "left to the compiler, which refuses on TPU"


def test_activations_on_a_mesh_equal_those_of_one_device(mesh, tiny_checkpoint):
  """Four pairs of 16 × 8 latents, that is eight rows of 128 tokens, two experts."""

  def measure(kernel, mesh):
    pipeline = load_pipeline(str(tiny_checkpoint), attention=kernel)
    one = lora.init_lora(jax.random.key(0), pipeline.unet_shapes(), 2)
    loras = jax.tree.map(lambda x: jnp.stack([x, x + 0.1]), one)
    batch = Batch(
      moments=draw(4, 2, 16, 8, 8),
      token_ids=tuple(np.stack(pipeline.tokenize(["the red one"] * 4))),
      pairs=np.arange(4, dtype=np.int32),
      timesteps=np.full(4, 500, np.int32),
    )
    shardings = sharding.base_shardings(mesh, pipeline.params)
    step = activations.make_measure(
      pipeline, mesh, shardings, seed=0, experts_at_once=1
    )
    lowered = step.lower(loras, pipeline.params, batch)
    return lowered.compile()(loras, pipeline.params, batch), lowered.as_text()

  found, program = measure("splash", mesh)
  expected, _ = measure("xla", sharding.make_mesh(devices=jax.devices()[:1]))
  assert_equal(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-4)
  assert "manual_computation" in program, "left to the compiler, which refuses on TPU"


def test_training_on_a_mesh_sums_gradients_over_devices_once(mesh):
  """As in a train step: microbatches, and a vmap over the devices."""
  weight, (q, k, v, cotangent) = jnp.float32(0.8), inputs(8, 128, 1, 40)

  def loss(kernel, weight, rows):
    q, k, v, cotangent = rows
    out = attention.attend(weight * q, k, v, kernel=kernel)
    return jnp.mean(out * cotangent), jnp.mean(out)

  def run(kernel):
    step = partial(
      mean_gradient, partial(loss, kernel), devices=mesh.size, accumulation=2
    )
    where = (
      NamedSharding(mesh, sharding.REPLICATED),
      NamedSharding(mesh, sharding.BATCH),
    )
    compiled = jax.jit(step, in_shardings=where).lower(weight, (q, k, v, cotangent))
    compiled = compiled.compile()
    return compiled(weight, (q, k, v, cotangent)), compiled.as_text()

  (gradient, value), text = run(OnMesh("splash", mesh))
  (expected, expected_value), _ = run("xla")
  np.testing.assert_allclose(gradient, expected, rtol=1e-5)
  np.testing.assert_allclose(value, expected_value, rtol=1e-5)
  found = hlo.collectives(text)
  assert list(found) == ["all-reduce"]
  assert found["all-reduce"]["count"] == 1


def test_auto_without_a_mesh_is_left_to_xla_on_several_devices(monkeypatch):
  """The compiler refuses to split the kernel, and nothing says how to."""
  taken = []
  monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
  monkeypatch.setattr(flash, "flash", lambda q, k, v, **_: taken.append(q.shape) or q)
  q = jax.ShapeDtypeStruct((1, 1024, 1, 40), jnp.bfloat16)
  for devices, calls in ((8, 0), (1, 1)):
    monkeypatch.setattr(jax, "device_count", lambda devices=devices: devices)
    jax.eval_shape(lambda q: attention.attend(q, q, q), q)
    assert len(taken) == calls
