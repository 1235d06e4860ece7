"""diffusers' schedulers beside ours: the same model, the same noise."""

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch

from safetydpo_jax.diffusion import Schedule
from safetydpo_jax.sampling.methods import CLASSES, Variants, make_sampler
from tests.support.checkpoints import SCHEDULER

TOLERANCE = 1e-4
SD2 = {**SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
ZERO_SNR = {**SD2, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
SDXL = {
  **SCHEDULER,
  "_class_name": "EulerDiscreteScheduler",
  "interpolation_type": "linear",
  "sample_max_value": 1.0,
  "timestep_spacing": "leading",
  "use_karras_sigmas": False,
}
# The prediction types of each sampler.
BOTH = ("epsilon", "v_prediction")
ALL = (*BOTH, "sample")
KINDS = {
  "ddim": ALL,
  "pndm": BOTH,
  "euler": ALL,
  "euler_ancestral": BOTH,
  "heun": ALL,
  "lms": ALL,
  "dpmpp_2m": ALL,
  "dpmpp_2m_sde": ALL,
  "dpmpp_2s": ALL,
  "dpmpp_sde": BOTH,
  "deis": ALL,
  "unipc": ALL,
  "ddpm": ALL,
  "lcm": ALL,
  "tcd": ALL,
}


def make_noises() -> np.ndarray:
  """Initial latents, and noise for every evaluation: (200, n, h, w, c)."""
  rng = np.random.default_rng(0)
  return rng.standard_normal((200, 2, 3, 2, 4)).astype(np.float32)


def class_of(name: str) -> type:
  """The scheduler class of diffusers that a sampler stands for."""
  if name == "dpmpp_sde":  # diffusers hides it without torchsde, which it names only
    had = sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    if not hasattr(had, "BrownianInterval"):
      del sys.modules["torchsde"]
    return module.DPMSolverSDEScheduler
  for theirs, ours in CLASSES.items():
    names = (
      {*ours.names.values(), ours.otherwise} if isinstance(ours, Variants) else {ours}
    )
    if name in names:
      return getattr(diffusers, theirs)
  raise KeyError(name)


def make_scheduler(name: str, config: dict, **fields):
  """Theirs, with the fields that a sampler's name decides."""
  if name == "dpmpp_2m_sde":
    fields = {"algorithm_type": "sde-dpmsolver++", **fields}
  return class_of(name).from_config(config, **fields)


class Brownian:
  """Stands in for diffusers' BrownianTreeNoiseSampler: W from given increments.

  A step asks for W over [σ_m, σ], then over [σ', σ].
  """

  def __init__(self, draws: Iterator[torch.Tensor]):
    self.draws = draws
    self.walked = None

  def __call__(self, high, low):
    draw, span = next(self.draws), high - low
    if self.walked is None:
      self.walked = span, draw * span**0.5
      return draw
    (done, total), self.walked = self.walked, None
    return (total + draw * (span - done) ** 0.5) / span**0.5


@contextmanager
def given_noise(scheduler, draws: np.ndarray):
  """diffusers draws these, one after the other."""
  draws = iter(torch.from_numpy(draws))
  module = sys.modules[type(scheduler).__module__]
  made = {
    "BrownianTreeNoiseSampler": {"return_value": Brownian(draws)},
    "randn_tensor": {"side_effect": draws},
  }
  with ExitStack() as stack:
    for name in made.keys() & vars(module).keys():
      stack.enter_context(mock.patch.object(module, name, **made[name]))
    yield


def sample_theirs(scheduler, noises, steps, gain):
  """diffusers' scheduler around the model y = gain · sin(0.3 x) · cos(t / 300)."""
  scheduler.set_timesteps(steps)
  latents = torch.from_numpy(noises[0]) * scheduler.init_noise_sigma
  with given_noise(scheduler, noises[1:]):
    for timestep in scheduler.timesteps:
      scaled = scheduler.scale_model_input(latents, timestep)
      prediction = gain * torch.sin(0.3 * scaled) * torch.cos(timestep / 300)
      latents = scheduler.step(prediction, timestep, latents).prev_sample
  return latents.numpy()


def sample_ours(name, config, noises, steps, gain):
  """The same model and noises."""
  sampler = make_sampler(name, Schedule.from_config(config), steps)

  def predict(latents, timestep):
    return gain * jnp.sin(0.3 * latents) * jnp.cos(timestep / 300)

  draws = jnp.asarray(noises[1:])
  return jax.jit(lambda x: sampler(predict, x, lambda step: draws[step]))(noises[0])


def assert_equal(name, config, steps=20, *, leave_out=(), **fields):
  """Our sampler ends where diffusers' class ends, given the same noise.

  Args:
    name: of the sampler.
    config: what differs from SD1.5's.
    steps: of the sampler.
    leave_out: fields that the config has not.
    fields: for their scheduler, in place of the config's.
  """
  noises = make_noises()
  config = {k: v for k, v in {**SCHEDULER, **config}.items() if k not in leave_out}
  gain = 4 if config["prediction_type"] == "sample" else 1
  scheduler = make_scheduler(name, config, **fields)
  expected = sample_theirs(scheduler, noises, steps, gain)
  assert expected.std() > 0.02, "an output near zero would agree with anything"
  ours = sample_ours(name, config, noises, steps, gain)
  atol = TOLERANCE * max(1.0, expected.std() / 20)  # float32 has seven digits
  np.testing.assert_allclose(ours, expected, rtol=0, atol=atol)
