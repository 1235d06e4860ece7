"""Samplers by name, and by the scheduler class of a checkpoint, as diffusers runs them.

Fields of scheduler_config.json mean what they mean in diffusers. A missing field has
the default of the sampler's class there, whichever class wrote the file; a field that
class does not know is ignored; one that it knows and we do not support is refused.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import numpy as np

from safetydpo_jax import diffusion
from safetydpo_jax.diffusion import Schedule
from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling import fields
from safetydpo_jax.sampling.adams import make_deis, make_lms
from safetydpo_jax.sampling.ddpm import check_signal, make_ddpm, make_lcm, make_tcd
from safetydpo_jax.sampling.dpm import make_dpmpp_2m, make_dpmpp_2m_sde, make_dpmpp_2s
from safetydpo_jax.sampling.pndm import make_pndm
from safetydpo_jax.sampling.sigmas import (
  make_dpmpp_sde,
  make_euler,
  make_euler_ancestral,
  make_heun,
)
from safetydpo_jax.sampling.table import Sampler
from safetydpo_jax.sampling.unipc import make_unipc

Name = Literal[
  "ddim",
  "pndm",
  "euler",
  "euler_ancestral",
  "heun",
  "lms",
  "dpmpp_2m",
  "dpmpp_2m_sde",
  "dpmpp_2s",
  "dpmpp_sde",
  "deis",
  "unipc",
  "ddpm",
  "lcm",
  "tcd",
]


class Method(NamedTuple):
  """A sampler.

  Attributes:
    make: (fields, steps) → `Sampler`.
    fields: all that it reads, with diffusers' defaults.
    accepted: fields of its class with the values we support; others are refused.
  """

  make: Callable[[SimpleNamespace, int], Sampler]
  fields: Mapping[str, Any]
  accepted: Mapping[str, tuple]


class Variants(NamedTuple):
  """A scheduler class whose sampler depends on a field of its config.

  Attributes:
    field: its name.
    names: the sampler by the field's value.
    otherwise: the sampler for other values, and without the field.
  """

  field: str
  names: Mapping[Any, Name]
  otherwise: Name


def make_ddim(c: SimpleNamespace, steps: int) -> Sampler:
  """Equation (4) of `diffusion.py`."""
  schedule = Schedule.from_config(vars(c))
  first = diffusion.sampling_timesteps(schedule, steps)[0]
  check_signal(c.prediction_type, float(schedule.alphas_cumprod[first]))
  return lambda predict, latents, noise: diffusion.sample_ddim(
    predict, schedule, latents, steps
  )


METHODS: dict[Name, Method] = {
  "ddim": Method(
    make_ddim,
    {
      **fields.BASIS,
      **fields.LEADING,
      **fields.ZERO_SNR,
      **fields.CLIP,
      "clip_sample": True,
      "set_alpha_to_one": True,
    },
    fields.NO_THRESHOLDING,
  ),
  "pndm": Method(
    make_pndm,
    {
      **fields.BASIS,
      **fields.LEADING,
      "skip_prk_steps": False,
      "set_alpha_to_one": False,
    },
    fields.NOT_SAMPLE,
  ),
  "euler": Method(
    make_euler,
    {
      **fields.BASIS,
      **fields.SPACED,
      **fields.ZERO_SNR,
      **fields.SPREAD,
      **fields.FINAL,
      "timestep_type": "discrete",
    },
    {
      **fields.ENDS,
      "interpolation_type": ("linear",),
      "timestep_type": ("discrete", "continuous"),
    },
  ),
  "euler_ancestral": Method(
    make_euler_ancestral,
    {**fields.BASIS, **fields.SPACED, **fields.ZERO_SNR},
    fields.NOT_SAMPLE,
  ),
  "heun": Method(
    make_heun,
    {**fields.BASIS, **fields.LATENT, **fields.SPACED, **fields.SPREAD, **fields.CLIP},
    {},
  ),
  "lms": Method(make_lms, {**fields.BASIS, **fields.SPACED, **fields.SPREAD}, {}),
  "dpmpp_2m": Method(make_dpmpp_2m, fields.MULTISTEP, fields.DPM_ACCEPTED),
  "dpmpp_2m_sde": Method(make_dpmpp_2m_sde, fields.MULTISTEP, fields.DPM_ACCEPTED),
  "dpmpp_2s": Method(
    make_dpmpp_2s, {**fields.DPM, "lower_order_final": False}, fields.DPM_ACCEPTED
  ),
  "dpmpp_sde": Method(
    make_dpmpp_sde,
    {**fields.BASIS, **fields.LATENT, **fields.SPACED, **fields.SPREAD},
    fields.NOT_SAMPLE,
  ),
  "deis": Method(
    make_deis,
    {**fields.BASIS, **fields.SPACED, **fields.SPREAD, **fields.SOLVER},
    {
      **fields.NO_THRESHOLDING,
      **fields.NO_FLOW,
      **fields.ORDERS,
      **fields.SOLVERS,
      **fields.ALGORITHMS,
    },
  ),
  "unipc": Method(
    make_unipc,
    {
      **fields.BASIS,
      **fields.SPACED,
      **fields.ZERO_SNR,
      **fields.SPREAD,
      **fields.FINAL,
      **fields.SOLVER,
      "solver_type": "bh2",
      "predict_x0": True,
      "disable_corrector": (),
    },
    {
      **fields.NO_THRESHOLDING,
      **fields.NO_FLOW,
      **fields.ENDS,
      **fields.ORDERS,
      **fields.SOLVERS,
      "solver_p": (None,),
      "shift_terminal": (None,),
    },
  ),
  "ddpm": Method(
    make_ddpm,
    {
      **fields.BASIS,
      **fields.LEADING,
      **fields.ZERO_SNR,
      **fields.CLIP,
      "clip_sample": True,
      "variance_type": "fixed_small",
    },
    # With fixed_large_log diffusers takes the root of a negative number.
    {**fields.NO_THRESHOLDING, "variance_type": fields.FIXED[:-1]},
  ),
  "lcm": Method(
    make_lcm,
    {**fields.DISTILLED, **fields.CLIP, "timestep_scaling": 10.0},
    fields.NO_THRESHOLDING,
  ),
  "tcd": Method(make_tcd, fields.DISTILLED, {}),
}
CLASSES: dict[str, Name | Variants] = {
  "DDIMScheduler": "ddim",
  "PNDMScheduler": "pndm",
  "EulerDiscreteScheduler": "euler",
  "EulerAncestralDiscreteScheduler": "euler_ancestral",
  "HeunDiscreteScheduler": "heun",
  "LMSDiscreteScheduler": "lms",
  "DPMSolverMultistepScheduler": Variants(
    "algorithm_type",
    {"sde-dpmsolver++": "dpmpp_2m_sde", "sde-dpmsolver": "dpmpp_2m_sde"},
    "dpmpp_2m",
  ),
  "DPMSolverSinglestepScheduler": "dpmpp_2s",
  "DPMSolverSDEScheduler": "dpmpp_sde",
  "DEISMultistepScheduler": "deis",
  "UniPCMultistepScheduler": "unipc",
  "DDPMScheduler": "ddpm",
  "LCMScheduler": "lcm",
  "TCDScheduler": "tcd",
}


def name_of(class_name: str, config: Mapping[str, Any]) -> Name:
  """The sampler that a diffusers scheduler class runs with a scheduler_config.json.

  Raises:
    InputError: it is not supported.
  """
  if class_name not in CLASSES:
    raise InputError(
      f"the checkpoint's scheduler is {class_name!r}, which is not supported; only "
      f"{', '.join(CLASSES)} are; give --sampler, one of {', '.join(METHODS)}"
    )
  found = CLASSES[class_name]
  if isinstance(found, Variants):
    return found.names.get(config.get(found.field), found.otherwise)
  return found


def make_sampler(name: Name, schedule: Schedule, steps: int) -> Sampler:
  """A sampler of `METHODS` for a checkpoint and a number of steps.

  Returns:
    (predict, latents, noise) → latents. `predict` is called with (latents, timestep ()
    float32 or int32) and includes guidance; `latents` are (n, h, w, c) float32 standard
    normal, before the sampler's own scaling; `noise` maps the number of an evaluation
    to standard normal noise, and only samplers that add noise call it.

  Raises:
    InputError: the number of steps does not fit the schedule, or a field of
      scheduler_config.json has a value that is not supported.
  """
  method, config = METHODS[name], schedule.config
  for field, accepted in method.accepted.items():
    if field in config and config[field] not in accepted:
      raise InputError(
        f"scheduler_config.json: {field} = {config[field]!r} is not supported with "
        f"sampler {name}, only {' or '.join(map(repr, accepted))}; choose another "
        "--sampler"
      )
  values = {
    field: fields.check_type(field, config.get(field, default), default)
    for field, default in method.fields.items()
  }
  with np.errstate(divide="ignore", invalid="ignore"):  # `table.make_run` checks
    return method.make(SimpleNamespace(**values), steps)
