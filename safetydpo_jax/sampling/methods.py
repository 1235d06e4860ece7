"""Samplers by name, and by the scheduler class of a checkpoint, as diffusers runs them.

Fields of scheduler_config.json mean what they mean in diffusers. A missing field has
the default of the sampler's class there, whichever class wrote the file; a field that
class does not know is ignored; one that it knows and we do not support is refused.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

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

Name = Literal["ddim", "pndm", "euler", "euler_ancestral", "dpmpp_2m"]


class Method(NamedTuple):
  """A sampler.

  Attributes:
    make: (fields, schedule, steps) → `Sampler`.
    fields: what it reads besides the `Schedule`, with diffusers' defaults.
    accepted: fields of its class with the values we support; others are refused.
  """

  make: Callable[[SimpleNamespace, Schedule, int], Sampler]
  fields: Mapping[str, Any]
  accepted: Mapping[str, tuple]


def make_ddim(c: SimpleNamespace, schedule: Schedule, steps: int) -> Sampler:
  """Equation (4) of `diffusion.py`."""
  first = diffusion.sampling_timesteps(schedule, steps)[0]
  if schedule.prediction_type == "epsilon" and not schedule.alphas_cumprod[first]:
    raise InputError(
      "scheduler_config.json: prediction_type 'epsilon' does not work with "
      "rescale_betas_zero_snr, as the first step has no signal to recover the image "
      "from; fix one of the two"
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
METHODS: dict[Name, Method] = {
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
CLASSES: dict[str, Name] = {
  "DDIMScheduler": "ddim",
  "PNDMScheduler": "pndm",
  "EulerDiscreteScheduler": "euler",
  "EulerAncestralDiscreteScheduler": "euler_ancestral",
  "DPMSolverMultistepScheduler": "dpmpp_2m",
}


def name_of(class_name: str) -> Name:
  """The sampler that a diffusers scheduler class runs.

  Raises:
    InputError: it is not supported.
  """
  if class_name not in CLASSES:
    raise InputError(
      f"the checkpoint's scheduler is {class_name!r}, which is not supported; only "
      f"{', '.join(CLASSES)} are; give --sampler, one of {', '.join(METHODS)}"
    )
  return CLASSES[class_name]


def make_sampler(name: Name, schedule: Schedule, steps: int) -> Sampler:
  """A sampler of `METHODS` for a checkpoint and a number of steps.

  Returns:
    (predict, latents, noise) → latents. `predict` is called with (latents, timestep ()
    float32 or int32) and includes guidance; `latents` are (n, h, w, c) float32 standard
    normal, before the sampler's own scaling; `noise` maps a step's number to standard
    normal noise, and only 'euler_ancestral' calls it.

  Raises:
    InputError: the number of steps does not fit the schedule, or a field of
      scheduler_config.json has a value that is not supported.
  """
  method, config = METHODS[name], schedule.config
  for field, values in method.accepted.items():
    if field in config and config[field] not in values:
      raise InputError(
        f"scheduler_config.json: {field} = {config[field]!r} is not supported with "
        f"sampler {name}, only {' or '.join(map(repr, values))}; choose another "
        "--sampler"
      )
  fields = {name: config.get(name, default) for name, default in method.fields.items()}
  return method.make(SimpleNamespace(**fields), schedule, steps)
