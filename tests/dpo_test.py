"""The preference loss, by its invariants."""

import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from safetydpo_jax import diffusion, dpo, lora
from safetydpo_jax.formats.base_model.pipeline import load_pipeline

PAIRS = 4


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
  return load_pipeline(str(tiny_checkpoint))


@pytest.fixture(scope="module")
def schedule(pipeline):
  return pipeline.schedule


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
  loss = jax.jit(
    partial(
      dpo.sft_loss,
      params=pipeline.params["unet"],
      unet=pipeline.unet,
      schedule=pipeline.schedule,
    )
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


def test_descending_the_loss_teaches_the_preference(pipeline, fresh, draws):
  """Forty steps on four fixed draws: every pair ends on the right side."""
  optimizer = optax.adam(3e-3)

  @jax.jit
  def step(tree, state):
    gradient = jax.grad(dpo.dpo_loss, has_aux=True)
    gradients, metrics = gradient(
      tree,
      pipeline.params["unet"],
      *draws,
      unet=pipeline.unet,
      schedule=pipeline.schedule,
      beta=500.0,
    )
    updates, state = optimizer.update(gradients, state, tree)
    return optax.apply_updates(tree, updates), state, metrics

  tree, state = fresh, optimizer.init(fresh)
  for _ in range(40):
    tree, state, metrics = step(tree, state)
  assert float(metrics["accuracy"]) == 1.0
  assert float(metrics["loss"]) < 0.1
