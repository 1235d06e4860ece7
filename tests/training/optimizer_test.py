"""AdamW and Adafactor step as PyTorch's and transformers' do, warm-up included."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from diffusers.optimization import get_scheduler

from safetydpo_jax.errors import InputError
from safetydpo_jax.training import config as run_configs
from safetydpo_jax.training import optimizer
from tests.support.configs import run_config

STEPS = 6


def gradients(shape):
  rng = np.random.default_rng(0)
  return rng.standard_normal((STEPS, *shape)).astype(np.float32) * 3


def run_optax(config, shape=(7, 5)):
  tx = optimizer.make_optimizer(config)
  weights = {"a": jnp.ones(shape)}
  state = tx.init(weights)
  for gradient in gradients(shape):
    updates, state = tx.update({"a": jnp.asarray(gradient)}, state, weights)
    weights = optax.apply_updates(weights, updates)
  return weights["a"]


def run_torch(make, clip, warmup_steps, shape=(7, 5)):
  weights = torch.nn.Parameter(torch.ones(shape))
  tx = make([weights])
  schedule = get_scheduler("constant_with_warmup", tx, num_warmup_steps=warmup_steps)
  for gradient in gradients(shape):
    weights.grad = torch.from_numpy(gradient.copy())
    if clip:
      torch.nn.utils.clip_grad_norm_([weights], clip)
    tx.step()
    schedule.step()
  return weights.detach().numpy()


@pytest.fixture
def config():
  rate = {"learning_rate": 0.01, "scale_lr": False, "warmup_steps": 3}
  return run_config(**rate, weight_decay=0.1)  # large enough to be seen in six steps


def test_adamw_with_clipping_and_warmup_equals_pytorch(config):
  def make(weights):
    return torch.optim.AdamW(weights, lr=0.01, weight_decay=0.1)

  expected = run_torch(make, config.clip_norm, 3)
  np.testing.assert_allclose(run_optax(config), expected, atol=1e-6)
  assert not np.allclose(expected, run_torch(make, config.clip_norm, 2), atol=1e-4)


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize(
  ("schedule", "theirs"),
  [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")],
)
def test_the_rate_of_every_step_is_diffusers(config, schedule, theirs, warmup_steps):
  config = dataclasses.replace(
    config, schedule=schedule, warmup_steps=warmup_steps, steps=10
  )
  tx = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.01)
  steps = {"num_warmup_steps": warmup_steps, "num_training_steps": config.steps}
  expected = get_scheduler(theirs, tx, **steps)
  ours = optimizer.learning_rate_schedule(config)
  for step in range(config.steps):
    assert float(ours(step)) == pytest.approx(expected.get_last_lr()[0], 1e-6, 1e-9)
    tx.step()
    expected.step()


def test_the_optimizer_follows_the_schedule(config):
  config = dataclasses.replace(config, weight_decay=0.0, steps=STEPS)
  constant = run_optax(config)
  falling = run_optax(dataclasses.replace(config, schedule="linear"))
  assert (falling - constant > 1e-3).any()


def test_there_is_a_rate_for_every_schedule():
  assert set(optimizer.AFTER_WARMUP) == set(run_configs.SCHEDULES)


def test_an_unknown_schedule_is_named(config):
  with pytest.raises(InputError, match="'rising'; expected constant or linear"):
    dataclasses.replace(config, schedule="rising")


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (7, 1), (1, 7)])
def test_adafactor_equals_transformers(config, shape):
  config = dataclasses.replace(config, optimizer="adafactor", warmup_steps=0)

  def make(weights):
    return transformers.optimization.Adafactor(
      weights, lr=0.01, scale_parameter=False, relative_step=False, weight_decay=0.1
    )

  expected = run_torch(make, None, 0, shape)
  np.testing.assert_allclose(run_optax(config, shape), expected, atol=1e-6)


def test_the_scaled_rate_is_that_of_the_released_launcher():
  assert optimizer.effective_learning_rate(run_config()) == pytest.approx(1.6e-4)
  unscaled = run_config(scale_lr=False)
  assert optimizer.effective_learning_rate(unscaled) == pytest.approx(1e-5)


def test_an_unknown_optimizer_is_named(config):
  with pytest.raises(InputError, match="'sgd'; expected adamw or adafactor"):
    dataclasses.replace(config, optimizer="sgd")
