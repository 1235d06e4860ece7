"""The train step: its draws, its microbatches, its scale, and what its state holds."""

from functools import partial
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safetydpo_jax import dpo, lora
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.models.layers import Dense
from safetydpo_jax.training.step import draw as draw_step
from safetydpo_jax.training.step import init_state, make_train_step

PAIRS = 4


class Batch(NamedTuple):
  moments: np.ndarray
  token_ids: tuple


def trained(tree, size=0.02):
  """`tree` as training would leave it: every b away from 0."""
  keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(tree))))
  return jax.tree.map(lambda x: x + size * jax.random.normal(next(keys), x.shape), tree)


class OneLayer(nn.Module):
  """The smallest denoiser with all inputs and a LoRA; it compiles at once."""

  @nn.compact
  def __call__(self, latents, timesteps, context, added_cond=None):
    hints = context.mean(axis=1)[:, None, None, :4] + timesteps[:, None, None, None]
    return Dense(4, name="to_q")(latents + 1e-3 * hints)


@pytest.fixture(scope="module")
def layer():
  kernel = np.random.default_rng(3).standard_normal((4, 4)).astype(np.float32) / 2
  return {"unet": {"to_q": {"kernel": kernel, "bias": np.ones(4, np.float32)}}}


@pytest.fixture(scope="module")
def layer_lora(layer):
  return trained(lora.init_lora(jax.random.key(0), layer["unet"], 2, ("to_q",)), 0.3)


def make_step(schedule, optimizer, **changes):
  settings = {
    "loss": partial(dpo.dpo_loss, beta=50.0),
    "alpha": 2.0,
    "scaling_factor": 0.18215,
    "devices": 1,
    "accumulation": 1,
    "seed": 0,
  }

  def encode_text(params, batch):
    return batch.token_ids[0], None

  return jax.jit(
    make_train_step(
      unet=OneLayer(),
      schedule=schedule,
      encode_text=encode_text,
      optimizer=optimizer,
      **{**settings, **changes},
    )
  )


@pytest.fixture(scope="module")
def schedule(tiny_checkpoint):
  return load_pipeline(str(tiny_checkpoint), components=()).schedule


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(2)
  moments = rng.standard_normal((PAIRS, 2, 6, 8, 8)).astype(np.float16)
  context = np.random.default_rng(0).standard_normal((PAIRS, 5, 24))
  return Batch(moments, (context.astype(np.float32),))


def test_state_holds_nothing_of_the_base_model(schedule, layer, layer_lora, batch):
  optimizer = optax.adamw(1e-3)
  state = init_state(layer_lora, optimizer)
  state, _ = make_step(schedule, optimizer)(state, layer, batch)
  assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(4, 2), (2, 4), ()}
  # step, Adam's count, and for each factor: itself, first and second moment
  assert len(jax.tree.leaves(state)) == 2 + 3 * 2


def test_the_step_is_the_loss_of_its_own_draws(schedule, layer, layer_lora, batch):
  optimizer = optax.sgd(0.0)
  state = init_state(layer_lora, optimizer).replace(step=jnp.int32(7))
  _, metrics = make_step(schedule, optimizer, seed=3)(state, layer, batch)
  key = jax.random.fold_in(jax.random.key(3), 7)
  latents, noise, timesteps = draw_step(key, batch.moments, schedule, 0.18215)
  _, expected = dpo.dpo_loss(
    layer_lora,
    layer["unet"],
    latents,
    batch.token_ids[0],
    noise,
    timesteps,
    unet=OneLayer(),
    schedule=schedule,
    beta=50.0,
  )
  assert abs(float(expected["margin"])) > 1e-3
  for name, value in expected.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("devices", "accumulation"), [(1, 4), (4, 1), (2, 2)])
def test_splitting_the_batch_changes_memory_and_not_the_step(
  schedule, layer, layer_lora, batch, devices, accumulation
):
  optimizer = optax.sgd(1e-2)
  state = init_state(layer_lora, optimizer)
  whole, metrics = make_step(schedule, optimizer)(state, layer, batch)
  step = make_step(schedule, optimizer, devices=devices, accumulation=accumulation)
  parts, split = step(state, layer, batch)
  chex.assert_trees_all_close(whole.lora, parts.lora, atol=1e-6)
  chex.assert_trees_all_close(metrics, split, rtol=1e-4, atol=1e-5)


def test_a_steps_draws_follow_from_seed_and_step_alone(
  schedule, layer, layer_lora, batch
):
  optimizer = optax.sgd(0.0)
  state = init_state(layer_lora, optimizer)

  def loss(step, seed=0):
    stepped = state.replace(step=jnp.asarray(step, jnp.int32))
    _, metrics = make_step(schedule, optimizer, seed=seed)(stepped, layer, batch)
    return float(metrics["loss"])

  assert loss(5) == loss(5)
  assert loss(5) != loss(6)
  assert loss(5) != loss(5, seed=1)


def test_the_lora_scale_multiplies_the_product(schedule, layer, layer_lora, batch):
  optimizer = optax.sgd(0.0)
  plain = init_state(layer_lora, optimizer)
  doubled = init_state(lora.scale(layer_lora, 2.0), optimizer)
  _, first = make_step(schedule, optimizer, alpha=4.0)(plain, layer, batch)
  _, second = make_step(schedule, optimizer)(doubled, layer, batch)
  chex.assert_trees_all_close(first["margin"], second["margin"], rtol=1e-5)
  _, other = make_step(schedule, optimizer)(plain, layer, batch)
  assert abs(float(other["margin"] - first["margin"])) > 0.01


def test_draws_are_independent_and_timesteps_uniform(schedule):
  moments = np.zeros((2000, 2, 1, 1, 2), np.float16)
  latents, noise, timesteps = draw_step(jax.random.key(0), moments, schedule, 1.0)
  columns = np.stack([latents[:, 0], latents[:, 1], noise]).reshape(3, -1)
  np.testing.assert_allclose(np.corrcoef(columns), np.eye(3), atol=0.06)
  np.testing.assert_allclose(columns.std(axis=1), 1.0, atol=0.05)
  assert timesteps.min() < 10
  assert timesteps.max() > 989
  assert float(timesteps.mean()) == pytest.approx(499.5, abs=20)
