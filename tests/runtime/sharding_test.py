"""One device equals eight, and a step communicates once."""

import functools
import re
from collections import Counter

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from safetydpo_jax import lora
from safetydpo_jax.data.cache.batches import Batch
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.runtime import sharding
from safetydpo_jax.training import optimizer
from safetydpo_jax.training.step import init_state, jit_train_step
from tests.support.configs import run_config

PAIRS = 16
COLLECTIVES = (
  r"= .*? (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)"
)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  moments = rng.standard_normal((PAIRS, 2, 4, 4, 8)).astype(np.float16)
  return Batch(moments, (rng.integers(0, 500, (PAIRS, 77)).astype(np.int32),))


def compile_step(pipeline, mesh, batch, accumulation):
  """The step of `train` compiled for `mesh`, and its placed arguments."""
  # The margin is β times a difference of errors near 1: at 500 the rounding of the
  # errors alone is 2e-5 of it, which says nothing of the devices.
  changes = {"accumulation": accumulation, "warmup_steps": 0, "dpo.beta": 50.0}
  config = run_config(**changes)
  tx = optimizer.make_optimizer(config)
  tree = lora.init_lora(jax.random.key(0), pipeline.params["unet"], config.lora.rank)
  # Away from b = 0, where half the gradients vanish.
  tree = jax.tree.map(lambda leaf: leaf + 0.01, tree)
  replicated = NamedSharding(mesh, sharding.REPLICATED)
  params = {name: pipeline.params[name] for name in ("unet", "text_encoder")}
  shardings = sharding.base_shardings(mesh, params)
  arguments = (
    sharding.place(init_state(tree, tx), replicated),
    sharding.place(params, shardings),
    sharding.place_batch(mesh, batch),
  )
  step = jit_train_step(config, pipeline, mesh, tx, shardings)
  return step.lower(*arguments).compile(), arguments


def collectives(compiled):
  """(kind, name of the computation it stands in) of every collective."""
  found, computation = [], None
  for line in compiled.as_text().splitlines():
    header = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{$", line)
    computation = ("ENTRY" if header[1] else header[2]) if header else computation
    match = re.search(COLLECTIVES + r"(?:-start)?\(", line)
    if match:
      found.append((match[1], computation))
  return found


@pytest.fixture(scope="module")
def step_on_all(pipeline, batch):
  """accumulation → a step on eight devices with whole weights, and its results."""

  @functools.cache
  def take(accumulation):
    mesh = sharding.make_mesh()
    step, arguments = compile_step(pipeline, mesh, batch, accumulation)
    return step, jax.device_get(step(*arguments))

  return take


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_eight_devices_equal_one_with_a_single_all_reduce(
  pipeline, batch, step_on_all, accumulation
):
  one, arguments = compile_step(
    pipeline, sharding.make_mesh(devices=jax.devices()[:1]), batch, accumulation
  )
  expected, expected_metrics = one(*arguments)
  assert collectives(one) == []

  eight, (state, metrics) = step_on_all(accumulation)
  # In ENTRY: after the accumulation loop, not once for each microbatch.
  assert collectives(eight) == [("all-reduce", "ENTRY")]
  chex.assert_trees_all_close(
    metrics, jax.device_get(expected_metrics), rtol=2e-4, atol=1e-5
  )
  for path in ("a", "b"):
    moved = [
      np.abs(np.asarray(ours) - np.asarray(theirs)).mean()
      for (name, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(state.lora), jax.tree.leaves(expected.lora)
      )
      if name[-1].key == path
    ]
    assert max(moved) < 1e-6  # of a step of 1e-3


@pytest.fixture(scope="module")
def whole(step_on_all):
  """State and metrics after a step with whole weights on eight devices."""
  return step_on_all(1)[1]


@pytest.mark.parametrize(
  ("data", "fsdp"), [(4, 2), pytest.param(2, 4, marks=pytest.mark.slow)]
)
def test_fsdp_gathers_each_split_weight_once_and_keeps_every_bit(
  pipeline, batch, whole, data, fsdp
):
  mesh = sharding.make_mesh(data, fsdp)
  split, arguments = compile_step(pipeline, mesh, batch, 1)
  weights = jax.tree.leaves(arguments[1])
  kernel = arguments[1]["unet"]["conv_in"]["kernel"]
  assert kernel.sharding.spec == PartitionSpec(None, None, None, "fsdp")
  shards = [leaf for leaf in weights if leaf.sharding.spec != sharding.REPLICATED]
  # In ENTRY and so once, though policy and reference both read them.
  assert Counter(collectives(split)) == {
    ("all-gather", "ENTRY"): len(shards),
    ("all-reduce", "ENTRY"): 1,
  }
  # Each device does the arithmetic that it does alone with whole weights.
  chex.assert_trees_all_equal(jax.device_get(split(*arguments)), whole)


def test_a_kernel_that_does_not_divide_is_replicated():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  shardings = sharding.base_shardings(mesh, {"conv_out": {"kernel": jnp.ones((3, 6))}})
  assert shardings["conv_out"]["kernel"].spec == sharding.REPLICATED


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (4, 4), (8, 0)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(data, fsdp):
  with pytest.raises(InputError, match="there are 8 devices"):
    sharding.make_mesh(data, fsdp)


def permuted_mesh():
  """Eight devices as a torus may order those of two hosts with four each."""
  order = [jax.devices()[n] for n in (0, 1, 4, 5, 7, 6, 3, 2)]
  return Mesh(np.array(order).reshape(4, 2), ("data", "fsdp"))


def test_a_host_reads_the_rows_its_devices_hold():
  mesh, devices = permuted_mesh(), jax.devices()
  first, second = (sharding.host_rows(mesh, 16, devices[n : n + 4]) for n in (0, 4))
  assert list(first) == [0, 1, 2, 3, 12, 13, 14, 15]
  assert list(second) == [4, 5, 6, 7, 8, 9, 10, 11]
  assert list(sharding.host_rows(mesh, 16)) == list(range(16))


def test_rows_are_placed_in_their_order():
  rows = np.arange(32).reshape(16, 2)
  placed = sharding.place_batch(permuted_mesh(), {"x": rows})["x"]
  np.testing.assert_array_equal(placed, rows)
