"""Samplers by name, and by the class a checkpoint names, as diffusers runs them.

Fields of scheduler_config.json mean what they mean in diffusers. An absent one has the
default of the sampler's class there, whichever class wrote the file; a field its class
does not know is passed over; one that it knows and we lack is refused.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from safetydpo_jax import diffusion
from safetydpo_jax.diffusion import Schedule
from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling.pndm import make_pndm
from safetydpo_jax.sampling.sigmas import (
  make_dpmpp_2m,
  make_euler,
  make_euler_ancestral,
)
from safetydpo_jax.sampling.table import Sampler


class Method(NamedTuple):
  """A sampler.

  Attributes:
    make: (fields, schedule, steps) → `Sampler`.
    fields: what it reads besides the `Schedule`, with diffusers' defaults.
    accepted: fields of its class with the values that we have; others are refused.
  """

  make: Callable[[SimpleNamespace, Schedule, int], Sampler]
  fields: Mapping[str, Any]
  accepted: Mapping[str, tuple]


def make_ddim(c: SimpleNamespace, schedule: Schedule, steps: int) -> Sampler:
  """Equation (4) of `diffusion.py`."""
  first = diffusion.sampling_timesteps(schedule, steps)[0]
  if schedule.prediction_type == "epsilon" and not schedule.alphas_cumprod[first]:
    raise InputError(
      "scheduler_config.json: prediction_type 'epsilon' cannot go with "
      "rescale_betas_zero_snr: noise alone does not say what the image is; mend one"
    )
  return lambda predict, latents, noise: diffusion.sample_ddim(
    predict, schedule, latents, steps
  )


_SPACED = {"timestep_spacing": "linspace", "steps_offset": 0}
_SIGMAS = {
  "use_karras_sigmas": False,
  "sigma_min": None,
  "sigma_max": None,
  "final_sigmas_type": "zero",
}
_ABSENT = (None, False)
_NOT_SAMPLE = {"prediction_type": ("epsilon", "v_prediction")}
_ACCEPTED_SIGMAS = {
  "final_sigmas_type": ("zero", "sigma_min"),
  "use_exponential_sigmas": _ABSENT,
  "use_beta_sigmas": _ABSENT,
}
METHODS = {
  "ddim": Method(make_ddim, {}, {"thresholding": _ABSENT}),
  "pndm": Method(
    make_pndm,
    {
      **_SPACED,
      "timestep_spacing": "leading",
      "skip_prk_steps": False,
      "set_alpha_to_one": False,
    },
    _NOT_SAMPLE,
  ),
  "euler": Method(
    make_euler,
    {**_SPACED, **_SIGMAS},
    {
      **_ACCEPTED_SIGMAS,
      "interpolation_type": ("linear",),
      "timestep_type": ("discrete",),
    },
  ),
  "euler_ancestral": Method(make_euler_ancestral, _SPACED, _NOT_SAMPLE),
  "dpmpp_2m": Method(
    make_dpmpp_2m,
    {
      **_SPACED,
      **_SIGMAS,
      "solver_order": 2,
      "solver_type": "midpoint",
      "lower_order_final": True,
      "euler_at_final": False,
    },
    {
      **_ACCEPTED_SIGMAS,
      "solver_order": (1, 2),
      "solver_type": ("midpoint", "heun"),
      "algorithm_type": ("dpmsolver++",),
      "thresholding": _ABSENT,
      "use_lu_lambdas": _ABSENT,
      "use_flow_sigmas": _ABSENT,
      "use_dynamic_shifting": _ABSENT,
      "variance_type": _ABSENT,
      "lambda_min_clipped": (None, float("-inf")),
    },
  ),
}
CLASSES = {
  "DDIMScheduler": "ddim",
  "PNDMScheduler": "pndm",
  "EulerDiscreteScheduler": "euler",
  "EulerAncestralDiscreteScheduler": "euler_ancestral",
  "DPMSolverMultistepScheduler": "dpmpp_2m",
}


def name_of(class_name: str) -> str:
  """The sampler of a diffusers class.

  Raises:
    InputError: we do not have it.
  """
  if class_name not in CLASSES:
    raise InputError(
      f"the checkpoint's scheduler is {class_name!r}, which is not supported, only "
      f"{', '.join(CLASSES)}; give --sampler, one of {', '.join(METHODS)}"
    )
  return CLASSES[class_name]


def make_sampler(name: str, schedule: Schedule, steps: int) -> Sampler:
  """A sampler of `METHODS` for a checkpoint and a number of steps.

  Returns:
    (predict, latents, noise) → latents. `latents` are (n, h, w, c) float32 standard
    normal, before the sampler's own scaling; `noise` gives the standard normal draw of
    a step from its number, which only 'euler_ancestral' asks for; `predict` is called
    with (latents, timestep () float32 or int32) and includes guidance.

  Raises:
    InputError: the number of steps does not fit the schedule, or a field of
      scheduler_config.json has a value that we do not have.
  """
  method, config = METHODS[name], schedule.config
  for field, values in method.accepted.items():
    if field in config and config[field] not in values:
      raise InputError(
        f"scheduler_config.json: {field} = {config[field]!r} is not supported with "
        f"sampler {name}, only {' or '.join(map(repr, values))}; give another --sampler"
      )
  fields = {name: config.get(name, default) for name, default in method.fields.items()}
  return method.make(SimpleNamespace(**fields), schedule, steps)
