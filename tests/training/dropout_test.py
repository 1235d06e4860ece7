"""The LoRA's dropout in a train step: the policy's alone, each image by its own key."""

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
from safetydpo_jax.diffusion import Schedule
from safetydpo_jax.models.layers import Conv, Dense
from safetydpo_jax.training import step as step_lib
from safetydpo_jax.training.step import draw, init_state, make_train_step

PAIRS = 4
DPO = partial(dpo.dpo_loss, beta=5.0)
REFERENCE = ("reference_preferred_error", "reference_dispreferred_error")


class TwoLayers(nn.Module):
  """A dense layer and a convolution, both adapted."""

  @nn.compact
  def __call__(self, latents, timesteps, context, added_cond=None):
    hints = context.mean(axis=1)[:, None, None, :4] + timesteps[:, None, None, None]
    return Conv(4, name="conv1")(Dense(4, name="to_q")(latents + 1e-3 * hints))


class Batch(NamedTuple):
  moments: np.ndarray
  token_ids: tuple


@pytest.fixture(scope="module")
def schedule():
  return Schedule.from_config({"beta_schedule": "scaled_linear"})


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(2)
  moments = rng.standard_normal((PAIRS, 2, 6, 8, 8)).astype(np.float16)
  return Batch(moments, (rng.standard_normal((PAIRS, 5, 6)).astype(np.float32),))


@pytest.fixture(scope="module")
def params():
  inputs = jnp.zeros((1, 6, 8, 4)), jnp.zeros((1,)), jnp.zeros((1, 5, 6))
  return {"unet": TwoLayers().init(jax.random.key(0), *inputs)["params"]}


@pytest.fixture(scope="module")
def state(params):
  tree = lora.init_lora(jax.random.key(0), params["unet"], 2, ("to_q", "conv1"))
  tree = jax.tree.map(lambda leaf: leaf + 0.3, tree)
  return init_state(tree, optax.sgd(1e-2))


def make_step(schedule, **changes):
  settings = {"loss": DPO, "alpha": 2.0, "scaling_factor": 0.2}
  settings |= {"devices": 1, "accumulation": 1, "seed": 0, **changes}
  return make_train_step(
    unet=TwoLayers(),
    schedule=schedule,
    encode_text=lambda params, batch: (batch.token_ids[0], None),
    optimizer=optax.sgd(1e-2),
    **settings,
  )


def run(schedule, state, params, batch, **changes):
  return jax.jit(make_step(schedule, **changes))(state, params, batch)


@pytest.mark.parametrize("loss", [DPO, dpo.sft_loss], ids=["dpo", "sft"])
def test_the_policy_is_changed_and_the_reference_and_its_draws_are_not(
  schedule, state, params, batch, loss
):
  _, plain = run(schedule, state, params, batch, loss=loss)
  _, dropped = run(schedule, state, params, batch, loss=loss, dropout=0.5)
  assert abs(float(plain["preferred_error"] / dropped["preferred_error"]) - 1) > 1e-2
  for name in REFERENCE if loss is DPO else ():
    np.testing.assert_allclose(plain[name], dropped[name], rtol=1e-6)


def test_a_little_dropout_is_almost_none(schedule, state, params, batch):
  _, plain = run(schedule, state, params, batch)
  _, dropped = run(schedule, state, params, batch, dropout=1e-7)
  chex.assert_trees_all_close(plain, dropped, rtol=1e-4, atol=1e-5)


def test_at_zero_nothing_is_drawn_for_it(schedule, state, params, batch):
  """Posterior samples, noise and timesteps, and no more."""

  def draws(**changes):
    step = make_step(schedule, **changes)
    return str(jax.make_jaxpr(step)(state, params, batch)).count("random_bits")

  assert draws() == draws(dropout=0.0) < draws(dropout=0.1)


def test_every_step_drops_anew_and_a_resumed_one_as_before(
  schedule, state, params, batch, monkeypatch
):
  """With noise and timesteps held fixed, so that nothing else tells steps apart."""
  monkeypatch.setattr(
    step_lib, "draw", lambda key, *rest: draw(jax.random.key(9), *rest)
  )
  step = jax.jit(make_step(schedule, dropout=0.5))
  errors = [
    step(state.replace(step=jnp.int32(number)), params, batch)[1]["preferred_error"]
    for number in (3, 3, 4)
  ]
  assert errors[0] == errors[1] != errors[2]


@pytest.mark.parametrize(("devices", "accumulation"), [(1, 4), (4, 1), (2, 2)])
def test_masks_belong_to_pairs_and_not_to_devices_or_microbatches(
  schedule, state, params, batch, devices, accumulation
):
  whole = run(schedule, state, params, batch, dropout=0.5)
  split = {"devices": devices, "accumulation": accumulation}
  parts = run(schedule, state, params, batch, dropout=0.5, **split)
  chex.assert_trees_all_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_the_two_images_of_a_pair_have_masks_of_their_own(schedule, state, params):
  rng = np.random.default_rng(3)
  one = rng.standard_normal((PAIRS, 1, 6, 8, 4)).astype(np.float32)
  latents = np.repeat(one, 2, axis=1)
  errors = jax.jit(
    lambda keys: dpo.denoising_errors(
      state.lora,
      params["unet"],
      latents,
      rng.standard_normal((PAIRS, 5, 6)).astype(np.float32),
      rng.standard_normal((PAIRS, 6, 8, 4)).astype(np.float32),
      np.array([3, 301, 502, 903], np.int32),
      unet=TwoLayers(),
      schedule=schedule,
      dropout=(keys, 0.5),
    )
  )(jax.random.split(jax.random.key(0), PAIRS))
  assert (np.abs(errors[:, 0] / errors[:, 1] - 1) > 1e-4).all()
