"""Timesteps and σ of a run are those of diffusers, whatever the number of steps."""

from types import SimpleNamespace

import diffusers
import numpy as np
import pytest

from safetydpo_jax import diffusion
from safetydpo_jax.sampling import noise_levels
from safetydpo_jax.sampling.fields import MULTISTEP
from tests.support.checkpoints import SCHEDULER

BETAS = {
  "sd": SCHEDULER,
  "linear": {"beta_schedule": "linear"},
  "trained": {"trained_betas": [0.1, 0.2, 0.3, 0.5], "num_train_timesteps": 4},
  "without terminal signal": {**SCHEDULER, "rescale_betas_zero_snr": True},
}


def fields(config):
  return SimpleNamespace(**{k: config.get(k, v) for k, v in MULTISTEP.items()})


@pytest.mark.parametrize("config", BETAS.values(), ids=BETAS)
def test_the_training_schedule_is_that_of_diffusers_bit_for_bit(config):
  """Timesteps are cut to integers, so one rounding error can move one by one."""
  theirs = diffusers.DDPMScheduler.from_config(config).alphas_cumprod.numpy()
  ours = noise_levels.training_alphas(fields(config))
  if "rescale_betas_zero_snr" in config:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
  else:
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("spread", noise_levels.SPREADS)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_spread_sigmas_have_the_timesteps_of_diffusers(spread, steps):
  config = {**SCHEDULER, spread: True}
  theirs = diffusers.DPMSolverMultistepScheduler.from_config(config)
  theirs.set_timesteps(steps)
  ours = noise_levels.whole_levels(fields(config), steps)
  np.testing.assert_array_equal(ours.timesteps, theirs.timesteps)
  np.testing.assert_allclose(ours.sigmas, theirs.sigmas, rtol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_timesteps_of_every_number_of_steps(spacing):
  """Three ways to space them: DDIM and DDPM's, Euler's fractions, DPM-Solver's."""
  config = {**SCHEDULER, "timestep_spacing": spacing, "steps_offset": 0}
  ddim = diffusers.DDIMScheduler.from_config(config)
  euler = diffusers.EulerDiscreteScheduler.from_config(config)
  dpm = diffusers.DPMSolverMultistepScheduler.from_config(config)
  schedule = diffusion.Schedule.from_config(config)
  too_long = set()
  for steps in range(1, 1001):
    fractional = noise_levels.fractional_levels(fields(config), steps)
    ours = [
      (ddim, diffusion.sampling_timesteps(schedule, steps)),
      (euler, fractional.timesteps),
    ]
    if steps < 1000 or spacing == "trailing":
      whole = noise_levels.whole_levels(fields(config), steps)
      ours.append((dpm, whole.timesteps))
    for scheduler, timesteps in ours:
      scheduler.set_timesteps(steps)
      expected = scheduler.timesteps.numpy()
      if len(expected) > steps:
        too_long.add(steps)
        assert expected[-1] == -1, "one step too many, at a timestep that is not there"
      np.testing.assert_allclose(timesteps, expected[:steps], rtol=1e-6, atol=1e-6)
  assert len(too_long) == (62 if spacing == "trailing" else 0)
