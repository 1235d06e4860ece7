"""The preference loss and the train step, by their invariants."""

import math
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safetydpo_jax import diffusion, dpo, lora
from safetydpo_jax.formats.pipeline import load_pipeline

PAIRS = 4
TARGETS = lora.ATTENTION_TARGETS


class Batch(NamedTuple):
  moments: np.ndarray
  token_ids: tuple


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def fresh(pipeline):
  return lora.init_lora(jax.random.key(0), pipeline.params["unet"], 4)


def trained(tree, size=0.02):
  """`tree` as training would leave it: every b away from 0."""
  keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(tree))))
  return jax.tree.map(lambda x: x + size * jax.random.normal(next(keys), x.shape), tree)


@pytest.fixture(scope="module")
def draws():
  rng = np.random.default_rng(0)
  return (
    rng.standard_normal((PAIRS, 2, 6, 8, 4)).astype(np.float32),  # latents
    rng.standard_normal((PAIRS, 5, 24)).astype(np.float32),  # context
    rng.standard_normal((PAIRS, 6, 8, 4)).astype(np.float32),  # noise
    np.array([3, 301, 502, 903], np.int32),  # timesteps
  )


@pytest.fixture(scope="module")
def loss(pipeline):
  return jax.jit(
    partial(
      dpo.dpo_loss,
      params=pipeline.params["unet"],
      unet=pipeline.unet,
      schedule=pipeline.schedule,
      beta=5000.0,
    )
  )


def apply_loss(loss, tree, draws, **changes):
  names = ("latents", "context", "noise", "timesteps")
  return loss(tree, **{**dict(zip(names, draws)), **changes})


def test_a_fresh_lora_has_loss_log_2_and_equals_the_reference(loss, fresh, draws):
  value, metrics = apply_loss(loss, fresh, draws)
  assert float(value) == pytest.approx(math.log(2), abs=1e-3)
  for image in ("preferred", "dispreferred"):
    chex.assert_trees_all_close(
      metrics[f"{image}_error"], metrics[f"reference_{image}_error"], rtol=1e-6
    )


def test_swapping_the_pair_flips_the_margin(loss, fresh, draws):
  tree = trained(fresh)
  _, metrics = apply_loss(loss, tree, draws)
  _, swapped = apply_loss(loss, tree, draws, latents=draws[0][:, ::-1])
  assert abs(float(metrics["margin"])) > 1
  chex.assert_trees_all_close(metrics["margin"], -swapped["margin"], rtol=1e-4)
  chex.assert_trees_all_close(metrics["accuracy"], 1 - swapped["accuracy"])


def test_equal_images_have_no_margin_since_they_share_noise_and_caption(
  loss, fresh, draws
):
  latents = np.repeat(draws[0][:, :1], 2, axis=1)
  _, metrics = apply_loss(loss, trained(fresh), draws, latents=latents)
  assert float(metrics["margin"]) == pytest.approx(0, abs=5e-3)


def test_the_loss_is_the_papers_formula_pair_by_pair(pipeline, loss, fresh, draws):
  tree = trained(fresh)
  latents, context, noise, timesteps = draws
  alphas = np.asarray(pipeline.schedule.alphas_cumprod)
  apply = jax.jit(pipeline.unet.apply)

  def error(pair, image, variables):
    alpha = alphas[timesteps[pair]]
    noisy = math.sqrt(alpha) * latents[pair, image] + math.sqrt(1 - alpha) * noise[pair]
    prediction = apply(
      variables, noisy[None], timesteps[pair][None], context[pair][None]
    )
    return np.mean((np.asarray(prediction[0]) - noise[pair]) ** 2, dtype=np.float64)

  base = {"params": pipeline.params["unet"]}
  policy = {**base, "lora": tree}
  losses, margins = [], []
  for pair in range(PAIRS):
    m = error(pair, 0, policy) - error(pair, 1, policy)
    r = error(pair, 0, base) - error(pair, 1, base)
    margins.append(-0.5 * 5000 * (m - r))
    losses.append(math.log1p(math.exp(-margins[-1])))
  value, metrics = apply_loss(loss, tree, draws)
  assert float(value) == pytest.approx(np.mean(losses), rel=1e-4)
  assert float(metrics["margin"]) == pytest.approx(np.mean(margins), rel=1e-4)
  assert float(metrics["accuracy"]) == np.mean(np.array(margins) > 0)
  # One pair a quarter of the schedule: 3, 301, 502, 903 of 1000.
  np.testing.assert_allclose(metrics["share_by_timestep"], 0.25)
  np.testing.assert_allclose(
    metrics["correct_by_timestep"], 0.25 * (np.array(margins) > 0)
  )


def test_v_prediction_changes_the_target(pipeline, fresh, draws):
  schedule = pipeline.schedule.replace(prediction_type="v_prediction")
  errors = partial(dpo.denoising_errors, unet=pipeline.unet, schedule=schedule)
  got = jax.jit(errors)(None, pipeline.params["unet"], *draws)
  latents, context, noise, timesteps = draws
  noisy = diffusion.add_noise(schedule, latents[:, 1], noise, timesteps)
  velocity = diffusion.target(schedule, latents[:, 1], noise, timesteps)
  prediction = jax.jit(pipeline.unet.apply)(
    {"params": pipeline.params["unet"]}, noisy, timesteps, context
  )
  expected = jnp.square(prediction - velocity).mean(axis=(1, 2, 3))
  chex.assert_trees_all_close(got[:, 1], expected, rtol=1e-5)


def test_sft_sees_the_preferred_image_only(pipeline, fresh, draws):
  loss = partial(
    dpo.sft_loss,
    params=pipeline.params["unet"],
    unet=pipeline.unet,
    schedule=pipeline.schedule,
  )
  tree = trained(fresh)
  value, _ = apply_loss(loss, tree, draws)
  other = draws[0].copy()
  other[:, 1] = 7.0
  chex.assert_trees_all_equal(value, apply_loss(loss, tree, draws, latents=other)[0])
  errors = dpo.denoising_errors(
    tree,
    pipeline.params["unet"],
    *draws,
    unet=pipeline.unet,
    schedule=pipeline.schedule,
  )
  chex.assert_trees_all_close(value, errors[:, 0].mean(), rtol=1e-6)


def make_step(pipeline, optimizer, **changes):
  settings = {
    "loss": "dpo",
    "beta": 5000.0,
    "lora_scale": 1.0,
    "scaling_factor": 0.18215,
    "devices": 1,
    "accumulation": 1,
    "seed": 0,
  }

  def encode_text(params, token_ids):
    return token_ids[0], None

  return jax.jit(
    dpo.make_train_step(
      unet=pipeline.unet,
      schedule=pipeline.schedule,
      encode_text=encode_text,
      optimizer=optimizer,
      **{**settings, **changes},
    )
  )


@pytest.fixture(scope="module")
def batch(draws):
  rng = np.random.default_rng(2)
  moments = rng.standard_normal((PAIRS, 2, 6, 8, 8)).astype(np.float16)
  return Batch(moments, (draws[1],))


def test_state_holds_nothing_of_the_base_model(pipeline, fresh, batch):
  optimizer = optax.adamw(1e-3)
  state = dpo.init_state(fresh, optimizer)
  state, _ = make_step(pipeline, optimizer)(state, pipeline.params, batch)
  factors = {leaf.shape for leaf in jax.tree.leaves(fresh)}
  assert {leaf.shape for leaf in jax.tree.leaves(state)} == factors | {()}
  # step, Adam's count, and for each factor: itself, first and second moment
  assert len(jax.tree.leaves(state)) == 2 + 3 * len(jax.tree.leaves(fresh))


def test_accumulation_changes_memory_and_not_the_step(pipeline, fresh, batch):
  optimizer = optax.sgd(1e-3)
  state = dpo.init_state(trained(fresh), optimizer)
  whole, metrics = make_step(pipeline, optimizer)(state, pipeline.params, batch)
  parts, split = make_step(pipeline, optimizer, accumulation=4)(
    state, pipeline.params, batch
  )
  chex.assert_trees_all_close(whole.lora, parts.lora, atol=1e-6)
  chex.assert_trees_all_close(metrics, split, rtol=1e-3, atol=1e-4)


def test_a_steps_draws_follow_from_seed_and_step_alone(pipeline, fresh, batch):
  optimizer = optax.sgd(0.0)
  state = dpo.init_state(trained(fresh), optimizer)
  steps = [make_step(pipeline, optimizer, seed=seed) for seed in (0, 1)]

  def metrics(step, seed=0):
    stepped = state.replace(step=jnp.asarray(step, jnp.int32))
    return steps[seed](stepped, pipeline.params, batch)[1]

  chex.assert_trees_all_equal(metrics(5), metrics(5))
  assert float(metrics(5)["loss"]) != float(metrics(6)["loss"])
  assert float(metrics(5)["loss"]) != float(metrics(5, seed=1)["loss"])


def test_draws_are_independent_and_timesteps_uniform(pipeline):
  moments = np.zeros((2000, 2, 1, 1, 2), np.float16)
  latents, noise, timesteps = dpo.draw(
    jax.random.key(0), moments, pipeline.schedule, 1.0
  )
  columns = np.stack([latents[:, 0], latents[:, 1], noise]).reshape(3, -1)
  np.testing.assert_allclose(np.corrcoef(columns), np.eye(3), atol=0.06)
  np.testing.assert_allclose(columns.std(axis=1), 1.0, atol=0.05)
  assert timesteps.min() < 10
  assert timesteps.max() > 989
  assert float(timesteps.mean()) == pytest.approx(499.5, abs=20)


def test_the_lora_scale_multiplies_the_product(pipeline, fresh, batch):
  optimizer = optax.sgd(0.0)
  tree = trained(fresh)
  doubled = dpo.init_state(lora.scale(tree, 2.0), optimizer)
  plain = dpo.init_state(tree, optimizer)
  first = make_step(pipeline, optimizer, lora_scale=2.0)(plain, pipeline.params, batch)
  second = make_step(pipeline, optimizer)(doubled, pipeline.params, batch)
  chex.assert_trees_all_close(first[1]["margin"], second[1]["margin"], rtol=1e-5)
