"""One device equals eight, and a step communicates once."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import base
from safetydpo_jax import dpo, lora, optimizer, sharding, train
from safetydpo_jax.data.batches import Batch
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.pipeline import load_pipeline

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
  config = base.get_config()
  config.accumulation, config.warmup_steps = accumulation, 0
  # The margin is β times a difference of errors near 1: at 500 the rounding of the
  # errors alone is 2e-5 of it, which says nothing of the devices.
  config.dpo.beta = 50.0
  tx = optimizer.make_optimizer(config)
  tree = lora.init_lora(jax.random.key(0), pipeline.params["unet"], config.lora.rank)
  # Away from b = 0, where half the gradients vanish.
  tree = jax.tree.map(lambda leaf: leaf + 0.01, tree)
  replicated = NamedSharding(mesh, sharding.REPLICATED)
  params = {name: pipeline.params[name] for name in ("unet", "text_encoder")}
  shardings = sharding.base_shardings(mesh, params)
  arguments = (
    sharding.place(dpo.init_state(tree, tx), replicated),
    sharding.place(params, shardings),
    sharding.place_batch(mesh, batch),
  )
  step = train.jit_train_step(config, pipeline, mesh, tx, shardings)
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


@pytest.mark.parametrize("accumulation", [1, 2])
def test_eight_devices_equal_one_with_a_single_all_reduce(
  pipeline, batch, accumulation
):
  one, arguments = compile_step(
    pipeline, sharding.make_mesh(devices=jax.devices()[:1]), batch, accumulation
  )
  expected, expected_metrics = one(*arguments)
  assert collectives(one) == []

  eight, arguments = compile_step(pipeline, sharding.make_mesh(), batch, accumulation)
  state, metrics = eight(*arguments)
  # In ENTRY: after the accumulation loop, not once for each microbatch.
  assert collectives(eight) == [("all-reduce", "ENTRY")]
  chex.assert_trees_all_close(
    jax.device_get(metrics), jax.device_get(expected_metrics), rtol=2e-4, atol=1e-5
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


def test_fsdp_splits_the_weights_and_keeps_the_numbers(pipeline, batch):
  data, arguments = compile_step(pipeline, sharding.make_mesh(), batch, 1)
  split, split_arguments = compile_step(
    pipeline, sharding.make_mesh(data=2, fsdp=4), batch, 1
  )
  kernel = split_arguments[1]["unet"]["conv_in"]["kernel"]
  assert kernel.sharding.spec == PartitionSpec(None, None, None, "fsdp")
  _, expected = data(*arguments)
  _, metrics = split(*split_arguments)
  chex.assert_trees_all_close(
    jax.device_get(metrics), jax.device_get(expected), rtol=2e-4, atol=1e-5
  )


def test_a_kernel_that_does_not_divide_is_replicated():
  mesh = sharding.make_mesh(data=2, fsdp=4)
  shardings = sharding.base_shardings(mesh, {"conv_out": {"kernel": jnp.ones((3, 6))}})
  assert shardings["conv_out"]["kernel"].spec == sharding.REPLICATED


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (4, 4), (8, 0)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(data, fsdp):
  with pytest.raises(InputError, match="there are 8 devices"):
    sharding.make_mesh(data, fsdp)
