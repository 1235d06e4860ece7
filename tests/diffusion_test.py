"""Noise schedule, targets and DDIM equal diffusers'."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from safetydpo_jax import diffusion
from safetydpo_jax.errors import InputError
from tests.support.checkpoints import SCHEDULER

CONFIGS = {
  "sd15": SCHEDULER,
  "v": {**SCHEDULER, "prediction_type": "v_prediction", "steps_offset": 0},
  "linear": {"beta_schedule": "linear", "beta_end": 0.006, "clip_sample": False},
  "clipped": {key: SCHEDULER[key] for key in SCHEDULER if key != "clip_sample"},
  "v without terminal signal": {
    **SCHEDULER,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
  },
}


@pytest.fixture
def draws():
  rng = np.random.default_rng(0)
  latents, noise = rng.standard_normal((2, 5, 4, 6, 3)).astype(np.float32)
  return latents, noise, np.array([0, 1, 500, 998, 999])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_noisy_latents_and_targets_equal_diffusers(config, draws):
  latents, noise, timesteps = draws
  reference = diffusers.DDPMScheduler.from_config(config)
  schedule = diffusion.Schedule.from_config(config)
  theirs = [torch.from_numpy(array) for array in (latents, noise, timesteps)]
  np.testing.assert_allclose(
    diffusion.add_noise(schedule, latents, noise, timesteps),
    reference.add_noise(*theirs),
    atol=1e-5,
  )
  velocity = reference.get_velocity(*theirs)
  expected = velocity if schedule.prediction_type == "v_prediction" else noise
  np.testing.assert_allclose(
    diffusion.target(schedule, latents, noise, timesteps), expected, atol=1e-5
  )


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_ddim_equals_diffusers(config, spacing, draws):
  latents = draws[0]
  config = {**config, "timestep_spacing": spacing}
  schedule = diffusion.Schedule.from_config(config)
  reference = diffusers.DDIMScheduler.from_config(config)
  reference.set_timesteps(20)
  timesteps = diffusion.sampling_timesteps(schedule, 20)
  np.testing.assert_array_equal(timesteps, reference.timesteps)

  weight = np.float32(0.3)
  sample = torch.from_numpy(latents)
  for timestep in reference.timesteps:
    prediction = torch.sin(weight * sample) * torch.cos(timestep / 300)
    sample = reference.step(prediction, timestep, sample).prev_sample

  def predict(latents, timestep):
    return jnp.sin(weight * latents) * jnp.cos(timestep / 300)

  ours = diffusion.sample_ddim(predict, schedule, jnp.asarray(latents), 20)
  np.testing.assert_allclose(ours, sample, atol=1e-4)


def test_the_last_step_has_no_signal_where_the_config_says_so():
  config = {**SCHEDULER, "rescale_betas_zero_snr": True}
  alphas = diffusion.Schedule.from_config(config).alphas_cumprod
  assert alphas[-1] == 0
  expected = diffusers.DDIMScheduler.from_config(config).alphas_cumprod
  np.testing.assert_allclose(alphas, expected, rtol=0, atol=1e-6)


def test_the_target_of_sample_prediction_is_the_clean_latents(draws):
  latents, noise, timesteps = draws
  schedule = diffusion.Schedule.from_config({**SCHEDULER, "prediction_type": "sample"})
  np.testing.assert_array_equal(
    diffusion.target(schedule, latents, noise, timesteps), latents
  )


def test_trailing_timesteps_end_before_the_schedule_does():
  """np.arange makes 62 for 61 steps, the last of them −1."""
  config = {**SCHEDULER, "timestep_spacing": "trailing"}
  schedule = diffusion.Schedule.from_config(config)
  for steps in (20, 61, 998):
    timesteps = diffusion.sampling_timesteps(schedule, steps)
    assert (len(timesteps), timesteps[0]) == (steps, 999)
    assert timesteps[-1] >= 0


def test_posterior_sample_equals_diffusers():
  moments = np.random.default_rng(0).standard_normal((2, 3, 3, 8)).astype(np.float32)
  moments[0, 0, 0, 4:] = [-40.0, 30.0, 0.0, 1.0]  # beyond the clip on both sides
  theirs = DiagonalGaussianDistribution(
    torch.from_numpy(moments.transpose(0, 3, 1, 2).copy())
  )
  noise = np.random.default_rng(1).standard_normal((2, 3, 3, 4)).astype(np.float32)
  expected = theirs.mean + theirs.std * torch.from_numpy(noise.transpose(0, 3, 1, 2))
  np.testing.assert_allclose(
    diffusion.posterior_sample(moments, noise, 0.18215),
    0.18215 * expected.numpy().transpose(0, 2, 3, 1),
    rtol=1e-5,
  )


def test_the_schedule_is_a_pytree_of_numbers():
  schedule = diffusion.Schedule.from_config(SCHEDULER)
  assert len(jax.tree.leaves(schedule)) == 2
  assert schedule.num_timesteps == 1000


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("prediction_type", "flow_prediction"),
    ("beta_schedule", "squaredcos_cap_v2"),
  ],
)
def test_a_schedule_we_do_not_have_is_named(field, value):
  with pytest.raises(InputError, match=field):
    diffusion.Schedule.from_config({**SCHEDULER, field: value})


@pytest.mark.parametrize(
  ("steps", "message"),
  [(0, "expected 1 to 1000"), (1001, "expected 1 to 1000"), (1000, "beyond the")],
)
def test_a_step_count_outside_the_schedule_is_refused(steps, message):
  with pytest.raises(InputError, match=message):
    diffusion.sampling_timesteps(diffusion.Schedule.from_config(SCHEDULER), steps)


def test_a_negative_offset_is_refused():
  """It would end at a timestep before 0, which counts from the end of the array."""
  config = {**SCHEDULER, "steps_offset": -3}
  with pytest.raises(InputError, match="steps_offset -3"):
    diffusion.sampling_timesteps(diffusion.Schedule.from_config(config), 20)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"num_train_timesteps": 10**12}, "from 2 to 100,000"),
    ({"num_train_timesteps": 1}, "num_train_timesteps = 1"),
    ({"num_train_timesteps": "1000"}, "num_train_timesteps = '1000'"),
    ({"beta_start": -0.1}, "beta_start and beta_end are -0.1 and 0.012; .*0 to 1"),
    ({"beta_end": float("nan")}, "and nan"),
    ({"beta_end": 10**400}, "expected numbers from 0 to 1"),
    ({"beta_end": [0.1]}, "expected numbers from 0 to 1"),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas are not 1,000 numbers"),
    ({"trained_betas": ["x"] * 1000}, "trained_betas are not 1,000 numbers"),
    ({"trained_betas": [[0.1]] * 1000}, "trained_betas are not 1,000 numbers"),
    ({"trained_betas": [2] * 1000}, "trained_betas are not 1,000 numbers"),
    ({"set_alpha_to_one": "false"}, "set_alpha_to_one = 'false'; expected true"),
    ({"rescale_betas_zero_snr": "false"}, "rescale_betas_zero_snr = 'false'"),
  ],
)
def test_fields_that_make_no_schedule_are_refused(fields, message):
  with pytest.raises(InputError, match=message):
    diffusion.Schedule.from_config({**SCHEDULER, **fields})
